"""Skeleton: the distance of every patch to the mean normal patch. Copy this file to jaxad/methods/<name>.py.

Stored: the mean of all patch features of the normal images. A patch scores its Euclidean distance to it, the heat map
is the upsampled patch scores, smoothed, and an image scores the maximum of its heat map. (Here: numbers of equations.)

Paper: none; a real method gives title, venue and link.
Reference: none; a real method links the official code, or names the re-implementation that it was compared with.
Differences: none. (Here: every deliberate deviation from the paper, with the reason.)
Results: none; a real method names its recipe, experiments/recipes/<name>.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxad.backbones import features
from jaxad.base import Batch, Frozen, Key, Method, PyTree, Scores, Stage
from jaxad.ops.heatmap import stack_maps, upsample_blur


class SkeletonSum(NamedTuple):
    """What is learned while images come in."""

    total: Float[Array, "c"]
    count: Float[Array, ""]


class SkeletonMean(NamedTuple):
    """What scoring needs, and all that is saved."""

    mean: Float[Array, "c"]


def skeleton(
    *,
    backbone: str = "wide_resnet50_2",
    layers: tuple[str, ...] = ("layer2", "layer3"),
    image_size: tuple[int, int] = (224, 224),
    sigma: float = 4.0,
) -> Method:
    """Skeleton.

    Args:
        backbone: The network that describes patches.
        layers: Its stages, the finest first.
        image_size: (height, width) of the images, which is that of the heat map.
        sigma: Smoothing of the heat map in pixels.

    Raises:
        ValueError: A hyper-parameter is out of its range.
    """
    if not sigma >= 0:
        raise ValueError(f"sigma must be 0 or more pixels, got {sigma}")

    def describe(x: dict[str, Array]) -> Float[Array, "b h w c"]:
        return stack_maps([x[layer] for layer in layers])

    def init(key: Key, frozen: Frozen, spec: PyTree) -> SkeletonSum:
        del key, frozen  # all methods have the same signatures; what one does not need, it deletes
        channels = jax.eval_shape(describe, spec).shape[-1]
        return SkeletonSum(jnp.zeros(channels), jnp.zeros(()))

    def collect(key: Key, state: SkeletonSum, frozen: Frozen, batch: Batch) -> tuple[SkeletonSum, dict[str, Array]]:
        del key, frozen
        patches = describe(batch.x)
        # Padding is masked before any arithmetic: it may hold anything, and 0 * nan is nan.
        patches = jnp.where(batch.valid[:, None, None, None], patches, 0)
        count = jnp.sum(batch.valid).astype(jnp.float32) * (patches.shape[1] * patches.shape[2])
        return SkeletonSum(state.total + patches.sum((0, 1, 2)), state.count + count), {}

    def average(key: Key, state: SkeletonSum, frozen: Frozen) -> SkeletonMean:
        del key, frozen
        return SkeletonMean(state.total / jnp.maximum(state.count, 1))

    def score(state: SkeletonMean, frozen: Frozen, x: dict[str, Array]) -> Scores:
        del frozen
        distance = jnp.linalg.norm(describe(x) - state.mean, axis=-1)
        pixel = upsample_blur(distance, image_size, sigma)
        return Scores(pixel.max((1, 2)), pixel)

    return Method(features(backbone, layers), init, (Stage("collect", collect, average),), score)
