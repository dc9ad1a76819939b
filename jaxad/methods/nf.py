"""NF: the likelihood of an image, or of its embedding, under a normalizing flow, and why that of pixels misleads.

Stored: a RealNVP or Glow, which maps training images to a standard normal; what it sees are pixels (dequantized by
noise, as logits) or the pooled features of a backbone. An image scores its negative log-likelihood in bits a
dimension. Flows on pixels learn what neighboring pixels have in common, of whatever images, so that simple foreign
images score as more normal than those of the training set; couplings whose masks leave no neighbor in sight ("cycle",
"horizontal") are the remedy for pixels, and embeddings the better one (sections 4-6).

Paper: Why Normalizing Flows Fail to Detect Out-of-Distribution Data, NeurIPS 2020, arXiv:2006.08545. Flows: RealNVP,
    arXiv:1605.08803; Glow, arXiv:1807.03039.
Reference: https://github.com/PolinaKirichenko/flows_ood
Differences: all couplings have residual networks without normalization, which end in zeros, instead of ResNets with
    batch norm or highway networks, and log scales clamp * tanh(s / clamp) with a fixed clamp; channels are standardized
    once, before the flow (with networks that begin as zeros and 1x1 convolutions that begin as permutations, not as
    random rotations, that is what Glow's data-dependent initialization of all its ActNorms comes to); Adam for both
    flows, whose weight decay reaches all parameters; squeezing puts a pixel's channels side by side.
Results: experiments/recipes/nf.py, and experiments/nf_ood.py for the paper's own question.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import distrax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, UInt8

from jaxad.backbones import backbone as architecture
from jaxad.backbones import features
from jaxad.base import Batch, Frozen, Key, Method, Metrics, PyTree, Scores, Stage
from jaxad.bijectors import (
    ActNorm,
    GlowNetworks,
    Invertible1x1,
    LuFactors,
    MultiScale,
    Scan,
    Squeeze,
    channel_mask,
    checkerboard_mask,
    glow_coupling,
    half_mask,
    lu_identity,
    lu_matrix,
    masked_coupling,
    quadrant_mask,
)
from jaxad.bijectors import coupling as half_coupling
from jaxad.ops.gaussian import Moments, channels, channels_update, moments_init
from jaxad.ops.image import pixels
from jaxad.training.checks import above_zero, at_least_one, zero_or_more
from jaxad.training.gradient import Trained, begin, descend, mean_of_valid, torch_adam, zero_padding

Mask = Literal["checkerboard", "horizontal", "cycle"]
BOUND = 0.05
"""Logits are taken of pixels that have been moved this far away from black and white."""
PAIR = 3
"""Couplings with masks of pixels, and then with masks of channels, at every scale but the last (RealNVP)."""


class NfTraining(NamedTuple):
    """The flow while it is trained."""

    trained: Trained
    moments: Moments
    """Of every channel."""


class NfFlow(NamedTuple):
    """The fitted flow."""

    params: PyTree


class GlowStep(NamedTuple):
    """What is learned in a step of Glow."""

    log_scale: Float[Array, "*n c"]
    shift: Float[Array, "*n c"]
    mix: LuFactors
    network: PyTree


class Part(NamedTuple):
    """Some couplings of a flow."""

    init: Callable[[Key], PyTree]
    """Their parameters."""
    bijector: Callable[[PyTree], distrax.Bijector]


class Residual(nn.Module):
    """A residual network, of 3x3 convolutions for images, whose last layer begins as zeros."""

    hidden: int
    blocks: int
    out: int
    image: bool
    far: bool = False
    """The pixels that block i looks at are 2^i apart."""

    @nn.compact
    def __call__(self, x: Float[Array, "*s c"]) -> Float[Array, "*s d"]:
        """Raw log scales and shifts."""

        def layer(x: Array, apart: int = 1) -> Array:
            return (nn.Conv(self.hidden, (3, 3), kernel_dilation=apart) if self.image else nn.Dense(self.hidden))(x)

        x = layer(x)
        for i in range(self.blocks):
            apart = 2**i if self.far else 1
            x = x + layer(nn.relu(layer(nn.relu(x), apart)), apart)
        return nn.Dense(self.out, kernel_init=nn.initializers.zeros)(nn.relu(x))


def dequantize(
    image: UInt8[Array, "b h w c"], noise: Float[Array, "*b h w c"]
) -> tuple[Float[Array, "b h w c"], Float[Array, "b"]]:
    """Logits of pixels with noise in [0, 1), and the log-determinant in units of pixel levels.

    Source: RealNVP, arXiv:1605.08803, section 4.1.
    """
    inside = BOUND + (1 - 2 * BOUND) * (image.astype(jnp.float32) + noise) / 256
    low, high = jnp.log(inside), jnp.log1p(-inside)
    return low - high, jnp.sum(math.log((1 - 2 * BOUND) / 256) - low - high, (1, 2, 3))


def spatial_masks(kind: Mask, n: int, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """For n couplings in turn, the entries that stay as they are, and those of them that the network sees."""
    if kind == "checkerboard":
        keep = np.stack([checkerboard_mask(*shape, odd=i % 2 == 1) for i in range(n)])
        return keep, keep
    if kind == "horizontal":
        keep = np.stack([half_mask(*shape, lower=i % 2 == 1) for i in range(n)])
        return keep, keep
    quadrants = np.stack([quadrant_mask(*shape, i) for i in range(n + 1)])
    return ~quadrants[1:], quadrants[:-1]


def nf(
    *,
    backbone: str = "wide_resnet50_2",
    layers: tuple[str, ...] | None = None,
    on: Literal["embedding", "pixels"] = "embedding",
    flow: Literal["realnvp", "glow"] = "realnvp",
    mask: Mask = "checkerboard",
    scales: int = 3,
    couplings: int = 8,
    hidden: int = 256,
    blocks: int = 2,
    clamp: float = 2.0,
    epochs: int = 100,
    train_batch_size: int = 32,
    learning_rate: float = 1e-4,
    weight_decay: float = 5e-5,
) -> Method:
    """NF.

    Args:
        backbone: The network whose features are embeddings.
        layers: Its stages, pooled and put side by side; None for the deepest.
        on: What the flow sees. Pixels: of images whose height and width 2^scales divides.
        flow: Its kind; "glow" for pixels only.
        mask: Of RealNVP's couplings of pixels. The published RealNVP is "checkerboard" with 3 scales and 4 couplings;
            the remedies "horizontal" and "cycle" have 1 scale, and 8 couplings in the paper.
        scales: Of a flow on pixels.
        couplings: Of an embedding, or of pixels at the last scale (RealNVP; 3 and 3 at those before), or at each scale
            (Glow).
        hidden: Width of the couplings' networks (RealNVP: at the finest scale, doubled wherever resolution is halved).
        blocks: Residual blocks of each. With the masks "horizontal" and "cycle" the pixels that block i looks at are
            2^i apart, and the blocks must be so many that a network sees half the image.
        clamp: Bound of the couplings' log scales.
        epochs: Passes over the training images.
        train_batch_size: Images of a step.
        learning_rate: Of Adam.
        weight_decay: Of Adam, added to the gradient.

    Raises:
        ValueError: A hyper-parameter is out of its range.
    """
    at_least_one(
        scales=scales,
        couplings=couplings,
        hidden=hidden,
        blocks=blocks,
        epochs=epochs,
        train_batch_size=train_batch_size,
    )
    above_zero(clamp=clamp, learning_rate=learning_rate)
    zero_or_more(weight_decay=weight_decay)
    for name, value, known in (
        ("on", on, ("embedding", "pixels")),
        ("flow", flow, ("realnvp", "glow")),
        ("mask", mask, ("checkerboard", "horizontal", "cycle")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value}")
    if on == "embedding" and (flow == "glow" or couplings % 2):
        raise ValueError(f"a flow on embeddings must be a realnvp with even couplings, got {flow} with {couplings}")
    remedy = mask != "checkerboard"
    if remedy and (on, flow, scales) != ("pixels", "realnvp", 1):
        raise ValueError(
            f"the mask {mask} is of a realnvp on pixels with 1 of scales, got {flow} on {on} with {scales}"
        )
    layers = architecture(backbone).stages[-1:] if layers is None else tuple(layers)
    optimizer = torch_adam(learning_rate, weight_decay)
    image = on == "pixels"
    clamped: dict[str, Any] = dict(clamp=clamp, kind="tanh")

    def network(width: int, out: int) -> Residual:
        return Residual(width, blocks, out, image, remedy)

    def stack(init: Callable[[Key], PyTree], key: Key, n: int) -> PyTree:
        return jax.vmap(init)(jax.random.split(key, n))

    def masked(masks: tuple[np.ndarray, np.ndarray], width: int, shape: tuple[int, ...]) -> Part:
        net, (keep, seen) = network(width, 2 * shape[-1]), (jnp.asarray(m) for m in masks)

        def block(given: tuple) -> distrax.Bijector:
            params, keep, seen = given
            return masked_coupling(keep, lambda x: net.apply(params, jnp.where(seen, x, 0)), **clamped)

        init = lambda key: stack(lambda own: net.init(own, jnp.zeros((1, *shape))), key, len(keep))  # noqa: E731
        return Part(init, lambda params: Scan(block, (params, keep, seen), 3))

    def glow_steps(width: int, shape: tuple[int, ...]) -> Part:
        c = shape[-1]
        net = network(width, 2 * (c // 2))
        orders = jnp.asarray(np.random.default_rng(0).permuted(np.tile(np.arange(c), (couplings, 1)), axis=1))

        def one(key: Key) -> GlowStep:
            given = jnp.zeros((1, *shape[:2], c - c // 2))
            return GlowStep(jnp.zeros(c), jnp.zeros(c), lu_identity(c), net.init(key, given))

        def block(given: tuple) -> distrax.Bijector:
            step, order = given
            matrix, log_det = lu_matrix(step.mix, order)
            moved: Any = half_coupling(lambda x: net.apply(step.network, x), c, event_ndims=3, **clamped)
            mix = Invertible1x1(matrix, 3, log_det=log_det)
            return distrax.Chain([moved, mix, ActNorm(step.log_scale, step.shift, 3)])

        return Part(lambda key: stack(one, key, couplings), lambda params: Scan(block, (params, orders), 3))

    def pairs(c: int) -> Part:
        """The couplings of an embedding, two by two."""
        both = GlowNetworks(lambda out: network(hidden, out), c)

        def one(key: Key) -> tuple:
            return both.init(jax.random.split(key), lambda n: jnp.zeros((1, n)))

        def block(params: tuple) -> distrax.Bijector:
            return glow_coupling(both.conditioners(params), c, event_ndims=1, **clamped)

        return Part(lambda key: stack(one, key, couplings // 2), lambda params: Scan(block, params, 1))

    def parts(shape: Any) -> list[list[Part | distrax.Bijector]]:
        """What happens at every scale, in turn."""
        if not image:
            return [[pairs(shape[-1])]]
        (h, w, c), width, levels = shape, hidden, []
        for scale in range(scales):
            last = scale == scales - 1
            squeezed = h // 2, w // 2, 4 * c
            if flow == "glow":
                levels.append([Squeeze(), glow_steps(width, squeezed)])
            else:
                levels.append([masked(spatial_masks(mask, couplings if last else PAIR, (h, w, c)), width, (h, w, c))])
                if not last:
                    width *= 2
                    by_channel = np.stack([channel_mask(*squeezed, second=i % 2 == 1) for i in range(PAIR)])
                    levels[-1] += [Squeeze(), masked((by_channel, by_channel), width, squeezed)]
            h, w, c = *squeezed[:2], squeezed[2] // 2
        return levels

    def flatten(x: PyTree) -> Array:
        return x if image else jnp.concatenate([x[layer] for layer in layers], -1)

    def init(key: Key, frozen: Frozen, spec: PyTree) -> NfTraining:
        del frozen
        shape = jax.eval_shape(flatten, spec).shape[1:]
        if image and (shape[0] % 2**scales or shape[1] % 2**scales):
            raise ValueError(
                f"height and width must be multiples of {2**scales} (2^scales), got {shape[0]} x {shape[1]}"
            )
        if remedy and 2 ** (blocks + 1) <= max(shape[:2]) / 2:
            raise ValueError(
                f"blocks must be so many that the networks see half an image of {shape[0]} x {shape[1]}, got {blocks}, "
                f"which see {2 ** (blocks + 1) - 1} pixels far"
            )
        c = shape[-1]
        learned = [part.init for level in parts(shape) for part in level if isinstance(part, Part)]
        flows = [make(own) for make, own in zip(learned, jax.random.split(key, len(learned)), strict=True)]
        params = {"log_scale": jnp.zeros(c), "shift": jnp.zeros(c), "flow": flows}
        return NfTraining(begin(optimizer, params), moments_init((c, 1)))

    def bijector(params: PyTree, shape: Any) -> distrax.Bijector:
        given, levels = iter(params["flow"]), []
        for level in parts(shape):
            chain = [part.bijector(next(given)) if isinstance(part, Part) else part for part in level]
            levels.append(distrax.Chain(chain[::-1]))
        standardize = ActNorm(params["log_scale"], params["shift"], len(shape))
        return distrax.Chain([MultiScale(levels, shape) if image else levels[0], standardize])

    def nats(params: PyTree, x: Array, log_det: Array) -> Float[Array, "b"]:
        """Negative log-likelihood."""
        z, more = bijector(params, x.shape[1:]).forward_and_log_det(x)
        return 0.5 * jnp.sum(z**2, -1) + 0.5 * math.prod(x.shape[1:]) * math.log(2 * math.pi) - more - log_det

    def bits(nats: Array, x: Array) -> Array:
        """The same in bits a dimension."""
        return nats / (math.prod(x.shape[1:]) * math.log(2))

    def seen(x: PyTree, noise: Callable[[tuple[int, ...]], Array]) -> tuple[Array, Array]:
        """What the flow sees, and the log-determinant of the way there."""
        x = flatten(x)
        return dequantize(x, noise(x.shape)) if image else (x, jnp.zeros(x.shape[0]))

    def measure(key: Key, state: NfTraining, frozen: Frozen, batch: Batch) -> tuple[NfTraining, Metrics]:
        del key, frozen
        x, _ = seen(batch.x, lambda shape: jnp.full(shape, 0.5))
        return state._replace(moments=channels_update(state.moments, x, batch.valid)), {}

    def standardize(key: Key, state: NfTraining, frozen: Frozen) -> NfTraining:
        del key, frozen
        mean, deviation = channels(state.moments)
        params = state.trained.params | {"log_scale": -jnp.log(deviation), "shift": -mean / deviation}
        return state._replace(trained=state.trained._replace(params=params))

    def train(key: Key, state: NfTraining, frozen: Frozen, batch: Batch) -> tuple[NfTraining, Metrics]:
        del frozen
        x, log_det = seen(batch.x, lambda shape: jax.random.uniform(key, shape))
        x = zero_padding(x, batch.valid)
        trained, metrics = descend(
            optimizer, state.trained, lambda params: mean_of_valid(nats(params, x, log_det), batch.valid)
        )
        return state._replace(trained=trained), {"loss": bits(metrics["loss"], x)}

    def finish(key: Key, state: NfTraining, frozen: Frozen) -> NfFlow:
        del key, frozen
        return NfFlow(state.trained.params)

    def score(state: NfFlow, frozen: Frozen, x: PyTree) -> Scores:
        del frozen  # the noise is the same for all images
        x, log_det = seen(x, lambda shape: jax.random.uniform(jax.random.key(0), shape[1:]))
        return Scores(bits(nats(state.params, x, log_det), x), None)

    stages = (
        Stage("measure", measure, standardize),
        Stage("train", train, finish, epochs=epochs, batch_size=train_batch_size, shuffle=True),
    )
    return Method(pixels if image else features(backbone, layers, pool=True), init, stages, score)
