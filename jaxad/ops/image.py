"""Images as methods that look at pixels take them."""

import jax.numpy as jnp
from jaxtyping import Array, UInt8

from jaxad.base import Frozen


def levels(image: Array) -> UInt8[Array, "b h w c"]:
    """An image, uint8 or float in [0, 1], in 256 levels."""
    return image if image.dtype == jnp.uint8 else jnp.round(image * 255).astype(jnp.uint8)


def pixels(frozen: Frozen, image: Array) -> UInt8[Array, "b h w 3"]:
    """The `embed` of methods that learn from pixels: the image itself, in 256 levels."""
    del frozen
    return levels(image)
