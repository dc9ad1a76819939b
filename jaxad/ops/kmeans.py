"""Lloyd's algorithm and k-means++ seeds."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxad.base import Key
from jaxad.ops.knn import squared_distances


def plus_plus(key: Key, points: Float[Array, "n d"], k: int) -> Float[Array, "k d"]:
    """Draws k of the points, with weights that are squared distances to the points already drawn.

    Source: Arthur, Vassilvitskii, k-means++: The advantages of careful seeding, 2007.
    """
    keys = jax.random.split(key, k)

    def draw(nearest: Float[Array, "n"], key: Key) -> tuple[Float[Array, "n"], Float[Array, "d"]]:
        center = points[jax.random.categorical(key, jnp.log(nearest))]
        return jnp.minimum(nearest, jnp.sum((points - center) ** 2, 1)), center

    start = points[jax.random.randint(keys[0], (), 0, points.shape[0])]
    _, rest = jax.lax.scan(draw, jnp.sum((points - start) ** 2, 1), keys[1:])
    return jnp.concatenate([start[None], rest])


def kmeans(points: Float[Array, "n d"], centers: Float[Array, "k d"], iterations: int = 300) -> Float[Array, "k d"]:
    """Moves centers to the means of their nearest points until no point changes its center.

    Source: Lloyd, Least squares quantization in PCM, 1982.

    Args:
        points: Vectors to cluster.
        centers: Initial centers.
        iterations: Largest number of moves.

    Returns:
        The centers; a center without points stays where it is.
    """
    k = centers.shape[0]

    def nearest(centers: Float[Array, "k d"]) -> Int[Array, "n"]:
        return jnp.argmin(squared_distances(points, centers), 1).astype(jnp.int32)

    def move(carry: tuple) -> tuple:
        centers, assignment, _, n = carry
        count = jax.ops.segment_sum(jnp.ones(points.shape[0]), assignment, k)[:, None]
        total = jax.ops.segment_sum(points, assignment, k)
        centers = jnp.where(count > 0, total / jnp.maximum(count, 1), centers)
        new = nearest(centers)
        return centers, new, jnp.any(new != assignment), n + 1

    def goes_on(carry: tuple) -> Array:
        return carry[2] & (carry[3] < iterations)

    return jax.lax.while_loop(goes_on, move, (centers, nearest(centers), jnp.bool_(True), jnp.int32(0)))[0]
