"""SPADE: nearest normal images, then nearest pixels in them.

Stored: the pooled features and the feature pyramids of all normal images. An image scores the mean squared distance of
its pooled feature to those of the K nearest normal images (Eq. 1-2). A pixel scores the mean squared distance of its
pyramid feature, which stacks layer1 to layer3, to the kappa nearest among all pixels of those K images (Eq. 3 and
section 3.4).

Family: features
Paper: Sub-Image Anomaly Detection with Deep Pyramid Correspondences, 2020, arXiv:2005.02357.
Reference: none official; https://github.com/byungjae89/SPADE-pytorch (K = 5).
Differences: distances are squared and pixels compared by stacked features, as in the paper; the reference takes roots
    and compares each stage separately (with 100 training images of MTD and a ResNet-18, the image AUROC is 0.004 lower
    than its, the pixel AUROC equal to 0.0003). The gallery is kept in half precision, which changes a map by 1e-4 of
    its largest value. The distance of two stacked features is the sum of the distances of the stages, each computed on
    the grid of its stage and repeated to that of layer1; features are never stacked.
Results: experiments/recipes/spade.py
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxad.backbones import Backbone, features
from jaxad.backbones import backbone as architecture
from jaxad.base import Batch, Frozen, Key, Method, PyTree, Scores, Stage
from jaxad.ops.collect import collect, collect_positions, image_first
from jaxad.ops.correspondence import nearest_positions
from jaxad.ops.heatmap import upsample_blur
from jaxad.ops.knn import knn
from jaxad.training.checks import at_least_one


class SpadeChannels(NamedTuple):
    """The features of the normal images while they are collected, with channels first, which devices can share."""

    pooled: Float[Array, "c n"]
    maps: dict[str, Float[Array, "_ n h w"]]
    seen: Bool[Array, "n"]


class SpadeGallery(NamedTuple):
    """The features of the normal images, with images first."""

    pooled: Float[Array, "n c"]
    maps: dict[str, Float[Array, "n h w _"]]
    seen: Bool[Array, "n"]


def spade(
    *,
    backbone: str | Backbone = "wide_resnet50_2",
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
        image_size: (height, width) of the images and the heat maps.
        num_neighbors: Nearest normal images whose distances an image averages (K); all where there are fewer.
        num_pixel_neighbors: Nearest pixels of these images whose distances a pixel averages (kappa).
        sigma: Smoothing of the heat map in pixels.

    Raises:
        ValueError: A hyperparameter is out of range.
    """
    at_least_one(num_neighbors=num_neighbors, num_pixel_neighbors=num_pixel_neighbors)
    network = architecture(backbone)
    layers = network.pyramid_layers if layers is None else tuple(layers)
    image_layer = image_layer or network.stages[-1]
    embedded = (*layers, *({image_layer} - set(layers)))

    def init(key: Key, state: None, frozen: Frozen, spec: PyTree) -> SpadeChannels:
        del key, state, frozen
        n, channels = spec[image_layer].shape[0], spec[image_layer].shape[-1]
        maps = {layer: jnp.zeros((spec[layer].shape[-1], *spec[layer].shape[:-1]), jnp.float16) for layer in layers}
        return SpadeChannels(jnp.zeros((channels, n)), maps, jnp.zeros(n, bool))

    def update(key: Key, state: SpadeChannels, frozen: Frozen, batch: Batch) -> tuple[SpadeChannels, dict]:
        del key, frozen

        def store(buffer: Float[Array, "c n *hw"], x: Float[Array, "b *hw c"]) -> Float[Array, "c n *hw"]:
            return collect_positions(buffer, jnp.moveaxis(x, -1, 1), batch)

        pooled = store(state.pooled, batch.x[image_layer].mean((1, 2)))
        maps = {layer: store(state.maps[layer], batch.x[layer]) for layer in layers}
        return SpadeChannels(pooled, maps, collect(state.seen, batch.valid, batch)), {}

    def rearrange(key: Key, state: SpadeChannels, frozen: Frozen) -> SpadeGallery:
        del key, frozen
        pooled, maps = jax.tree.map(lambda x: jnp.moveaxis(image_first(x), 1, -1), (state.pooled, state.maps))
        return SpadeGallery(pooled, maps, state.seen)

    def score(state: SpadeGallery, frozen: Frozen, x: dict[str, Array]) -> Scores:
        del frozen
        neighbors = min(num_neighbors, state.seen.shape[0])
        distance, index = knn(x[image_layer].mean((1, 2)), state.pooled, neighbors, state.seen)
        exists = jnp.isfinite(distance)
        image = jnp.where(exists, distance**2, 0).sum(1) / exists.sum(1).astype(jnp.float32)
        gallery, maps = (tuple(stages[layer] for layer in layers) for stages in (state.maps, x))
        nearest = nearest_positions(gallery, index, exists, maps, num_pixel_neighbors)
        b, h, w = x[layers[0]].shape[:3]
        return Scores(image, upsample_blur(nearest.mean(-1).reshape(b, h, w), image_size, sigma))

    return Method(features(backbone, embedded), (Stage("collect", init, update, rearrange),), score)
