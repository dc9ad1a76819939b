"""Images seen from elsewhere."""

import math

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float

from jaxad.base import Key


def rotate(image: Float[Array, "h w *c"], degrees: float | Float[Array, ""]) -> Float[Array, "h w *c"]:
    """The image rotated about its middle, counter-clockwise, by bilinear interpolation; zeros where it was not."""
    angle = jnp.asarray(degrees, jnp.float32) * (jnp.pi / 180)
    h, w = image.shape[:2]
    y = jnp.arange(h, dtype=jnp.float32)[:, None] - (h - 1) / 2
    x = jnp.arange(w, dtype=jnp.float32)[None, :] - (w - 1) / 2
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    at = [cos * y + sin * x + (h - 1) / 2, cos * x - sin * y + (w - 1) / 2]

    def of(plane: Array) -> Array:
        return map_coordinates(plane, at, 1, "constant", 0.0)

    return of(image) if image.ndim == 2 else jax.vmap(of, -1, -1)(image)


def moved(key: Key, image: Float[Array, "h w c"], shift: int, degrees: float, mirror: bool) -> Float[Array, "h w c"]:
    """The image moved, turned and turned upside down at random; beyond its border its edge goes on.

    Args:
        key: Draws all that is random.
        image: To move.
        shift: Pixels that it is moved at most, every way.
        degrees: It is rotated by so much at most, either way.
        mirror: Whether one of two is turned upside down.
    """
    where, turn, flip = jax.random.split(key, 3)
    far = max(image.shape[:2]) / 2 + shift
    room = shift + math.ceil(far * math.sin(math.radians(min(degrees, 90.0))))
    wide = jnp.pad(image, ((room, room), (room, room), (0, 0)), "edge")
    if degrees:
        wide = rotate(wide, jax.random.uniform(turn, minval=-degrees, maxval=degrees))
    top, left = jax.random.randint(where, (2,), room - shift, room + shift + 1)
    image = jax.lax.dynamic_slice(wide, (top, left, jnp.int32(0)), image.shape)
    return jnp.where(jax.random.bernoulli(flip) & mirror, image[::-1], image)
