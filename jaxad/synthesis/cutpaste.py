"""CutPaste: a patch of an image, pasted elsewhere on it.

Source: CutPaste: Self-Supervised Learning for Anomaly Detection and Localization, CVPR 2021, arXiv:2104.04015.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxad.base import Key
from jaxad.synthesis.color import color_jitter

Pasted = tuple[Float[Array, "h w 3"], Bool[Array, "h w"]]
"""An image, and the mask of its pasted pixels."""


def paste(
    key: Key,
    image: Float[Array, "h w 3"],
    size: Float[Array, "2"],
    max_size: tuple[float, float],
    degrees: float,
    jitter: float,
) -> Pasted:
    """Copies a rectangle to another place; both places are uniform among those where it lies inside the image.

    Only a window of static size around each place is computed, large enough for the largest rectangle.

    Args:
        key: Draws both places, the rotation and the color jitter.
        image: In [0, 1].
        size: Height and width of the rectangle in pixels, rounded to at least 1.
        max_size: Upper bounds of `size`.
        degrees: Largest rotation of the pasted patch about its center, in both directions.
        jitter: Strength of the color jitter of the patch.
    """
    source_key, target_key, color_key, angle_key = jax.random.split(key, 4)
    size, dims = jnp.maximum(jnp.round(size), 1), jnp.asarray(image.shape[:2], jnp.float32)
    angle = jax.random.uniform(angle_key, minval=-degrees, maxval=degrees) * (jnp.pi / 180)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    extent = (math.hypot(*max_size),) * 2 if degrees else max_size
    window = tuple(min(math.ceil(e) + 2, n) for e, n in zip(extent, image.shape[:2], strict=True))

    def place(key: Key, size: Array) -> tuple[Array, Array, Array]:
        """The corner of a window around a random place, and y and x of its pixels from the center of the rectangle."""
        center = jnp.floor(jax.random.uniform(key, (2,)) * (dims - size + 1)) + (size - 1) / 2
        corner = jnp.clip(jnp.floor(center - jnp.asarray(window) / 2), 0, dims - jnp.asarray(window, jnp.float32))
        y, x = (jnp.arange(n, dtype=jnp.float32) + s - c for n, s, c in zip(window, corner, center, strict=True))
        return jnp.append(corner, 0).astype(jnp.int32), y[:, None], x[None, :]

    def in_rectangle(y: Array, x: Array) -> Array:
        return (jnp.abs(y) < size[0] / 2) & (jnp.abs(x) < size[1] / 2)

    growth = jnp.ceil(((cos - 1) * size + jnp.abs(sin) * size[::-1]) / 2)  # of the patch on every side, as in Pillow
    turned = jnp.minimum(size + 2 * growth, dims)
    (source, *source_grid), (target, y, x) = place(source_key, size), place(target_key, turned)
    patch = jax.lax.dynamic_slice(image, source, (*window, 3))
    if jitter:
        patch = color_jitter(color_key, patch, jitter, in_rectangle(*source_grid))
    rotated = (cos * y + sin * x, cos * x - sin * y)
    mask = in_rectangle(*rotated)
    nearest = (jnp.round(to - of.min()).astype(jnp.int32) for to, of in zip(rotated, source_grid, strict=True))
    patch = patch.at[tuple(nearest)].get(mode="clip")
    background = jax.lax.dynamic_slice(image, target, (*window, 3))
    pasted = jax.lax.dynamic_update_slice(image, jnp.where(mask[..., None], patch, background), target)
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
    """CutPaste with a large rectangle; the defaults are the paper's ranges.

    Args:
        key: Draws size, places, rotation and color jitter.
        image: In [0, 1].
        area: Range of the rectangle's area, as a fraction of the image's.
        aspect: Least ratio of height to width; its logarithm is uniform, and half of the rectangles are upright.
        degrees: Largest rotation, in both directions.
        jitter: Strength of the color jitter.
    """
    size_key, paste_key = jax.random.split(key)
    fraction, ratio = jax.random.uniform(size_key, (2,))
    h, w = image.shape[:2]
    pixels = (area[0] + fraction * (area[1] - area[0])) * (h * w)
    ratio = aspect ** (2 * ratio - 1)
    longest = math.sqrt(area[1] * h * w / aspect)
    max_size = (min(longest, h), min(longest, w))
    size = jnp.minimum(jnp.sqrt(jnp.stack([pixels * ratio, pixels / ratio])), jnp.asarray(max_size))
    return paste(paste_key, image, size, max_size, degrees, jitter)


def scar(
    key: Key,
    image: Float[Array, "h w 3"],
    *,
    width: tuple[float, float] = (2 / 256, 16 / 256),
    height: tuple[float, float] = (10 / 256, 25 / 256),
    degrees: float = 45.0,
    jitter: float = 0.1,
) -> Pasted:
    """CutPaste with a thin, rotated rectangle (CutPaste-Scar); the defaults are the paper's ranges.

    Args:
        key: Draws size, places, rotation and color jitter.
        image: In [0, 1].
        width: Range of the width, as a fraction of the image's.
        height: Range of the height, as a fraction of the image's.
        degrees: Largest rotation, in both directions.
        jitter: Strength of the color jitter.
    """
    size_key, paste_key = jax.random.split(key)
    low, high = ((h * image.shape[0], w * image.shape[1]) for h, w in zip(height, width, strict=True))
    size = jnp.asarray(low) + jax.random.uniform(size_key, (2,)) * (jnp.asarray(high) - jnp.asarray(low))
    return paste(paste_key, image, size, high, degrees, jitter)


def three_way(key: Key, image: Float[Array, "h w 3"]) -> tuple[Float[Array, "3 h w 3"], Bool[Array, "3 h w"]]:
    """The classes of the paper's 3-way problem: the image itself, with CutPaste, and with CutPaste-Scar; and masks."""
    cutpaste_key, scar_key = jax.random.split(key)
    samples = [(image, jnp.zeros(image.shape[:2], bool)), cutpaste(cutpaste_key, image), scar(scar_key, image)]
    images, masks = zip(*samples, strict=True)
    return jnp.stack(images), jnp.stack(masks)
