"""DifferNet: the likelihood of pooled multi-scale features under a normalizing flow, averaged over rotations.

Stored: a flow of affine couplings on the feature vector of an image, which is the pooled output of the backbone at
full, half and quarter size; trained on rotated images so that it becomes a standard normal (Eq. 4). An image scores the
mean of z^2 over all its rotations and all entries (Eq. 6). The heat map, where asked for, is the gradient of the loss
with respect to the pixels of every rotation, turned back, smoothed, and its absolute value averaged (section 3.4),
squared as in the reference.

Paper: Same Same But DifferNet: Semi-Supervised Defect Detection with Normalizing Flows, WACV 2021, arXiv:2008.12577.
Reference: https://github.com/marco-rudolph/differnet
Differences: rotations are evenly spaced angles instead of random ones, so that their features are computed once; a
    training step draws some of them for each image. They are bilinear, not of the nearest pixel. Epochs are counted
    plainly, the last one counts, and a last batch that is not full is left out; biases begin as zeros.
Results: experiments/recipes/differnet.py
"""

import functools
from typing import Any, NamedTuple

import distrax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxad.backbones import backbone as architecture
from jaxad.backbones import features
from jaxad.base import Batch, EmbedFn, Frozen, Key, Method, Metrics, PyTree, Scores, Stage
from jaxad.bijectors import GlowNetworks, Permutation, Scan, glow_coupling
from jaxad.nn.initial import torch_uniform
from jaxad.ops.heatmap import blur_matrix
from jaxad.ops.loops import each
from jaxad.training.checks import above_zero, at_least_one, zero_or_more
from jaxad.training.gradient import Trained, begin, descend, mean_of_valid, torch_adam, zero_padding

SCALES = 3


class DiffernetTraining(NamedTuple):
    """The flow while it is trained."""

    trained: Trained
    permutations: Int[Array, "k c"]


class DiffernetFlow(NamedTuple):
    """The fitted flow."""

    params: PyTree
    permutations: Int[Array, "k c"]


class Embedded(NamedTuple):
    """An image to the flow."""

    feature: Float[Array, "b t c"]
    """Of every rotation."""
    image: Array | None
    """For heat maps."""


class Subnet(nn.Module):
    """Three hidden layers of one width."""

    hidden: int
    out: int

    @nn.compact
    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n d"]:
        """Raw log scales and shifts."""
        for _ in range(3):
            x = nn.relu(nn.Dense(self.hidden, kernel_init=torch_uniform)(x))
        return nn.Dense(self.out, kernel_init=torch_uniform)(x)


def floats(image: Array) -> Float[Array, "b h w c"]:
    """Pixels in 0..1."""
    return image.astype(jnp.float32) / 255 if image.dtype == jnp.uint8 else image


def rotate(image: Float[Array, "b h w c"], degrees: Float[Array, ""]) -> Float[Array, "b h w c"]:
    """Turned counterclockwise about the center, bilinear, black where nothing was."""
    b, h, w, c = image.shape
    angle = jnp.deg2rad(degrees)
    y, x = jnp.meshgrid(jnp.arange(float(h)) - (h - 1) / 2, jnp.arange(float(w)) - (w - 1) / 2, indexing="ij")
    source_y = jnp.cos(angle) * y + jnp.sin(angle) * x + (h - 1) / 2
    source_x = jnp.cos(angle) * x - jnp.sin(angle) * y + (w - 1) / 2
    flat = jnp.moveaxis(image, -1, 1).reshape(b * c, h, w)
    look = lambda one: jax.scipy.ndimage.map_coordinates(one, [source_y, source_x], 1)  # noqa: E731
    return jnp.moveaxis(jax.vmap(look)(flat).reshape(b, c, h, w), 1, -1)


def angles(n: int) -> list[float]:
    """Evenly spaced, in degrees, from 0 on."""
    return [360 * i / n for i in range(n)]


@functools.lru_cache
def describe(backbone: str, layer: str) -> EmbedFn:
    """The pooled features of a stage for an image at full, half and quarter size, side by side."""
    pooled = features(backbone, (layer,), pool=True)

    def embed(frozen: Frozen, image: Array) -> Float[Array, "b c"]:
        return jnp.concatenate([pooled(frozen, image[:, :: 2**i, :: 2**i])[layer] for i in range(SCALES)], -1)

    return embed


@functools.lru_cache
def rotations_of(backbone: str, layer: str, n: int, keep_image: bool) -> EmbedFn:
    """The `embed` of all rotations of an image."""
    one = describe(backbone, layer)

    def embed(frozen: Frozen, image: Array) -> Embedded:
        found = jax.lax.map(lambda degrees: one(frozen, rotate(floats(image), degrees)), jnp.asarray(angles(n)))
        return Embedded(jnp.moveaxis(found, 0, 1), image if keep_image else None)

    return embed


def differnet(
    *,
    backbone: str = "wide_resnet50_2",
    layer: str | None = None,
    image_size: tuple[int, int] = (448, 448),
    coupling_blocks: int = 8,
    hidden: int = 2048,
    clamp: float = 3.0,
    rotations: int = 64,
    train_rotations: int = 4,
    localize: bool = False,
    epochs: int = 192,
    train_batch_size: int = 24,
    learning_rate: float = 2e-4,
    weight_decay: float = 1e-5,
    sigma: float = 3.0,
) -> Method:
    """DifferNet.

    Args:
        backbone: The network that describes images (the paper's is an AlexNet).
        layer: Its stage; None for the deepest.
        image_size: (height, width) of the images, which is that of the heat map.
        coupling_blocks: Couplings of the flow.
        hidden: Width of their networks.
        clamp: Bound of the couplings' log scales.
        rotations: Of an image, whose scores are averaged.
        train_rotations: So many of them, drawn anew, in every step of training.
        localize: Make heat maps, which takes a pass through the backbone and back for every rotation.
        epochs: Passes over the training images.
        train_batch_size: Images of a step.
        learning_rate: Of Adam.
        weight_decay: Of Adam, added to the gradient.
        sigma: Smoothing of the gradients in pixels.

    Raises:
        ValueError: A hyper-parameter is out of its range.
    """
    at_least_one(
        coupling_blocks=coupling_blocks,
        hidden=hidden,
        rotations=rotations,
        epochs=epochs,
        train_batch_size=train_batch_size,
    )
    if not 1 <= train_rotations <= rotations:
        raise ValueError(f"train_rotations must be within 1..{rotations} (rotations), got {train_rotations}")
    above_zero(clamp=clamp, learning_rate=learning_rate)
    zero_or_more(weight_decay=weight_decay, sigma=sigma)
    layer = architecture(backbone).stages[-1] if layer is None else layer
    optimizer = torch_adam(learning_rate, weight_decay, b1=0.8, b2=0.8, eps=1e-4)

    subnet = functools.partial(Subnet, hidden)

    def init(key: Key, frozen: Frozen, spec: PyTree) -> DiffernetTraining:
        del frozen
        c = spec.feature.shape[-1]

        def one(key: Key) -> tuple[tuple, Int[Array, "c"]]:
            *own, mix = jax.random.split(key, 3)
            params = GlowNetworks(subnet, c).init(own, lambda n: jnp.zeros((1, n)))
            return params, jax.random.permutation(mix, c)

        params, permutations = jax.vmap(one)(jax.random.split(key, coupling_blocks))
        return DiffernetTraining(begin(optimizer, params), permutations)

    def latent(params: PyTree, permutations: Int[Array, "k c"], x: Float[Array, "*n c"]) -> tuple[Any, Any]:
        c = x.shape[-1]

        def block(given: tuple) -> distrax.Bijector:
            own, index = given
            both = GlowNetworks(subnet, c).conditioners(own)
            coupled = glow_coupling(both, c, clamp=clamp, kind="atan", event_ndims=1)
            return distrax.Chain([coupled, Permutation(index, 1)])

        return Scan(block, (params, permutations), 1).forward_and_log_det(x)

    def negative_log_likelihood(params: PyTree, permutations: Array, x: Float[Array, "*n c"]) -> Float[Array, "*n"]:
        """Per entry, up to a constant."""
        z, log_det = latent(params, permutations, x)
        return (0.5 * jnp.sum(z**2, -1) - log_det) / x.shape[-1]

    def train(key: Key, state: DiffernetTraining, frozen: Frozen, batch: Batch) -> tuple[DiffernetTraining, Metrics]:
        del frozen
        feature = zero_padding(batch.x.feature, batch.valid)
        order = jnp.argsort(jax.random.uniform(key, feature.shape[:2]), 1)[:, :train_rotations]
        x = jnp.take_along_axis(feature, order[..., None], 1)

        def loss(params: PyTree) -> Float[Array, ""]:
            return mean_of_valid(negative_log_likelihood(params, state.permutations, x).mean(1), batch.valid)

        trained, metrics = descend(optimizer, state.trained, loss)
        return state._replace(trained=trained), metrics

    def finish(key: Key, state: DiffernetTraining, frozen: Frozen) -> DiffernetFlow:
        del key, frozen
        return DiffernetFlow(state.trained.params, state.permutations)

    def gradient_map(state: DiffernetFlow, frozen: Frozen, image: Array) -> Float[Array, "b h w"]:
        smooth = [jnp.asarray(blur_matrix(n, sigma), jnp.float32) for n in image_size]

        def loss(turned: Array) -> Float[Array, ""]:
            return negative_log_likelihood(*state, describe(backbone, layer)(frozen, turned)).sum()

        def turned(degrees: Float[Array, ""]) -> Array:
            back = rotate(jax.grad(loss)(rotate(floats(image), degrees)), -degrees)
            return jnp.abs(jnp.einsum("Hh,bhwc,Ww->bHWc", smooth[0], back, smooth[1]))

        return jnp.mean(each(turned, jnp.asarray(angles(rotations))), (0, -1)) ** 2

    def score(state: DiffernetFlow, frozen: Frozen, x: Embedded) -> Scores:
        z, _ = latent(state.params, state.permutations, x.feature)
        pixel = None if x.image is None else gradient_map(state, frozen, x.image)
        return Scores(jnp.mean(z**2, (1, 2)), pixel)

    stage = Stage("train", train, finish, epochs=epochs, batch_size=train_batch_size, shuffle=True)
    return Method(rotations_of(backbone, layer, rotations, localize), init, (stage,), score)
