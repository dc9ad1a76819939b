"""Images as methods that look at pixels take them."""

import jax.numpy as jnp
from jaxtyping import Array, UInt8


def levels(image: Array) -> UInt8[Array, "b h w c"]:
    """An image, uint8 or float in [0, 1], in 256 levels."""
    return image if image.dtype == jnp.uint8 else jnp.round(image * 255).astype(jnp.uint8)
