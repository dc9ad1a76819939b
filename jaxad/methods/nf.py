"""NF: the likelihood of an image, or of its embedding, under a normalizing flow, and why that of pixels misleads.

Stored: a RealNVP or Glow that maps training images to a standard normal; its input is pixels (dequantized by noise, as
logits) or the pooled features of a backbone. An image scores its negative log-likelihood in bits per dimension. Flows
on pixels learn the correlations between neighboring pixels that all images share, so that simple out-of-distribution
images score as more normal than the training images; couplings whose masks hide all neighbors ("cycle", "horizontal")
are the remedy for pixels, and embeddings are the better one (sections 4-6).

Family: flows
Paper: Why Normalizing Flows Fail to Detect Out-of-Distribution Data, NeurIPS 2020, arXiv:2006.08545. Flows: RealNVP,
    arXiv:1605.08803; Glow, arXiv:1807.03039.
Reference: https://github.com/PolinaKirichenko/flows_ood
Differences: networks have no batch norm (the reference's option), their last layer starts at zero, and highway networks
    are not there; instead of batch norm, channels are standardized once, before the flow (since networks start at zero
    and 1x1 convolutions start as permutations, not as random rotations, Glow's data-dependent initialization of all its
    ActNorms amounts to the same). The masks "horizontal" and "cycle" come with dilated convolutions, which see half an
    image with fewer blocks. 1x1 convolutions are products of triangular factors. Adam for Glow, too. Bits per dimension
    are those of 256 levels (the reference's are 0.0056 higher, from a scale of 255, and those of embeddings 8 higher).
    An incomplete last batch is dropped.
Results: experiments/recipes/nf.py, and experiments/studies/nf_ood.py for the paper's own question.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float, UInt8

from jaxad.backbones import Backbone, features
from jaxad.backbones import backbone as architecture
from jaxad.base import Batch, Frozen, Key, Method, Metrics, PyTree, Scores, Stage, State
from jaxad.bijectors import (
    ActNorm,
    Invertible1x1,
    LuFactors,
    MultiScale,
    Permutation,
    Scan,
    Squeeze,
    checkerboard_mask,
    half_coupling,
    half_mask,
    lu_identity,
    lu_matrix,
    masked_coupling,
    quadrant_mask,
)
from jaxad.nn.initial import torch_bias, torch_uniform
from jaxad.nn.weight_norm import WeightNormConv
from jaxad.ops.gaussian import Moments, channels, channels_update, moments_init
from jaxad.ops.image import pixels
from jaxad.training import gradient_stage
from jaxad.training.checks import above_zero, at_least_one, zero_or_more
from jaxad.training.optimizers import torch_adam

Mask = Literal["checkerboard", "horizontal", "cycle"]
MARGIN = 0.05
"""Pixels are moved this far away from black and white before their logits are taken."""
COUPLINGS_PER_MASK = 3
"""Couplings with masks of pixels, and then of halves of the channels, at every scale but the last (RealNVP)."""
LARGEST_NORM = 100.0
"""Of the gradient."""
LENGTHS = ("length", "bound")
"""The parameters of couplings of pixels that decay (RealNVP)."""


class NfFlow(NamedTuple):
    """The flow, with the standardization of channels before it."""

    params: PyTree


class GlowStep(NamedTuple):
    """The parameters of a step of Glow."""

    log_scale: Float[Array, "*n c"]
    shift: Float[Array, "*n c"]
    conv1x1: LuFactors
    network: PyTree


class Couplings(NamedTuple):
    """Consecutive couplings of a flow."""

    init: Callable[[Key], PyTree]
    """Their parameters."""
    bijector: Callable[[PyTree], distrax.Bijector]


class ResNet(nn.Module):
    """Residual blocks of 3x3 convolutions, whose outputs are summed after a 1x1 convolution each."""

    hidden: int
    blocks: int
    dilated: bool = False
    """Whether the convolutions of block i have a dilation of 2^i."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
        """Twice as many channels; zero before training."""
        conv, channels = functools.partial(WeightNormConv, self.hidden), 2 * x.shape[-1]
        x = conv()(nn.relu(jnp.concatenate([x, -x], -1)))
        total = conv(kernel=1)(x)
        for i in range(self.blocks):
            dilation = 2**i if self.dilated else 1
            y = conv(dilation=dilation, bias=False)(nn.relu(x))
            x = x + conv(dilation=dilation)(nn.relu(y))
            total = total + conv(kernel=1)(x)
        return WeightNormConv(channels, kernel=1, zero=True)(nn.relu(total))


class Mlp(nn.Module):
    """Fully connected layers."""

    hidden: int
    blocks: int

    @nn.compact
    def __call__(self, x: Float[Array, "b c"]) -> Float[Array, "b c2"]:
        """Twice as many numbers; zero before training."""
        out = 2 * x.shape[-1]
        for _ in range(1 + self.blocks):
            dense = nn.Dense(self.hidden, kernel_init=torch_uniform, bias_init=torch_bias(x.shape[-1]))
            x = nn.relu(dense(x))
        return nn.Dense(out, kernel_init=nn.initializers.zeros)(x)


class Bounded(nn.Module):
    """A network whose log scales are bounded by learned numbers."""

    network: nn.Module

    @nn.compact
    def __call__(self, x: Float[Array, "*s c"]) -> Float[Array, "*s c2"]:
        """Log scales and shifts."""
        log_scale, shift = jnp.split(self.network(x), 2, -1)
        bound = self.param("bound", nn.initializers.ones, x.shape[-1:])
        return jnp.concatenate([bound * jnp.tanh(log_scale), shift], -1)


def dequantize(
    image: UInt8[Array, "b h w c"], noise: Float[Array, "*b h w c"]
) -> tuple[Float[Array, "b h w c"], Float[Array, "b"]]:
    """Logits of pixels plus noise in [0, 1), and the log-determinant with respect to pixels in 0..255.

    Source: RealNVP, arXiv:1605.08803, section 4.1.
    """
    inside = MARGIN + (1 - 2 * MARGIN) * (image.astype(jnp.float32) + noise) / 256
    low, high = jnp.log(inside), jnp.log1p(-inside)
    return low - high, jnp.sum(math.log((1 - 2 * MARGIN) / 256) - low - high, (1, 2, 3))


def standardize(log_scale: Float[Array, "c"], shift: Float[Array, "c"], event_ndims: int) -> ActNorm:
    """exp(log scale) * (x + shift) on the channels."""
    return ActNorm(log_scale, shift * jnp.exp(log_scale), event_ndims)


def spatial_masks(kind: Mask, n: int, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """For n couplings in turn, the entries that stay unchanged, and those of them that are input to the network."""
    if kind == "checkerboard":
        unchanged = np.stack([checkerboard_mask(*shape, odd=i % 2 == 0) for i in range(n)])
        return unchanged, unchanged
    if kind == "horizontal":
        unchanged = np.stack([half_mask(*shape, lower=i % 2 == 1) for i in range(n)])
        return unchanged, unchanged
    quadrants = np.stack([quadrant_mask(*shape, i) for i in range(n + 1)])
    return ~quadrants[1:], quadrants[:-1]


def nf(
    *,
    backbone: str | Backbone = "wide_resnet50_2",
    layers: tuple[str, ...] | None = None,
    on: Literal["embedding", "pixels"] = "embedding",
    flow: Literal["realnvp", "glow"] = "realnvp",
    mask: Mask = "checkerboard",
    scales: int = 3,
    couplings: int = 8,
    hidden: int = 256,
    blocks: int = 2,
    epochs: int = 100,
    train_batch_size: int = 32,
    learning_rate: float = 1e-4,
    weight_decay: float = 5e-5,
) -> Method:
    """NF.

    Args:
        backbone: The network whose features are embeddings; not used on pixels.
        layers: Its stages, pooled and concatenated; None for the deepest.
        on: The input of the flow. With "pixels", height and width must be multiples of 2^scales.
        flow: Its kind; "glow" for pixels only.
        mask: Of RealNVP's couplings of pixels. The published RealNVP is "checkerboard" with 3 scales and 4 couplings;
            the remedies "horizontal" and "cycle" have 1 scale, and 8 couplings in the paper.
        scales: Of a flow on pixels.
        couplings: Of an embedding, or of pixels at the last scale (RealNVP; 3 and 3 at the scales before), or at each
            scale (Glow).
        hidden: Width of the couplings' networks (RealNVP: at the finest scale, doubled whenever the resolution is
            halved).
        blocks: Residual blocks of each network; on embeddings, hidden layers after the first. With the masks
            "horizontal" and "cycle" block i has a dilation of 2^i, and there must be enough blocks for the receptive
            field to reach across half the image.
        epochs: Passes over the training images.
        train_batch_size: Images per step.
        learning_rate: Of Adam.
        weight_decay: Of Adam, added to the gradient; for a RealNVP on pixels, to that of the lengths of its kernels
            and the bounds of its log scales only.

    Raises:
        ValueError: A hyperparameter is out of its range.
    """
    at_least_one(
        scales=scales,
        couplings=couplings,
        hidden=hidden,
        blocks=blocks,
        epochs=epochs,
        train_batch_size=train_batch_size,
    )
    above_zero(learning_rate=learning_rate)
    zero_or_more(weight_decay=weight_decay)
    for name, value, known in (
        ("on", on, ("embedding", "pixels")),
        ("flow", flow, ("realnvp", "glow")),
        ("mask", mask, ("checkerboard", "horizontal", "cycle")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value}")
    if on == "embedding" and flow == "glow":
        raise ValueError("a flow on embeddings must be a realnvp, got glow")
    remedy = mask != "checkerboard"
    if remedy and (on, flow, scales) != ("pixels", "realnvp", 1):
        raise ValueError(
            f"the mask {mask} needs a realnvp on pixels with scales of 1, got {flow} on {on} with scales of {scales}"
        )
    image = on == "pixels"
    if layers is None:
        layers = () if image else architecture(backbone).stages[-1:]
    layers = tuple(layers)

    def network(width: int) -> Bounded:
        return Bounded(ResNet(width, blocks, remedy) if image else Mlp(width, blocks))

    def stacked(init: Callable[[Key], PyTree], key: Key, n: int) -> PyTree:
        return jax.vmap(init)(jax.random.split(key, n))

    def masked_couplings(masks: tuple[np.ndarray, np.ndarray], width: int) -> Couplings:
        net, (unchanged, inputs) = network(width), (jnp.asarray(m) for m in masks)

        def init(key: Key) -> PyTree:
            return stacked(lambda k: net.init(k, jnp.zeros((1, *unchanged.shape[1:]))), key, len(unchanged))

        def block(arrays: tuple) -> distrax.Bijector:
            params, unchanged, inputs = arrays
            return masked_coupling(unchanged, lambda x: net.apply(params, jnp.where(inputs, x, 0)))

        return Couplings(init, lambda params: Scan(block, (params, unchanged, inputs), unchanged.ndim - 1))

    def half_couplings(width: int, shape: tuple[int, ...]) -> list[Couplings | distrax.Bijector]:
        """Of the first half of the channels, the second, the first again."""
        net, c = network(width), shape[-1]
        swap = Permutation(jnp.roll(jnp.arange(c), c // 2), 3)

        def init(key: Key) -> PyTree:
            return stacked(lambda k: net.init(k, jnp.zeros((1, *shape[:2], c // 2))), key, COUPLINGS_PER_MASK)

        def block(params: PyTree) -> distrax.Bijector:
            return distrax.Chain([swap, half_coupling(lambda x: net.apply(params, x), c)])

        return [Couplings(init, lambda params: Scan(block, params, 3)), swap]

    def glow_steps(width: int, shape: tuple[int, ...]) -> Couplings:
        net, c = network(width), shape[-1]
        orders = jnp.asarray(np.random.default_rng(0).permuted(np.tile(np.arange(c), (couplings, 1)), axis=1))

        def init_step(key: Key) -> GlowStep:
            example = jnp.zeros((1, *shape[:2], c // 2))
            return GlowStep(jnp.zeros(c), jnp.zeros(c), lu_identity(c), net.init(key, example))

        def block(arrays: tuple) -> distrax.Bijector:
            step, order = arrays
            matrix, log_det = lu_matrix(step.conv1x1, order)
            affine = half_coupling(lambda x: net.apply(step.network, x), c)
            conv1x1 = Invertible1x1(matrix, 3, log_det=log_det)
            return distrax.Chain([affine, conv1x1, standardize(step.log_scale, step.shift, 3)])

        return Couplings(lambda key: stacked(init_step, key, couplings), lambda steps: Scan(block, (steps, orders), 3))

    def flow_levels(shape: Any) -> list[list[Couplings | distrax.Bijector]]:
        """The layers of every scale, in order."""
        if not image:
            first = np.arange(shape[-1]) < shape[-1] // 2
            unchanged = np.stack([first != (i % 2 == 1) for i in range(couplings)])
            return [[masked_couplings((unchanged, unchanged), hidden)]]
        (h, w, c), width, levels = shape, hidden, []
        for scale in range(scales):
            last = scale == scales - 1
            squeezed = h // 2, w // 2, 4 * c
            if flow == "glow":
                levels.append([Squeeze(), glow_steps(width, squeezed)])
            else:
                masks = spatial_masks(mask, couplings if last else COUPLINGS_PER_MASK, (h, w, c))
                levels.append([masked_couplings(masks, width)])
                if not last:
                    width *= 2
                    levels[-1] += [Squeeze(), *half_couplings(width, squeezed)]
            h, w, c = *squeezed[:2], squeezed[2] // 2
        return levels

    def flatten(x: PyTree) -> Array:
        return x if image else jnp.concatenate([x[layer] for layer in layers], -1)

    def event_shape(spec: PyTree) -> tuple[int, ...]:
        return jax.eval_shape(flatten, spec).shape[1:]

    def bijector(params: PyTree, shape: Any) -> distrax.Bijector:
        learned, levels = iter(params["flow"]), []
        for level in flow_levels(shape):
            chain = [part.bijector(next(learned)) if isinstance(part, Couplings) else part for part in level]
            levels.append(distrax.Chain(chain[::-1]))
        flow = MultiScale(levels, shape) if image else levels[0]
        return distrax.Chain([flow, standardize(params["log_scale"], params["shift"], len(shape))])

    def nats(params: PyTree, x: Array, log_det: Array) -> Float[Array, "b"]:
        """Negative log-likelihoods; `log_det` is that of the dequantization."""
        z, flow_log_det = bijector(params, x.shape[1:]).forward_and_log_det(x)
        return 0.5 * jnp.sum(z**2, -1) + 0.5 * math.prod(x.shape[1:]) * math.log(2 * math.pi) - flow_log_det - log_det

    def bits_per_dimension(nats: Array, x: Array) -> Array:
        return nats / (math.prod(x.shape[1:]) * math.log(2))

    def flow_input(x: PyTree, noise: Callable[[tuple[int, ...]], Array]) -> tuple[Array, Array]:
        """The input of the flow, and the log-determinant of its dequantization."""
        x = flatten(x)
        return dequantize(x, noise(x.shape)) if image else (x, jnp.zeros(x.shape[0]))

    def init_moments(key: Key, state: State, frozen: Frozen, spec: PyTree) -> Moments:
        del key, state, frozen
        shape = event_shape(spec)
        if image and (shape[0] % 2**scales or shape[1] % 2**scales):
            raise ValueError(
                f"height and width must be multiples of {2**scales} (2^scales), got {shape[0]} x {shape[1]}"
            )
        if remedy and 2 ** (blocks + 1) <= max(shape[:2]) / 2:
            raise ValueError(
                f"blocks must be enough to see half an image of {shape[0]} x {shape[1]}, got {blocks}, which see "
                f"{2 ** (blocks + 1) - 1} pixels in each direction"
            )
        return moments_init((shape[-1], 1))

    def measure(key: Key, moments: Moments, frozen: Frozen, batch: Batch) -> tuple[Moments, Metrics]:
        del key, frozen
        x, _ = flow_input(batch.x, lambda shape: jnp.full(shape, 0.5))
        return channels_update(moments, x, batch.valid), {}

    def init(key: Key, moments: Moments, frozen: Frozen, spec: PyTree) -> NfFlow:
        """Draws the flow; the channels are standardized by their moments."""
        del frozen
        parts = [part for level in flow_levels(event_shape(spec)) for part in level if isinstance(part, Couplings)]
        flow_params = [part.init(k) for part, k in zip(parts, jax.random.split(key, len(parts)), strict=True)]
        mean, deviation = channels(moments)
        return NfFlow({"log_scale": -jnp.log(deviation), "shift": -mean, "flow": flow_params})

    def loss(params: PyTree, model: NfFlow, key: Key, frozen: Frozen, batch: Batch) -> tuple[Array, dict]:
        del model, frozen
        x, log_det = flow_input(batch.x, lambda shape: jax.random.uniform(key, shape))
        value = nats(params, x, log_det).mean()
        return value, {"metrics": {"loss": bits_per_dimension(value, x)}}

    def score(state: NfFlow, frozen: Frozen, x: PyTree) -> Scores:
        del frozen
        # all images get the same noise
        x, log_det = flow_input(x, lambda shape: jax.random.uniform(jax.random.key(0), shape[1:]))
        return Scores(bits_per_dimension(nats(state.params, x, log_det), x), None)

    def group(path: Any, leaf: Any) -> str:
        return "lengths" if jax.tree_util.keystr(path[-1:], simple=True) in LENGTHS else "others"

    clip = optax.clip_by_global_norm(LARGEST_NORM)
    if image and flow == "realnvp":
        decay = optax.chain(clip, optax.add_decayed_weights(weight_decay))
        groups: Any = {"lengths": decay, "others": clip}
        labels = functools.partial(jax.tree_util.tree_map_with_path, group)
        optimizer = optax.chain(optax.partition(groups, labels), torch_adam(learning_rate))
    else:
        optimizer = optax.chain(clip, torch_adam(learning_rate, weight_decay))
    stages = (
        Stage("measure", init_moments, measure),
        gradient_stage("train", init, loss, optimizer, epochs=epochs, batch_size=train_batch_size),
    )
    embed = pixels if image else features(backbone, layers, pool=True)
    return Method(embed, stages, score, pretrained=not image)
