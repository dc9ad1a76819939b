"""PaDiM: one Gaussian per image position over features of several stages.

Stored: for every position of the layer1 grid the mean and the Cholesky factor of the covariance (plus epsilon I) of a
fixed random subset of the stacked channels (Eq. 1). A position scores its Mahalanobis distance (Eq. 2), an image the
maximum of the smoothed heat map. The moments are merged batch by batch, so memory does not depend on the number of
images.

Family: features
Paper: PaDiM: a Patch Distribution Modeling Framework for Anomaly Detection and Localization, ICPR Workshops 2021,
    arXiv:2011.08785.
Reference: none official; https://github.com/xiahaifeng1995/PaDiM-Anomaly-Detection-Localization-master.
Differences: epsilon is at least 1e-5 of the mean variance, so that float32 can factor the covariances of very large
    features; scores are not scaled to their range over the test images. Deeper stages are upsampled to the layer1 grid
    by repetition, as in the reference. The draw of channels matters more than any of this: on 100 training and 100 test
    images of MTD, six draws of 550 of a ResNet-50's channels give image AUROCs from 0.830 to 0.862 and pixel AUROCs
    from 0.765 to 0.780.
Results: experiments/recipes/padim.py
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxad.backbones import Backbone, features
from jaxad.backbones import backbone as architecture
from jaxad.base import Batch, Frozen, Ignored, Key, Method, PyTree, Scores, Stage
from jaxad.ops.gaussian import Moments, mahalanobis, moments_init, moments_update
from jaxad.ops.heatmap import counted, stack_maps, upsample_blur


class PadimMoments(NamedTuple):
    """Running moments of every position."""

    channels: Int[Array, "d"]
    moments: Moments


class PadimGaussian(NamedTuple):
    """A Gaussian for every position of the grid, over the drawn channels."""

    channels: Int[Array, "d"]
    mean: Float[Array, "p d"]
    factor: Float[Array, "p d d"]
    """Lower Cholesky factors of the covariances."""


def padim(
    *,
    backbone: str | Backbone = "wide_resnet50_2",
    layers: tuple[str, ...] | None = None,
    image_size: tuple[int, int] = (224, 224),
    n_features: int | Literal["all"] | None = None,
    epsilon: float = 0.01,
    sigma: float = 4.0,
) -> Method:
    """PaDiM.

    Args:
        backbone: The network that describes positions.
        layers: Its stages, the finest first; None for its pyramid (layer1 to layer3 of a ResNet).
        image_size: (height, width) of the images and the heat maps.
        n_features: Number of channels drawn at random, or "all"; None for the paper's number: 100 for small networks
            (up to 1,024 channels, such as ResNet-18), else 550.
        epsilon: Added to the diagonal of the covariances.
        sigma: Smoothing of the heat map in pixels.

    Raises:
        ValueError: A hyperparameter is out of range.
    """
    if n_features not in ("all", None) and not (isinstance(n_features, int) and n_features >= 1):
        raise ValueError(f'n_features must be 1 or more, or "all", got {n_features}')
    if not epsilon > 0:
        raise ValueError(f"epsilon must be above 0, got {epsilon}")

    layers = architecture(backbone).pyramid_layers if layers is None else tuple(layers)

    def stack(x: dict[str, Array]) -> Float[Array, "b h w c"]:
        return stack_maps([x[layer] for layer in layers], "nearest")

    def select(channels: Int[Array, "d"], x: dict[str, Array]) -> Float[Array, "b p d"]:
        stacked = stack(x)
        return stacked.reshape(stacked.shape[0], -1, stacked.shape[-1])[..., channels]

    def init(key: Key, state: None, frozen: Frozen, spec: PyTree) -> PadimMoments:
        del state, frozen
        _, h, w, c = jax.eval_shape(stack, spec).shape
        d = {"all": c, None: 100 if c <= 1024 else 550}.get(n_features, n_features)
        if d > c:
            raise ValueError(f"n_features must be at most {c} (the number of channels of all layers), got {d}")
        channels = jnp.sort(jax.random.permutation(key, c)[:d])
        return PadimMoments(channels, moments_init((h * w, d)))

    def update(key: Key, state: PadimMoments, frozen: Frozen, batch: Batch) -> tuple[PadimMoments, dict]:
        del key, frozen
        return state._replace(moments=moments_update(state.moments, select(state.channels, batch.x), batch.valid)), {}

    def factorize(key: Key, state: PadimMoments, frozen: Frozen) -> PadimGaussian:
        del key, frozen
        count, mean, scatter = state.moments
        covariance = scatter / jnp.maximum(count - 1, 1)
        variance = jnp.trace(covariance, axis1=-2, axis2=-1)[:, None, None] / mean.shape[-1]
        ridge = jnp.maximum(epsilon, 1e-5 * variance)  # above the rounding of float32 for very large features, too
        covariance = covariance + ridge * jnp.eye(mean.shape[-1])
        return PadimGaussian(state.channels, mean, jnp.linalg.cholesky(covariance, symmetrize_input=False))

    def score(state: PadimGaussian, frozen: Frozen, x: dict[str, Array], ignore: Ignored = None) -> Scores:
        del frozen
        h, w = x[layers[0]].shape[1:3]
        distance = mahalanobis(select(state.channels, x), state.mean, state.factor)
        pixel = upsample_blur(distance.reshape(-1, h, w), image_size, sigma)
        return Scores(counted(pixel, ignore).max((1, 2)), pixel)

    return Method(features(backbone, layers), (Stage("collect", init, update, factorize),), score)
