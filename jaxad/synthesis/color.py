"""Color changes, of images with values in [0, 1]."""

import dm_pix
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxad.base import Key

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue (ITU-R BT.601), as in Pillow and torchvision."""
ROUNDING = 1e-6
"""Channels that differ by less are equal up to rounding: the pixel is gray."""


def gray_of(image: Float[Array, "*b h w 3"]) -> Float[Array, "*b h w 1"]:
    """The luma of every pixel."""
    return jnp.sum(image * jnp.asarray(LUMA), -1, keepdims=True)


def scale_difference(base: Float[Array, "..."], image: Float[Array, "..."], factor: Float[Array, "..."]) -> Array:
    """Scales the difference between an image and `base` by a factor, and clips to [0, 1].

    This changes the brightness if `base` is black, the contrast if it is the mean luma of the image, and the
    saturation if it is the gray image.
    """
    return jnp.clip(base + factor * (image - base), 0, 1)


def rgb_to_hsv(image: Float[Array, "*b h w 3"]) -> Float[Array, "*b h w 3"]:
    """Hue, saturation and value of every pixel, all in [0, 1]; gray has the hue 0.

    The channels are compared with each other. `dm_pix.rgb_to_hsv` compares each to their maximum for equality, and gets
    another hue where XLA computes an input twice, in two fusions, and rounds it differently.
    """
    red, green, blue = jnp.moveaxis(image, -1, 0)
    value = image.max(-1)
    spread = value - image.min(-1)
    colored = spread > ROUNDING
    scale = 1 / (6 * jnp.where(colored, spread, 1))
    hue = jnp.where(green >= blue, scale * (blue - red) + 2 / 6, scale * (red - green) + 4 / 6)
    hue = jnp.where((red >= green) & (red >= blue), scale * (green - blue), hue)
    saturation = spread / jnp.where(value > 0, value, 1)
    return jnp.stack([jnp.where(colored, hue % 1, 0), saturation, value], -1)


def change_hue(
    image: Float[Array, "*b h w 3"], shift: Float[Array, ""], saturation: float | Float[Array, ""] = 0.0
) -> Float[Array, "*b h w 3"]:
    """Adds `shift` to the hue, as a fraction of the color circle, and `saturation` to the saturation, both of HSV."""
    hue, old, value = jnp.moveaxis(rgb_to_hsv(image), -1, 0)
    hsv = jnp.stack([(hue + shift) % 1, jnp.clip(old + saturation, 0, 1), value], -1)
    return jnp.clip(jnp.asarray(dm_pix.hsv_to_rgb(hsv)), 0, 1)


def color_jitter(
    key: Key, image: Float[Array, "h w 3"], strength: float, where: Bool[Array, "h w"] | None = None
) -> Float[Array, "h w 3"]:
    """Random brightness, contrast, saturation and hue, as torchvision's `ColorJitter`, but always in this order.

    Args:
        key: Draws the four changes.
        image: In [0, 1].
        strength: Brightness, contrast and saturation are scaled by a factor in [1 - strength, 1 + strength], the hue is
            shifted by at most this fraction of the color circle.
        where: The pixels whose mean luma the contrast refers to; all by default.
    """
    *factors, shift = jax.random.uniform(key, (4,), minval=-strength, maxval=strength)
    image = scale_difference(jnp.zeros(()), image, 1 + factors[0])
    mean = jnp.mean(gray_of(image), where=True if where is None else where[..., None])
    image = scale_difference(mean, image, 1 + factors[1])
    image = scale_difference(gray_of(image), image, 1 + factors[2])
    return change_hue(image, shift)
