"""Skeleton: the distance of every patch to the mean normal patch. Copy this file to jaxad/methods/<name>.py.

Stored: the mean of all patch features of the normal images. A patch scores its Euclidean distance to it; the heat map
is the upsampled and smoothed patch scores, and an image scores the maximum of its heat map. (Give equation numbers.)

Family: features
Paper: none; a real method gives title, venue and link.
Reference: none; a real method links the official code, or names the reimplementation that it was compared with.
Differences: none. (List every deliberate deviation from the paper, with the reason.)
Results: none; a real method names its recipes, experiments/recipes/<name>.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxad.backbones import Backbone, features
from jaxad.base import Batch, Frozen, Ignored, Key, Method, Metrics, PyTree, Scores, Stage
from jaxad.ops.heatmap import counted, stack_maps, upsample_blur
from jaxad.training.checks import zero_or_more


class SkeletonSum(NamedTuple):
    """What is collected while images come in."""

    total: Float[Array, "c"]
    count: Float[Array, ""]


class SkeletonMean(NamedTuple):
    """What scoring needs, and all that is saved."""

    mean: Float[Array, "c"]


def skeleton(
    *,
    backbone: str | Backbone = "wide_resnet50_2",
    layers: tuple[str, ...] = ("layer2", "layer3"),
    image_size: tuple[int, int] = (224, 224),
    sigma: float = 4.0,
) -> Method:
    """Skeleton.

    Args:
        backbone: The network that extracts the features.
        layers: Its stages, the finest first.
        image_size: (height, width) of the images and of the heat map.
        sigma: Smoothing of the heat map in pixels.

    Raises:
        ValueError: A hyperparameter is out of its range.
    """
    zero_or_more(sigma=sigma)

    def patches(x: dict[str, Array]) -> Float[Array, "b h w c"]:
        return stack_maps([x[layer] for layer in layers])

    def init(key: Key, state: None, frozen: Frozen, spec: PyTree) -> SkeletonSum:
        del key, state, frozen  # all methods have the same signatures; what one does not need, it deletes
        channels = jax.eval_shape(patches, spec).shape[-1]
        return SkeletonSum(jnp.zeros(channels), jnp.zeros(()))

    def collect(key: Key, state: SkeletonSum, frozen: Frozen, batch: Batch) -> tuple[SkeletonSum, Metrics]:
        del key, frozen
        # This stage does not shuffle, so it sees padding, which may hold anything: mask it before any arithmetic, since
        # 0 * nan is nan.
        features = jnp.where(batch.valid[:, None, None, None], patches(batch.x), 0)
        count = jnp.sum(batch.valid).astype(jnp.float32) * (features.shape[1] * features.shape[2])
        return SkeletonSum(state.total + features.sum((0, 1, 2)), state.count + count), {}

    def average(key: Key, state: SkeletonSum, frozen: Frozen) -> SkeletonMean:
        del key, frozen
        return SkeletonMean(state.total / jnp.maximum(state.count, 1))

    def score(state: SkeletonMean, frozen: Frozen, x: dict[str, Array], ignore: Ignored = None) -> Scores:
        del frozen
        distance = jnp.linalg.norm(patches(x) - state.mean, axis=-1)
        pixel = upsample_blur(distance, image_size, sigma)
        return Scores(counted(pixel, ignore).max((1, 2)), pixel)

    return Method(features(backbone, layers), (Stage("collect", init, collect, average),), score)
