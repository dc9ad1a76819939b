"""The nearest positions in feature maps of other images, over a pyramid of stages."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxad.ops.knn import smallest_k, squared_distances
from jaxad.ops.sharding import DATA, local_rows, map_shards, pad_rows, shards


def nearest_positions(
    gallery: tuple[Float[Array, "n _ _ _"], ...],
    index: Int[Array, "b k"],
    valid: Bool[Array, "b k"],
    x: tuple[Float[Array, "b _ _ _"], ...],
    neighbors: int,
) -> Float[Array, "b p kappa"]:
    """Squared distances from every position of an image to the nearest positions of some images of a gallery.

    On a mesh, devices share the gallery, and every device compares with the images that it holds.

    Args:
        gallery: Feature maps of every stage, the finest first; the stages are stacked on the grid of the first.
        index: Images of the gallery to compare each image with.
        valid: Which of these count.
        x: Feature maps of the images, likewise.
        neighbors: Positions wanted (kappa), at most p.

    Returns:
        Distances for the p positions of the first stage, ascending; infinite where nothing counts.
    """
    devices, kappa = shards(), min(neighbors, x[0].shape[1] * x[0].shape[2])
    if devices == 1:
        return _nearest(gallery, index, valid, x, kappa)

    def one_shard(gallery: tuple, index: Array, valid: Array, x: tuple) -> Array:
        rows = gallery[0].shape[0]
        local = local_rows(index, jax.lax.axis_index(DATA), rows)
        nearest = _nearest(gallery, local, valid & (local < rows), x, kappa)
        return -jax.lax.top_k(-jax.lax.all_gather(nearest, DATA, axis=2, tiled=True), kappa)[0]

    gallery = tuple(pad_rows(maps, devices) for maps in gallery)
    return map_shards(one_shard, (P(DATA), P(), P(), P()), P())(gallery, index, valid, x)


def _nearest(gallery: tuple, index: Array, valid: Array, x: tuple, kappa: int) -> Array:
    """As `nearest_positions`, pair by pair of images."""

    def one_image(args: tuple[Int[Array, "k"], Bool[Array, "k"], tuple[Array, ...]]) -> Float[Array, "p kappa"]:
        index, valid, x = args
        valid_first = index[jnp.argsort(~valid, stable=True)]

        def join(i: Int[Array, ""], nearest: Float[Array, "p kappa"]) -> Float[Array, "p kappa"]:
            image = valid_first[i]
            pairs = [(a, b[image].astype(jnp.float32)) for a, b in zip(x, gallery, strict=True)]
            candidates = jnp.concatenate([nearest, smallest_k(pyramid_distances(pairs), kappa)[0]], 1)
            return -jax.lax.top_k(-candidates, kappa)[0]

        h, w = x[0].shape[:2]
        return jax.lax.fori_loop(0, valid.sum(), join, jnp.full((h * w, kappa), jnp.inf))

    return jax.lax.map(one_image, (index, valid, x))


def pyramid_distances(pairs: list[tuple[Float[Array, "_ _ _"], Float[Array, "_ _ _"]]]) -> Float[Array, "p p"]:
    """Squared distances between all positions of the stacked feature maps of two images, on the first stage's grid.

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
