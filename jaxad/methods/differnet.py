"""DifferNet: the likelihood of pooled multi-scale features under a normalizing flow, averaged over rotations.

Stored: a flow of affine couplings on the feature vector of an image, which is the pooled output of the backbone at
full, half and quarter size; trained to map the vectors of rotated normal images to a standard normal (Eq. 4). An image
scores the mean of z^2 over all its rotations and all entries (Eq. 6). The heat map, if requested, is the gradient of
the loss of all rotations with respect to the normalized pixels of every one, rotated back and smoothed; its absolute
value is averaged over rotations and channels (section 3.4) and squared as in the reference.

Family: flows
Paper: Same Same But DifferNet: Semi-Supervised Defect Detection with Normalizing Flows, WACV 2021, arXiv:2008.12577.
Reference: https://github.com/marco-rudolph/differnet
Differences: the default backbone is not an AlexNet. Rotations are by evenly spaced angles, not random ones, so that
    their features are computed once; a training step draws some of them for each image. Rotation is bilinear, not by
    the nearest pixel (0.68 mean image AUROC either way, three short trainings on a class of the demo data), and for
    gradients not by cubic splines (heat maps change by 3% of their largest value). Latents are not cut off at 1e6.
    Epochs are plain passes over the images, the last one is kept, and an incomplete last batch is dropped.
Results: experiments/recipes/differnet.py
"""

import functools
from typing import Any, NamedTuple

import distrax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxad.backbones import Backbone, features
from jaxad.backbones import backbone as architecture
from jaxad.base import Batch, EmbedFn, Frozen, Key, Method, PyTree, Scores, State
from jaxad.bijectors import GlowNetworks, Permutation, Scan, glow_coupling
from jaxad.nn.initial import torch_bias, torch_uniform
from jaxad.ops.heatmap import blur_matrix
from jaxad.ops.loops import map_rows
from jaxad.training import gradient_stage
from jaxad.training.checks import above_zero, at_least_one, zero_or_more
from jaxad.training.optimizers import torch_adam

SCALES = 3


class DiffernetFlow(NamedTuple):
    """The flow."""

    params: PyTree
    """Stacked over the blocks, as the permutations are."""
    permutations: Int[Array, "k c"]


class RotatedFeatures(NamedTuple):
    """The embedded image."""

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
        """Unbounded log scales and shifts."""

        def dense(x: Array, out: int) -> Array:
            return nn.Dense(out, kernel_init=torch_uniform, bias_init=torch_bias(x.shape[-1]))(x)

        for _ in range(3):
            x = nn.relu(dense(x, self.hidden))
        return dense(x, self.out)


def as_floats(image: Array) -> Float[Array, "b h w c"]:
    """Pixels in [0, 1]."""
    return image.astype(jnp.float32) / 255 if image.dtype == jnp.uint8 else image


def rotate(image: Float[Array, "b h w c"], degrees: Float[Array, ""]) -> Float[Array, "b h w c"]:
    """Rotates counterclockwise about the center, bilinearly; what lies outside the image is black."""
    b, h, w, c = image.shape
    angle = jnp.deg2rad(degrees)
    y, x = jnp.meshgrid(jnp.arange(float(h)) - (h - 1) / 2, jnp.arange(float(w)) - (w - 1) / 2, indexing="ij")
    source_y = jnp.cos(angle) * y + jnp.sin(angle) * x + (h - 1) / 2
    source_x = jnp.cos(angle) * x - jnp.sin(angle) * y + (w - 1) / 2
    planes = jnp.moveaxis(image, -1, 1).reshape(b * c, h, w)
    sample = lambda plane: jax.scipy.ndimage.map_coordinates(plane, [source_y, source_x], 1)  # noqa: E731
    return jnp.moveaxis(jax.vmap(sample)(planes).reshape(b, c, h, w), 1, -1)


def angles(n: int) -> list[float]:
    """Evenly spaced angles in degrees, starting at 0."""
    return [360 * i / n for i in range(n)]


@functools.lru_cache
def multi_scale_features(network: Backbone, layer: str) -> EmbedFn:
    """The pooled features of a stage for an image at full, half and quarter size, concatenated."""
    pooled = features(network, (layer,), pool=True)

    def embed(frozen: Frozen, image: Array) -> Float[Array, "b c"]:
        return jnp.concatenate([pooled(frozen, image[:, :: 2**i, :: 2**i])[layer] for i in range(SCALES)], -1)

    return embed


@functools.lru_cache
def features_of_rotations(network: Backbone, layer: str, n: int, keep_image: bool) -> EmbedFn:
    """The `embed` that gives the features of n rotations of an image."""
    extract = multi_scale_features(network, layer)

    def embed(frozen: Frozen, image: Array) -> RotatedFeatures:
        def one_rotation(degrees: Float[Array, ""]) -> Float[Array, "b c"]:
            return extract(frozen, rotate(as_floats(image), degrees))

        rotated = jax.lax.map(one_rotation, jnp.asarray(angles(n)))
        return RotatedFeatures(jnp.moveaxis(rotated, 0, 1), image if keep_image else None)

    return embed


def differnet(
    *,
    backbone: str | Backbone = "wide_resnet50_2",
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
        backbone: The network that extracts the features (the paper's is an AlexNet).
        layer: Its stage; None for the deepest.
        image_size: (height, width) of the images and of the heat map.
        coupling_blocks: Couplings of the flow.
        hidden: Width of their networks.
        clamp: Bound of the couplings' log scales.
        rotations: Number of rotations over which an image's score is averaged.
        train_rotations: Number of them that every training step draws for an image.
        localize: Make heat maps, which takes a forward and a backward pass of the backbone for every rotation.
        epochs: Passes over the training images.
        train_batch_size: Images per step.
        learning_rate: Of Adam.
        weight_decay: Of Adam, added to the gradient.
        sigma: Smoothing of the gradients in pixels.

    Raises:
        ValueError: A hyperparameter is out of its range.
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
    network = architecture(backbone)
    layer = network.stages[-1] if layer is None else layer
    subnet = functools.partial(Subnet, hidden)

    def init(key: Key, state: State, frozen: Frozen, spec: PyTree) -> DiffernetFlow:
        del state, frozen
        c = spec.feature.shape[-1]

        def init_block(key: Key) -> tuple[tuple, Int[Array, "c"]]:
            *subnet_keys, permutation_key = jax.random.split(key, 3)
            params = GlowNetworks(subnet, c).init(subnet_keys, lambda channels: jnp.zeros((1, channels)))
            return params, jax.random.permutation(permutation_key, c)

        return DiffernetFlow(*jax.vmap(init_block)(jax.random.split(key, coupling_blocks)))

    def latent(params: PyTree, permutations: Int[Array, "k c"], x: Float[Array, "*n c"]) -> tuple[Any, Any]:
        c = x.shape[-1]

        def block(arrays: tuple) -> distrax.Bijector:
            params, indices = arrays
            conditioners = GlowNetworks(subnet, c).conditioners(params)
            coupling = glow_coupling(conditioners, c, clamp=clamp, kind="atan", event_ndims=1)
            return distrax.Chain([coupling, Permutation(indices, 1)])

        return Scan(block, (params, permutations), 1).forward_and_log_det(x)

    def negative_log_likelihood(params: PyTree, permutations: Array, x: Float[Array, "*n c"]) -> Float[Array, "*n"]:
        """Per entry, up to a constant."""
        z, log_det = latent(params, permutations, x)
        return (0.5 * jnp.sum(z**2, -1) - log_det) / x.shape[-1]

    def loss(params: PyTree, model: DiffernetFlow, key: Key, frozen: Frozen, batch: Batch) -> tuple[Array, dict]:
        del frozen
        feature = batch.x.feature
        drawn = jnp.argsort(jax.random.uniform(key, feature.shape[:2]), 1)[:, :train_rotations]
        x = jnp.take_along_axis(feature, drawn[..., None], 1)
        return negative_log_likelihood(params, model.permutations, x).mean(), {}

    def gradient_map(state: DiffernetFlow, frozen: Frozen, image: Array) -> Float[Array, "b h w"]:
        blur = [jnp.asarray(blur_matrix(n, sigma), jnp.float32) for n in image_size]
        extract = multi_scale_features(network, layer)

        def total(rotated: Array) -> Float[Array, ""]:
            return negative_log_likelihood(state.params, state.permutations, extract(frozen, rotated)).sum()

        def one_rotation(degrees: Float[Array, ""]) -> Array:
            gradient = jax.grad(total)(rotate(as_floats(image), degrees)) * frozen["std"] / (255 * rotations)
            gradient = rotate(gradient, -degrees)
            return jnp.abs(jnp.einsum("Hh,bhwc,Ww->bHWc", blur[0], gradient, blur[1]))

        return jnp.mean(map_rows(one_rotation, jnp.asarray(angles(rotations))), (0, -1)) ** 2

    def score(state: DiffernetFlow, frozen: Frozen, x: RotatedFeatures) -> Scores:
        z, _ = latent(state.params, state.permutations, x.feature)
        pixel = None if x.image is None else gradient_map(state, frozen, x.image)
        return Scores(jnp.mean(z**2, (1, 2)), pixel)

    optimizer = torch_adam(learning_rate, weight_decay, b1=0.8, b2=0.8, eps=1e-4)
    stage = gradient_stage("train", init, loss, optimizer, epochs=epochs, batch_size=train_batch_size)
    return Method(features_of_rotations(network, layer, rotations, localize), (stage,), score)
