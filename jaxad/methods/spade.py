"""SPADE: nearest normal images, then nearest pixels in them.

Stored: the pooled features and the feature pyramids of all normal images. An image scores the mean squared distance of
its pooled feature to the K nearest normal ones (Eq. 1-2); a pixel the mean squared distance of its pyramid feature,
which stacks layer1 to layer3, to its kappa nearest among all pixels of those K images (Eq. 3 and section 3.4).

Paper: Sub-Image Anomaly Detection with Deep Pyramid Correspondences, 2020, arXiv:2005.02357.
Reference: none official; https://github.com/byungjae89/SPADE-pytorch (K = 5, plain distances, stages compared one by
    one).
Differences: the gallery is kept in half precision. The distance of two stacked features is the sum over stages of the
    distances on each stage's own grid, repeated to that of layer1; the stacked features never exist.
Results: experiments/recipes/spade.py
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxad.backbones import backbone as architecture
from jaxad.backbones import features
from jaxad.base import Batch, Frozen, Key, Method, PyTree, Scores, Stage
from jaxad.ops.correspondence import nearest_positions
from jaxad.ops.heatmap import upsample_blur
from jaxad.ops.knn import knn


class SpadeGallery(NamedTuple):
    """Every normal image, whole."""

    pooled: Float[Array, "n c"]
    maps: dict[str, Float[Array, "n h w _"]]
    seen: Bool[Array, "n"]


def spade(
    *,
    backbone: str = "wide_resnet50_2",
    layers: tuple[str, ...] | None = None,
    image_layer: str | None = None,
    image_size: tuple[int, int] = (224, 224),
    num_neighbors: int = 50,
    num_pixel_neighbors: int = 1,
    sigma: float = 4.0,
) -> Method:
    """SPADE.

    Args:
        backbone: The network that describes images and pixels.
        layers: Stages of the pyramid, the finest first; None for layer1 to layer3 of a ResNet and their like.
        image_layer: Stage whose average over positions describes the image; None for the deepest.
        image_size: (height, width) of the images, which is that of the heat map.
        num_neighbors: Normal images compared with (K); at most as many as there are.
        num_pixel_neighbors: Pixels of them compared with (kappa).
        sigma: Smoothing of the heat map in pixels.

    Raises:
        ValueError: A hyper-parameter is out of its range.
    """
    for name, value in (("num_neighbors", num_neighbors), ("num_pixel_neighbors", num_pixel_neighbors)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    network = architecture(backbone)
    layers = network.pyramid_layers if layers is None else tuple(layers)
    image_layer = image_layer or network.stages[-1]
    wanted = (*layers, *({image_layer} - set(layers)))

    def init(key: Key, frozen: Frozen, spec: PyTree) -> SpadeGallery:
        del key, frozen
        n, channels = spec[image_layer].shape[0], spec[image_layer].shape[-1]
        maps = {layer: jnp.zeros(spec[layer].shape, jnp.float16) for layer in layers}
        return SpadeGallery(jnp.zeros((n, channels)), maps, jnp.zeros(n, bool))

    def collect(key: Key, state: SpadeGallery, frozen: Frozen, batch: Batch) -> tuple[SpadeGallery, dict]:
        del key, frozen
        row = jnp.where(batch.valid, batch.index, state.seen.shape[0])
        pooled = state.pooled.at[row].set(batch.x[image_layer].mean((1, 2)), mode="drop")
        maps = {k: v.at[row].set(batch.x[k].astype(jnp.float16), mode="drop") for k, v in state.maps.items()}
        return SpadeGallery(pooled, maps, state.seen.at[row].set(True, mode="drop")), {}

    def score(state: SpadeGallery, frozen: Frozen, x: dict[str, Array]) -> Scores:
        del frozen
        neighbors = min(num_neighbors, state.seen.shape[0])
        distance, index = knn(x[image_layer].mean((1, 2)), state.pooled, neighbors, state.seen)
        found = jnp.isfinite(distance)
        image = jnp.where(found, distance**2, 0).sum(1) / found.sum(1).astype(jnp.float32)
        gallery, maps = (tuple(of[layer] for layer in layers) for of in (state.maps, x))
        nearest = nearest_positions(gallery, index, found, maps, num_pixel_neighbors)
        b, h, w = x[layers[0]].shape[:3]
        return Scores(image, upsample_blur(nearest.mean(-1).reshape(b, h, w), image_size, sigma))

    return Method(features(backbone, wanted), init, (Stage("collect", collect),), score)
