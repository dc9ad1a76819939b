"""Images for methods that learn from pixels."""

import jax.numpy as jnp
from jaxtyping import Array, UInt8

from jaxad.base import Frozen


def levels(image: Array) -> UInt8[Array, "b h w c"]:
    """An image, uint8 or float in [0, 1], as uint8."""
    return image if image.dtype == jnp.uint8 else jnp.round(image * 255).astype(jnp.uint8)


def pixels(frozen: Frozen, image: Array) -> UInt8[Array, "b h w 3"]:
    """The `embed` of methods that learn from pixels: the image itself, as uint8."""
    del frozen
    return levels(image)
