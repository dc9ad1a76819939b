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

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxad.backbones import backbone as architecture
from jaxad.backbones import features
from jaxad.base import Batch, Frozen, Key, Method, PyTree, Scores, Stage
from jaxad.ops.correspondence import nearest_positions
from jaxad.ops.heatmap import upsample_blur
from jaxad.ops.knn import knn
from jaxad.ops.sharding import exchange


class SpadeChannels(NamedTuple):
    """The normal images while they are collected: by channel, of which many devices can take a part each."""

    pooled: Float[Array, "c n"]
    maps: dict[str, Float[Array, "_ n h w"]]
    seen: Bool[Array, "n"]


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

    def init(key: Key, frozen: Frozen, spec: PyTree) -> SpadeChannels:
        del key, frozen
        n, channels = spec[image_layer].shape[0], spec[image_layer].shape[-1]
        maps = {layer: jnp.zeros((spec[layer].shape[-1], *spec[layer].shape[:-1]), jnp.float16) for layer in layers}
        return SpadeChannels(jnp.zeros((channels, n)), maps, jnp.zeros(n, bool))

    def collect(key: Key, state: SpadeChannels, frozen: Frozen, batch: Batch) -> tuple[SpadeChannels, dict]:
        del key, frozen
        row = jnp.where(batch.valid, batch.index, state.seen.shape[0])

        def put(stored: Float[Array, "c n *hw"], x: Float[Array, "b *hw c"]) -> Float[Array, "c n *hw"]:
            by_channel = exchange(jnp.moveaxis(x.astype(stored.dtype), -1, 1)).swapaxes(0, 1)
            return stored.at[:, row].set(by_channel, mode="drop")

        pooled = put(state.pooled, batch.x[image_layer].mean((1, 2)))
        maps = {layer: put(state.maps[layer], batch.x[layer]) for layer in layers}
        return SpadeChannels(pooled, maps, state.seen.at[row].set(True, mode="drop")), {}

    def by_image(key: Key, state: SpadeChannels, frozen: Frozen) -> SpadeGallery:
        del key, frozen
        pooled, maps = jax.tree.map(lambda stored: jnp.moveaxis(exchange(stored), 0, -1), (state.pooled, state.maps))
        return SpadeGallery(pooled, maps, state.seen)

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

    return Method(features(backbone, wanted), init, (Stage("collect", collect, by_image),), score)
