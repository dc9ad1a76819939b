"""CutPaste: a piece of an image, pasted elsewhere on it.

Source: CutPaste: Self-Supervised Learning for Anomaly Detection and Localization, CVPR 2021, arXiv:2104.04015.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxad.base import Key
from jaxad.synthesis.color import color_jitter

Pasted = tuple[Float[Array, "h w 3"], Bool[Array, "h w"]]
"""An image, and its pixels that were pasted."""


def paste(
    key: Key,
    image: Float[Array, "h w 3"],
    size: Float[Array, "2"],
    most: tuple[float, float],
    degrees: float,
    jitter: float,
) -> Pasted:
    """Copies a rectangle from one place to another, both drawn evenly among those within the image.

    Only a window about the place, as large as the largest rectangle, is computed.

    Args:
        key: Draws both places, the rotation and the change of color.
        image: In [0, 1].
        size: Height and width of the rectangle in pixels.
        most: What they are at most.
        degrees: Largest rotation about its middle, either way; its corners may then lie outside the image.
        jitter: Strength of the change of its color.
    """
    cut, put, color, turn = jax.random.split(key, 4)
    size, dims = jnp.maximum(jnp.round(size), 1), jnp.asarray(image.shape[:2], jnp.float32)
    angle = jax.random.uniform(turn, minval=-degrees, maxval=degrees) * (jnp.pi / 180)
    reach = (math.hypot(*most),) * 2 if degrees else most
    window = tuple(min(math.ceil(r) + 2, n) for r, n in zip(reach, image.shape[:2], strict=True))

    def place(key: Key) -> tuple[Array, Array, Array]:
        """Where a window about the rectangle begins, and its pixels down and across from the rectangle's middle."""
        middle = jnp.floor(jax.random.uniform(key, (2,)) * (dims - size + 1)) + (size - 1) / 2
        start = jnp.clip(jnp.floor(middle - jnp.asarray(window) / 2), 0, dims - jnp.asarray(window, jnp.float32))
        y, x = (jnp.arange(n, dtype=jnp.float32) + s - m for n, s, m in zip(window, start, middle, strict=True))
        return jnp.append(start, 0).astype(jnp.int32), y[:, None], x[None, :]

    def within(y: Array, x: Array) -> Array:
        return (jnp.abs(y) < size[0] / 2) & (jnp.abs(x) < size[1] / 2)

    (source, *piece_at), (target, y, x) = place(cut), place(put)
    piece = jax.lax.dynamic_slice(image, source, (*window, 3))
    if jitter:
        piece = color_jitter(color, piece, jitter, within(*piece_at))
    back = (jnp.cos(angle) * y + jnp.sin(angle) * x, jnp.cos(angle) * x - jnp.sin(angle) * y)
    mask = within(*back)
    nearest = (jnp.round(b - at.min()).astype(jnp.int32) for b, at in zip(back, piece_at, strict=True))
    piece = piece.at[tuple(nearest)].get(mode="clip")
    here = jax.lax.dynamic_slice(image, target, (*window, 3))
    pasted = jax.lax.dynamic_update_slice(image, jnp.where(mask[..., None], piece, here), target)
    return pasted, jax.lax.dynamic_update_slice(jnp.zeros(image.shape[:2], bool), mask, target[:2])


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
    shape, rest = jax.random.split(key)
    share, ratio, upright = jax.random.uniform(shape, (3,))
    h, w = image.shape[:2]
    pixels = (area[0] + share * (area[1] - area[0])) * (h * w)
    ratio = aspect + ratio * (1 - aspect)
    ratio = jnp.where(upright < 0.5, 1 / ratio, ratio)
    longest = math.sqrt(area[1] * h * w / aspect)
    most = (min(longest, h), min(longest, w))
    size = jnp.minimum(jnp.sqrt(jnp.stack([pixels * ratio, pixels / ratio])), jnp.asarray(most))
    return paste(rest, image, size, most, degrees, jitter)


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
    shape, rest = jax.random.split(key)
    least, most = ((h * image.shape[0], w * image.shape[1]) for h, w in zip(height, width, strict=True))
    size = jnp.asarray(least) + jax.random.uniform(shape, (2,)) * (jnp.asarray(most) - jnp.asarray(least))
    return paste(rest, image, size, most, degrees, jitter)


def three_way(key: Key, image: Float[Array, "h w 3"]) -> tuple[Float[Array, "3 h w 3"], Bool[Array, "3 h w"]]:
    """The classes of the 3-way problem: the image, with CutPaste, and with a scar."""
    large, thin = jax.random.split(key)
    made = [(image, jnp.zeros(image.shape[:2], bool)), cutpaste(large, image), scar(thin, image)]
    return jnp.stack([one for one, _ in made]), jnp.stack([mask for _, mask in made])
