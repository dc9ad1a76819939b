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
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxad.backbones import backbone as architecture
from jaxad.backbones import features
from jaxad.base import Batch, Frozen, Key, Method, PyTree, Scores, Stage
from jaxad.ops.heatmap import upsample_blur
from jaxad.ops.knn import knn, smallest_k, squared_distances
from jaxad.ops.sharding import DATA, by_rows, own_rows, pad_rows, shards


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
        pixel = correspond(state.maps, index, found, {k: x[k] for k in layers})
        return Scores(image, upsample_blur(pixel, image_size, sigma))

    def correspond(
        gallery: dict[str, Array], index: Int[Array, "b k"], found: Bool[Array, "b k"], x: dict[str, Array]
    ) -> Float[Array, "b h w"]:
        """The heat maps before smoothing; on a mesh every device looks at those nearest images that it holds."""
        b, h, w = x[layers[0]].shape[:3]
        devices = shards()
        look_up = nearest_pixels
        if devices > 1:
            gallery = {k: pad_rows(maps, devices) for k, maps in gallery.items()}
            look_up = by_rows(nearest_of_shard, (P(DATA), P(), P(), P()), P())
        return look_up(gallery, index, found, x).mean(-1).reshape(b, h, w)

    def nearest_of_shard(
        gallery: dict[str, Array], index: Int[Array, "b k"], found: Bool[Array, "b k"], x: dict[str, Array]
    ) -> Float[Array, "b p kappa"]:
        rows = gallery[layers[0]].shape[0]
        local = own_rows(index, jax.lax.axis_index(DATA), rows)
        nearest = nearest_pixels(gallery, local, found & (local < rows), x)
        together = jax.lax.all_gather(nearest, DATA, axis=2, tiled=True)
        return -jax.lax.top_k(-together, nearest.shape[2])[0]

    def nearest_pixels(
        gallery: dict[str, Array], index: Int[Array, "b k"], found: Bool[Array, "b k"], x: dict[str, Array]
    ) -> Float[Array, "b p kappa"]:
        """Squared distances to the nearest pixels, for one image after the other."""
        h, w = x[layers[0]].shape[1:3]
        kappa = min(num_pixel_neighbors, h * w)

        def one_image(args: tuple[Int[Array, "k"], Bool[Array, "k"], dict[str, Array]]) -> Float[Array, "p kappa"]:
            index, found, x = args
            first = index[jnp.argsort(~found, stable=True)]

            def join(i: Int[Array, ""], nearest: Float[Array, "p kappa"]) -> Float[Array, "p kappa"]:
                total = pyramid_distances([(x[k], gallery[k][first[i]].astype(jnp.float32)) for k in layers])
                both = jnp.concatenate([nearest, smallest_k(total, kappa)[0]], 1)
                return -jax.lax.top_k(-both, kappa)[0]

            return jax.lax.fori_loop(0, found.sum(), join, jnp.full((h * w, kappa), jnp.inf))

        return jax.lax.map(one_image, (index, found, x))

    return Method(features(backbone, wanted), init, (Stage("collect", collect),), score)


def pyramid_distances(pairs: list[tuple[Float[Array, "_ _ _"], Float[Array, "_ _ _"]]]) -> Float[Array, "p p"]:
    """Squared distances between all positions of two images' stacked feature maps, on the grid of the first stage.

    Args:
        pairs: For each stage the maps of the two images, the finest first; coarser ones are repeated.
    """
    h, w = pairs[0][0].shape[:2]
    total = jnp.zeros((h, w, h, w))
    for a, b in pairs:
        rows, columns = ((2 * jnp.arange(n) + 1) * m // (2 * n) for n, m in zip((h, w), a.shape[:2], strict=True))
        part = squared_distances(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]))
        part = part.reshape(*a.shape[:2], *a.shape[:2])
        total = total + part[rows][:, columns][:, :, rows][:, :, :, columns]
    return total.reshape(h * w, h * w)
