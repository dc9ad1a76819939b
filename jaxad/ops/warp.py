"""Images seen from elsewhere."""

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float


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
