"""CutPaste: a piece of an image, pasted elsewhere on it.

Source: CutPaste: Self-Supervised Learning for Anomaly Detection and Localization, CVPR 2021, arXiv:2104.04015.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxad.base import Key
from jaxad.ops.color import color_jitter

Pasted = tuple[Float[Array, "h w 3"], Bool[Array, "h w"]]
"""An image, and its pixels that were pasted."""


def paste(
    key: Key, image: Float[Array, "h w 3"], size: Float[Array, "2"], degrees: Float[Array, ""], jitter: float
) -> Pasted:
    """Copies a rectangle from one place to another, both drawn evenly among those within the image.

    Args:
        key: Draws both places, and the change of color.
        image: In [0, 1].
        size: Height and width of the rectangle in pixels.
        degrees: By which it is rotated about its middle; its corners may then lie outside the image.
        jitter: Strength of the change of its color.
    """
    cut, put, color = jax.random.split(key, 3)
    size = jnp.maximum(jnp.round(size), 1)
    room = jnp.asarray(image.shape[:2], jnp.float32) - size
    source, target = (jnp.floor(jax.random.uniform(k, (2,)) * (room + 1)) for k in (cut, put))
    angle, (h, w) = degrees * (jnp.pi / 180), image.shape[:2]
    y = jnp.arange(h, dtype=jnp.float32)[:, None] - target[0] - (size[0] - 1) / 2
    x = jnp.arange(w, dtype=jnp.float32)[None, :] - target[1] - (size[1] - 1) / 2
    back = (jnp.cos(angle) * y + jnp.sin(angle) * x, jnp.cos(angle) * x - jnp.sin(angle) * y)
    mask = (jnp.abs(back[0]) < size[0] / 2) & (jnp.abs(back[1]) < size[1] / 2)
    row, column = (
        jnp.clip(jnp.round(b + s + (n - 1) / 2), 0, end - 1).astype(jnp.int32)
        for b, s, n, end in zip(back, source, size, (h, w), strict=True)
    )
    piece = image[row, column]
    if jitter:
        piece = color_jitter(color, piece, jitter, mask)
    return jnp.where(mask[..., None], piece, image), mask


def cutpaste(
    key: Key,
    image: Float[Array, "h w 3"],
    *,
    area: tuple[float, float] = (0.02, 0.15),
    aspect: float = 0.3,
    degrees: float = 0.0,
    jitter: float = 0.1,
) -> Pasted:
    """CutPaste of a large rectangle.

    Args:
        key: Draws all that is random.
        image: In [0, 1].
        area: Least and largest share of the image.
        aspect: Least ratio of height and width, and of width and height; half of the rectangles are upright.
        degrees: Largest rotation, either way.
        jitter: Strength of the change of its color.
    """
    shape, turn, rest = jax.random.split(key, 3)
    share, ratio, upright = jax.random.uniform(shape, (3,))
    pixels = (area[0] + share * (area[1] - area[0])) * (image.shape[0] * image.shape[1])
    ratio = aspect + ratio * (1 - aspect)
    ratio = jnp.where(upright < 0.5, 1 / ratio, ratio)
    size = jnp.minimum(jnp.sqrt(jnp.stack([pixels * ratio, pixels / ratio])), jnp.asarray(image.shape[:2], jnp.float32))
    return paste(rest, image, size, jax.random.uniform(turn, minval=-degrees, maxval=degrees), jitter)


def scar(
    key: Key,
    image: Float[Array, "h w 3"],
    *,
    width: tuple[float, float] = (2 / 256, 16 / 256),
    height: tuple[float, float] = (10 / 256, 25 / 256),
    degrees: float = 45.0,
    jitter: float = 0.1,
) -> Pasted:
    """CutPaste of a long thin rectangle, rotated.

    Args:
        key: Draws all that is random.
        image: In [0, 1].
        width: Least and largest, as shares of the image's.
        height: The same.
        degrees: Largest rotation, either way.
        jitter: Strength of the change of its color.
    """
    shape, turn, rest = jax.random.split(key, 3)
    low, high = (jnp.asarray([h * image.shape[0], w * image.shape[1]]) for h, w in zip(height, width, strict=True))
    size = low + jax.random.uniform(shape, (2,)) * (high - low)
    return paste(rest, image, size, jax.random.uniform(turn, minval=-degrees, maxval=degrees), jitter)


def three_way(key: Key, image: Float[Array, "h w 3"]) -> tuple[Float[Array, "3 h w 3"], Bool[Array, "3 h w"]]:
    """The classes of the 3-way problem: the image, with CutPaste, and with a scar."""
    large, thin = jax.random.split(key)
    made = [(image, jnp.zeros(image.shape[:2], bool)), cutpaste(large, image), scar(thin, image)]
    return jnp.stack([one for one, _ in made]), jnp.stack([mask for _, mask in made])
