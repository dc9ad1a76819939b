"""Sources of anomalies: procedural textures, and random changes that make many textures of a few."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from jaxad.base import Key
from jaxad.synthesis.color import change_hue, gray_of, scale_difference
from jaxad.synthesis.perlin import fractal_noise
from jaxad.synthesis.warp import rotate

LEVELS = 256
BOLD = (
    "gamma",
    "brightness",
    "solarize",
    "posterize",
    "invert",
    "autocontrast",
    "equalize",
    "sharpen",
    "hue",
    "rotate",
)
"""DRAEM's changes; the first seven are lookup tables of levels."""
TABLES = 7
GENTLE = ("contrast", "brightness", "color", "mirror", "flip", "gray", "autocontrast", "equalize", "rotate")
"""GLASS's changes."""


def texture(key: Key, size: tuple[int, int]) -> Float[Array, "h w 3"]:
    """A procedural texture in [0, 1]: a random mix of clouds, stripes, checks and grain, between two colors."""
    weight_key, colors_key, clouds_key, warp_key, lines_key, grain_key = jax.random.split(key, 6)
    y, x = jnp.meshgrid(*(jnp.linspace(0, 1, n) for n in size), indexing="ij")
    warp = fractal_noise(warp_key, size, (4, 4), 3)
    angle, frequency, phase = jax.random.uniform(lines_key, (3,)) * jnp.asarray([jnp.pi, 60.0, 1.0])
    u = (jnp.cos(angle) * y + jnp.sin(angle) * x + 0.1 * warp) * (6 + frequency) + phase
    v = (jnp.cos(angle) * x - jnp.sin(angle) * y + 0.1 * warp) * (6 + frequency)
    patterns = jnp.stack(
        [
            fractal_noise(clouds_key, size, (3, 3), 6, 0.7),
            jnp.sin(2 * jnp.pi * u),
            jnp.sin(2 * jnp.pi * u) * jnp.sin(2 * jnp.pi * v),
            fractal_noise(grain_key, size, (24, 24), 3, 0.9),
        ]
    )
    weights = jax.random.dirichlet(weight_key, jnp.full(len(patterns), 0.3))
    pattern = jnp.tensordot(weights, patterns, 1)
    low, high = jax.random.uniform(colors_key, (2, 3))
    return low + (high - low) * (0.5 + 0.5 * jnp.tanh(3 * pattern)[..., None])


def histogram(levels: Int[Array, "h w 3"]) -> Float[Array, "3 256"]:
    """The number of pixels at every level, per channel."""
    channel = jnp.broadcast_to(jnp.arange(3), levels.shape)
    return jnp.zeros((3, LEVELS)).at[channel, levels].add(1.0)


def autocontrast(count: Float[Array, "3 256"], percent: Float[Array, ""]) -> Float[Array, "3 256"]:
    """Pillow's `ImageOps.autocontrast` as a lookup table: stretches the levels to the full range [0, 1].

    Args:
        count: The histogram of every channel.
        percent: How many of the darkest and of the brightest pixels are cut off. If none is left, the levels stay.
    """
    level = jnp.arange(LEVELS, dtype=jnp.float32)
    cut = jnp.floor(count.sum(1, keepdims=True) * percent / 100)
    low = jnp.argmax(jnp.cumsum(count, 1) > cut, 1, keepdims=True).astype(jnp.float32)
    high = LEVELS - 1 - jnp.argmax(jnp.cumsum(count[:, ::-1], 1) > cut, 1, keepdims=True).astype(jnp.float32)
    return jnp.where(high > low, (level - low) / jnp.where(high > low, high - low, 1), level / (LEVELS - 1))


def equalize(count: Float[Array, "3 256"]) -> Float[Array, "3 256"]:
    """Pillow's `ImageOps.equalize` as a lookup table: spreads the pixels evenly over the levels, in [0, 1]."""
    level = jnp.arange(LEVELS, dtype=jnp.float32)
    below, top = jnp.cumsum(count, 1) - count, jnp.argmax(jnp.where(count > 0, level, -1), 1)
    step = jnp.floor((count.sum(1) - count[jnp.arange(3), top]) / (LEVELS - 1))[:, None]
    equalized = jnp.floor((below + jnp.floor(step / 2)) / jnp.maximum(step, 1))
    return jnp.clip(jnp.where(step > 0, equalized, level) / (LEVELS - 1), 0, 1)


def lookup_tables(key: Key, count: Float[Array, "3 256"]) -> Float[Array, "7 3 256"]:
    """The new value in [0, 1] of every level under each of the first seven changes of `BOLD`, per channel.

    Args:
        key: Draws their strengths.
        count: The histogram of every channel.
    """
    gamma_key, strength_key, solarize_key = jax.random.split(key, 3)
    level = jnp.broadcast_to(jnp.arange(LEVELS, dtype=jnp.float32) / (LEVELS - 1), (3, LEVELS))
    multiply, add, threshold, bits, cut = jax.random.uniform(strength_key, (5,))
    solarized = jnp.where(level < (32 + 96 * threshold) / 255, level, 1 - level)
    step = 2.0 ** jnp.floor(8 * bits)  # drops 0 to 7 of 8 bits
    tables = [
        level ** jax.random.uniform(gamma_key, (3, 1), minval=0.5, maxval=2.0),
        level * (0.8 + 0.4 * multiply) + (60 * add - 30) / 255,
        jnp.where(jax.random.bernoulli(solarize_key), solarized, level),
        jnp.floor(level * 255 / step) * step / 255,
        1 - level,
        autocontrast(count, jnp.floor(21 * cut)),
        equalize(count),
    ]
    return jnp.clip(jnp.stack(tables), 0, 1)


def sharpen(image: Float[Array, "h w 3"], factor: Float[Array, ""]) -> Float[Array, "h w 3"]:
    """Pillow's `ImageEnhance.Sharpness`: a factor of 0 smooths, 1 changes nothing, 2 sharpens."""
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)), "edge")
    smooth = (jax.lax.reduce_window(padded, 0.0, jax.lax.add, (3, 3, 1), (1, 1, 1), "VALID") + 4 * image) / 13
    return jnp.clip(smooth + factor * (image - smooth), 0, 1)


def bold_change(key: Key, image: Float[Array, "h w 3"], number: Int[Array, ""]) -> Float[Array, "h w 3"]:
    """The change of `BOLD` with the given number, of random strength."""
    tables_key, sharpen_key, hue_key, angle_key = jax.random.split(key, 4)
    levels = jnp.round(image * (LEVELS - 1)).astype(jnp.int32)
    table = lookup_tables(tables_key, histogram(levels))[jnp.minimum(number, TABLES - 1)]
    mapped = table[jnp.arange(3), levels]
    sharpened = sharpen(image, jax.random.uniform(sharpen_key, maxval=2.0))
    hue, saturation = jax.random.uniform(hue_key, (2,), minval=-50 / 255, maxval=50 / 255)
    colored = change_hue(image, hue, saturation)
    rotated = rotate(image, jax.random.uniform(angle_key, minval=-45.0, maxval=45.0))
    conditions = [number < TABLES, number == TABLES, number == TABLES + 1]
    return jnp.select([jnp.broadcast_to(c, image.shape) for c in conditions], [mapped, sharpened, colored], rotated)


def gentle_change(key: Key, image: Float[Array, "h w 3"], number: Int[Array, ""]) -> Float[Array, "h w 3"]:
    """The change of `GENTLE` with the given number, of random strength."""
    factor_key, hue_key, angle_key = jax.random.split(key, 3)
    factor, gray = jax.random.uniform(factor_key, minval=0.8, maxval=1.2), gray_of(image)
    levels = jnp.round(image * (LEVELS - 1)).astype(jnp.int32)
    count, channel = histogram(levels), jnp.arange(3)
    choices = [
        scale_difference(gray.mean(), image, factor),
        scale_difference(jnp.zeros(()), image, factor),
        change_hue(scale_difference(gray, image, factor), jax.random.uniform(hue_key, minval=-0.2, maxval=0.2)),
        image[:, ::-1],
        image[::-1],
        jnp.broadcast_to(gray, image.shape),
        autocontrast(count, jnp.zeros(()))[channel, levels],
        equalize(count)[channel, levels],
        rotate(image, jax.random.uniform(angle_key, minval=-45.0, maxval=45.0)),
    ]
    return jnp.stack(choices)[number]


class Changes(NamedTuple):
    """A set of random changes of textures."""

    count: int
    """Number of changes."""
    change: Callable[[Key, Array, Array], Array]
    """(key, image, number) -> the image after the change with that number."""


BOLD_CHANGES = Changes(len(BOLD), bold_change)
"""DRAEM, ICCV 2021, arXiv:2108.07610, section 3.3; the ranges are those of its official code."""
GENTLE_CHANGES = Changes(len(GENTLE), gentle_change)
"""GLASS, ECCV 2024, arXiv:2407.09359; as in its official code, a third of the textures become gray."""
CHANGES_PER_TEXTURE = 3
"""Changes of one texture, all different, in random order."""


def change_texture(key: Key, image: Float[Array, "h w 3"], changes: Changes) -> Float[Array, "h w 3"]:
    """The texture after three random changes of a set; all values are in [0, 1]."""
    order_key, changes_key = jax.random.split(key)
    numbers = jax.random.permutation(order_key, changes.count)[:CHANGES_PER_TEXTURE]

    def step(image: Array, draw: tuple[Array, Array]) -> tuple[Array, None]:
        key, number = draw
        return changes.change(key, image, number), None

    return jax.lax.scan(step, image, (jax.random.split(changes_key, CHANGES_PER_TEXTURE), numbers))[0]


def source(
    key: Key, size: tuple[int, int], textures: UInt8[Array, "n _ _ 3"] | None, changes: Changes | None
) -> Float[Array, "h w 3"]:
    """A random source of anomalies, in [0, 1].

    Args:
        key: Draws the texture and its changes.
        size: Height and width in pixels.
        textures: Photographs to choose from, resized to `size` if they have another; None draws a procedural texture.
        changes: The set of changes of which three are applied; None applies none.
    """
    texture_key, changes_key = jax.random.split(key)
    if textures is None:
        image = texture(texture_key, size)
    else:
        image = textures[jax.random.randint(texture_key, (), 0, len(textures))].astype(jnp.float32) / 255
        if image.shape[:2] != size:
            image = jax.image.resize(image, (*size, 3), "linear")
    return image if changes is None else change_texture(changes_key, image, changes)
