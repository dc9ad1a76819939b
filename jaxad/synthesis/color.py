"""Changes of color, of images in [0, 1]."""

from typing import Any

import dm_pix
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxad.base import Key

GRAY = (0.299, 0.587, 0.114)


def gray_of(image: Float[Array, "*b h w 3"]) -> Float[Array, "*b h w 1"]:
    """The brightness of pixels."""
    return jnp.sum(image * jnp.asarray(GRAY), -1, keepdims=True)


def apart_from(base: Float[Array, "..."], image: Float[Array, "..."], factor: Float[Array, "..."]) -> Array:
    """An image that differs `factor` times as much from `base`.

    A change of brightness if that is black, of contrast if it is the image's mean, of saturation if it is gray.
    """
    return jnp.clip(base + factor * (image - base), 0, 1)


def other_hue(
    image: Float[Array, "*b h w 3"], shift: Float[Array, ""], more: float | Float[Array, ""] = 0.0
) -> Float[Array, "*b h w 3"]:
    """The hue moved by a share of the color circle, and `more` saturation, both of HSV."""
    with jax.numpy_dtype_promotion("standard"):  # dm_pix adds truth values to numbers
        hsv: Any = dm_pix.rgb_to_hsv(image)
        hsv = jnp.stack([(hsv[..., 0] + shift) % 1, jnp.clip(hsv[..., 1] + more, 0, 1), hsv[..., 2]], -1)
        other: Any = dm_pix.hsv_to_rgb(hsv)
    return jnp.clip(other, 0, 1)


def color_jitter(
    key: Key, image: Float[Array, "h w 3"], strength: float, where: Bool[Array, "h w"] | None = None
) -> Float[Array, "h w 3"]:
    """Another brightness, contrast, saturation and hue.

    The first three by a factor of 1 - strength to 1 + strength each, the hue by so much of the circle at most. As
    torchvision's `ColorJitter`, but always in this order; the contrast is that of the pixels `where`.
    """
    *factors, shift = jax.random.uniform(key, (4,), minval=-strength, maxval=strength)
    image = apart_from(jnp.zeros(()), image, 1 + factors[0])
    mean = jnp.mean(gray_of(image), where=True if where is None else where[..., None])
    image = apart_from(mean, image, 1 + factors[1])
    image = apart_from(gray_of(image), image, 1 + factors[2])
    return other_hue(image, shift)
