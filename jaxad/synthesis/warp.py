"""Rotations and shifts of images."""

import math

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float

from jaxad.base import Key


def rotate(image: Float[Array, "h w *c"], degrees: float | Float[Array, ""]) -> Float[Array, "h w *c"]:
    """Rotates an image counterclockwise about its center, with bilinear interpolation; outside the image are zeros."""
    angle = jnp.asarray(degrees, jnp.float32) * (jnp.pi / 180)
    h, w = image.shape[:2]
    y = jnp.arange(h, dtype=jnp.float32)[:, None] - (h - 1) / 2
    x = jnp.arange(w, dtype=jnp.float32)[None, :] - (w - 1) / 2
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    coordinates = [cos * y + sin * x + (h - 1) / 2, cos * x - sin * y + (w - 1) / 2]

    def sample(channel: Array) -> Array:
        return map_coordinates(channel, coordinates, 1, "constant", 0.0)

    return sample(image) if image.ndim == 2 else jax.vmap(sample, -1, -1)(image)


def random_pose(
    key: Key, image: Float[Array, "h w c"], shift: int, degrees: float, mirror: bool
) -> Float[Array, "h w c"]:
    """A random shift, rotation and vertical flip; outside the image its edge pixels repeat.

    Args:
        key: Draws all three.
        image: Any values.
        shift: Largest shift along each axis, in pixels.
        degrees: Largest rotation, in both directions.
        mirror: Whether to flip upside down with probability 1/2.
    """
    shift_key, angle_key, flip_key = jax.random.split(key, 3)
    reach = max(image.shape[:2]) / 2 + shift
    margin = shift + math.ceil(reach * math.sin(math.radians(min(degrees, 90.0))))
    padded = jnp.pad(image, ((margin, margin), (margin, margin), (0, 0)), "edge")
    if degrees:
        padded = rotate(padded, jax.random.uniform(angle_key, minval=-degrees, maxval=degrees))
    top, left = jax.random.randint(shift_key, (2,), margin - shift, margin + shift + 1)
    image = jax.lax.dynamic_slice(padded, (top, left, jnp.int32(0)), image.shape)
    return jnp.where(jax.random.bernoulli(flip_key) & mirror, image[::-1], image)
