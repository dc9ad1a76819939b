"""Sources of anomalies: textures made without any image, and textures changed so that few suffice."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from jaxad.base import Key
from jaxad.synthesis.color import apart_from, gray_of, other_hue
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
"""Those of DRAEM. The first seven map the levels of a channel."""
IN_LEVELS = 7
GENTLE = ("contrast", "brightness", "color", "mirror", "flip", "gray", "autocontrast", "equalize", "rotate")
"""Those of GLASS."""


def texture(key: Key, size: tuple[int, int]) -> Float[Array, "h w 3"]:
    """A made-up texture in [0, 1].

    Clouds, stripes, checks and grains of several scales, in two colors and what lies between them.
    """
    kind, colors, clouds, warp, lines, grain = jax.random.split(key, 6)
    y, x = jnp.meshgrid(*(jnp.linspace(0, 1, n) for n in size), indexing="ij")
    sway = fractal_noise(warp, size, (4, 4), 3)
    angle, frequency, phase = jax.random.uniform(lines, (3,)) * jnp.asarray([jnp.pi, 60.0, 1.0])
    along = (jnp.cos(angle) * y + jnp.sin(angle) * x + 0.1 * sway) * (6 + frequency) + phase
    across = (jnp.cos(angle) * x - jnp.sin(angle) * y + 0.1 * sway) * (6 + frequency)
    shapes = jnp.stack(
        [
            fractal_noise(clouds, size, (3, 3), 6, 0.7),
            jnp.sin(2 * jnp.pi * along),
            jnp.sin(2 * jnp.pi * along) * jnp.sin(2 * jnp.pi * across),
            fractal_noise(grain, size, (24, 24), 3, 0.9),
        ]
    )
    weight = jax.random.dirichlet(kind, jnp.full(len(shapes), 0.3))
    shape = jnp.tensordot(weight, shapes, 1)
    low, high = jax.random.uniform(colors, (2, 3))
    return low + (high - low) * (0.5 + 0.5 * jnp.tanh(3 * shape)[..., None])


def histogram(levels: Int[Array, "h w 3"]) -> Float[Array, "3 256"]:
    """How many pixels of every channel have each level."""
    channel = jnp.broadcast_to(jnp.arange(3), levels.shape)
    return jnp.zeros((3, LEVELS)).at[channel, levels].add(1.0)


def autocontrast(count: Float[Array, "3 256"], percent: Float[Array, ""]) -> Float[Array, "3 256"]:
    """Every level stretched so that all but so many of the darkest and brightest pixels fill the range, as Pillow does.

    Channels of which nothing is left keep their levels.
    """
    level = jnp.arange(LEVELS, dtype=jnp.float32)
    cut = jnp.floor(count.sum(1, keepdims=True) * percent / 100)
    low = jnp.argmax(jnp.cumsum(count, 1) > cut, 1, keepdims=True).astype(jnp.float32)
    high = LEVELS - 1 - jnp.argmax(jnp.cumsum(count[:, ::-1], 1) > cut, 1, keepdims=True).astype(jnp.float32)
    return jnp.where(high > low, (level - low) / jnp.where(high > low, high - low, 1), level / (LEVELS - 1))


def equalized(count: Float[Array, "3 256"]) -> Float[Array, "3 256"]:
    """Every level moved so that pixels are spread evenly, as Pillow does."""
    level = jnp.arange(LEVELS, dtype=jnp.float32)
    below, top = jnp.cumsum(count, 1) - count, jnp.argmax(jnp.where(count > 0, level, -1), 1)
    step = jnp.floor((count.sum(1) - count[jnp.arange(3), top]) / (LEVELS - 1))[:, None]
    found = jnp.floor((below + jnp.floor(step / 2)) / jnp.maximum(step, 1))
    return jnp.clip(jnp.where(step > 0, found, level) / (LEVELS - 1), 0, 1)


def tables(key: Key, count: Float[Array, "3 256"]) -> Float[Array, "7 3 256"]:
    """What the changes that map levels make of each, in [0, 1], for channels of those histograms."""
    gamma, brightness, sharp = jax.random.split(key, 3)
    level = jnp.broadcast_to(jnp.arange(LEVELS, dtype=jnp.float32) / (LEVELS - 1), (3, LEVELS))
    multiply, add, least, bits, cut = jax.random.uniform(brightness, (5,))
    solarized = jnp.where(level < (32 + 96 * least) / 255, level, 1 - level)
    lost = 2.0 ** jnp.floor(8 * bits)  # none to 7 bits of 8
    posterized = jnp.floor(level * 255 / lost) * lost / 255
    made = [
        level ** jax.random.uniform(gamma, (3, 1), minval=0.5, maxval=2.0),
        level * (0.8 + 0.4 * multiply) + (60 * add - 30) / 255,
        jnp.where(jax.random.bernoulli(sharp), solarized, level),
        posterized,
        1 - level,
        autocontrast(count, jnp.floor(21 * cut)),
        equalized(count),
    ]
    return jnp.clip(jnp.stack(made), 0, 1)


def sharper(image: Float[Array, "h w 3"], factor: Float[Array, ""]) -> Float[Array, "h w 3"]:
    """The image's difference to a smoothed one times a factor, as Pillow does: 0 is smooth, 2 is sharp."""
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)), "edge")
    smooth = (jax.lax.reduce_window(padded, 0.0, jax.lax.add, (3, 3, 1), (1, 1, 1), "VALID") + 4 * image) / 13
    return jnp.clip(smooth + factor * (image - smooth), 0, 1)


def bold_change(key: Key, image: Float[Array, "h w 3"], which: Int[Array, ""]) -> Float[Array, "h w 3"]:
    """One of `BOLD`, by number."""
    by_level, sharp, hue, turn = jax.random.split(key, 4)
    levels = jnp.round(image * (LEVELS - 1)).astype(jnp.int32)
    table = tables(by_level, histogram(levels))[jnp.minimum(which, IN_LEVELS - 1)]
    mapped = table[jnp.arange(3), levels]
    sharpened = sharper(image, jax.random.uniform(sharp, maxval=2.0))
    shift, more = jax.random.uniform(hue, (2,), minval=-50 / 255, maxval=50 / 255)
    colored = other_hue(image, shift, more)
    turned = rotate(image, jax.random.uniform(turn, minval=-45.0, maxval=45.0))
    choices = [which < IN_LEVELS, which == IN_LEVELS, which == IN_LEVELS + 1]
    return jnp.select([jnp.broadcast_to(c, image.shape) for c in choices], [mapped, sharpened, colored], turned)


def gentle_change(key: Key, image: Float[Array, "h w 3"], which: Int[Array, ""]) -> Float[Array, "h w 3"]:
    """One of `GENTLE`, by number."""
    by, hue, turn = jax.random.split(key, 3)
    factor, gray = jax.random.uniform(by, minval=0.8, maxval=1.2), gray_of(image)
    levels = jnp.round(image * (LEVELS - 1)).astype(jnp.int32)
    count, channel = histogram(levels), jnp.arange(3)
    choices = [
        apart_from(gray.mean(), image, factor),
        apart_from(jnp.zeros(()), image, factor),
        other_hue(apart_from(gray, image, factor), jax.random.uniform(hue, minval=-0.2, maxval=0.2)),
        image[:, ::-1],
        image[::-1],
        jnp.broadcast_to(gray, image.shape),
        autocontrast(count, jnp.zeros(()))[channel, levels],
        equalized(count)[channel, levels],
        rotate(image, jax.random.uniform(turn, minval=-45.0, maxval=45.0)),
    ]
    return jnp.stack(choices)[which]


class Changes(NamedTuple):
    """Ways to change a texture: how many there are, and what makes the one of a number."""

    count: int
    change: Callable[[Key, Array, Array], Array]


BOLD_CHANGES = Changes(len(BOLD), bold_change)
"""DRAEM, ICCV 2021, arXiv:2108.07610, section 3.3; the ranges are those of its official code."""
GENTLE_CHANGES = Changes(len(GENTLE), gentle_change)
"""GLASS, ECCV 2024, arXiv:2407.09359; as in its official code, which makes a third of the textures gray."""
AT_ONCE = 3
"""Changes of a texture, different ones, in random order."""


def changed(key: Key, image: Float[Array, "h w 3"], changes: Changes) -> Float[Array, "h w 3"]:
    """A texture after some of those changes."""
    order, draw = jax.random.split(key)
    chosen = jax.random.permutation(order, changes.count)[:AT_ONCE]

    def step(image: Array, given: tuple[Array, Array]) -> tuple[Array, None]:
        return changes.change(given[0], image, given[1]), None

    return jax.lax.scan(step, image, (jax.random.split(draw, AT_ONCE), chosen))[0]


def source(
    key: Key, size: tuple[int, int], textures: UInt8[Array, "n _ _ 3"] | None, changes: Changes | None
) -> Float[Array, "h w 3"]:
    """A source of anomalies in [0, 1]: one of the textures given, or a made-up one, changed."""
    which, how = jax.random.split(key)
    if textures is None:
        found = texture(which, size)
    else:
        found = textures[jax.random.randint(which, (), 0, len(textures))].astype(jnp.float32) / 255
        if found.shape[:2] != size:
            found = jax.image.resize(found, (*size, 3), "linear")
    return found if changes is None else changed(how, found, changes)
