"""Anomalies drawn onto normal images: textures within random shapes, shuffled tiles, confetti.

All are pure functions of a key and one image in [0, 1], and give the image with the anomaly and the mask of its pixels.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxad.base import Key
from jaxad.synthesis.color import color_jitter, gray_of
from jaxad.synthesis.perlin import perlin_mask
from jaxad.synthesis.warp import rotate

Anomalous = tuple[Float[Array, "h w 3"], Bool[Array, "h w"]]
"""An image, and the pixels of its anomaly."""


def blended(
    image: Float[Array, "h w 3"], source: Float[Array, "h w 3"], mask: Bool[Array, "h w"], opacity: Float[Array, ""]
) -> Float[Array, "h w 3"]:
    """The image with so much of the source where the mask is, and so much less of its own (DRAEM, section 3.3)."""
    return jnp.where(mask[..., None], (1 - opacity) * image + opacity * source, image)


def textured(
    key: Key,
    image: Float[Array, "h w 3"],
    source: Float[Array, "h w 3"],
    *,
    opacity: tuple[float, float] = (0.2, 1.0),
    exponents: tuple[int, int] | None = None,
    foreground: Bool[Array, "h w"] | None = None,
) -> Anomalous:
    """DRAEM's anomaly: a source shows through the image where Perlin noise is high.

    Args:
        key: Draws shape and opacity.
        image: In [0, 1].
        source: The texture.
        opacity: Least and largest; DRAEM's code has 0.2 to 1 (its paper 0.1 to 1), MemSeg 0.15 to 1.
        exponents: Of the noise's cells, as `perlin_mask` has them.
        foreground: Where an anomaly may be; everywhere unless given (MemSeg: on the object).
    """
    shape, how = jax.random.split(key)
    mask = perlin_mask(shape, (image.shape[0], image.shape[1]), exponents)
    if foreground is not None:
        mask = mask & foreground
    return blended(image, source, mask, jax.random.uniform(how, minval=opacity[0], maxval=opacity[1])), mask


def shuffled(key: Key, image: Float[Array, "h w 3"], grid: tuple[int, int] = (4, 8)) -> Float[Array, "h w 3"]:
    """MemSeg's structural source: the image, mirrored, rotated and of other colors at random, in tiles out of order.

    Args:
        key: Draws all that is random.
        image: In [0, 1], its sides multiples of the grid.
        grid: Tiles down and across.

    Raises:
        ValueError: The tiles do not fill the image.

    Source: MemSeg, arXiv:2205.00908, section 3.2.
    """
    h, w, _ = image.shape
    down, across = grid
    if h % down or w % across:
        raise ValueError(f"the image must be multiples of {down} x {across} pixels for as many tiles, got {h} x {w}")
    mirror, turn, color, order = jax.random.split(key, 4)
    flips = jax.random.bernoulli(mirror, shape=(2,))
    image = jnp.where(flips[0], image[::-1], image)
    image = jnp.where(flips[1], image[:, ::-1], image)
    image = rotate(image, jax.random.uniform(turn, minval=-45.0, maxval=45.0))
    image = color_jitter(color, image, 0.2)
    return permuted(order, image, grid)


def permuted(key: Key, image: Float[Array, "h w c"], grid: tuple[int, int]) -> Float[Array, "h w c"]:
    """The image's tiles in random order."""
    (h, w, c), (down, across) = image.shape, grid
    tiles = image.reshape(down, h // down, across, w // across, c).swapaxes(1, 2).reshape(down * across, -1)
    tiles = jax.random.permutation(key, tiles).reshape(down, across, h // down, w // across, c)
    return tiles.swapaxes(1, 2).reshape(h, w, c)


def foreground(image: Float[Array, "h w 3"]) -> Bool[Array, "h w"]:
    """The object: what Otsu's threshold of brightness parts from the border of the image, where most is background.

    Of an image of one brightness it is everything.

    Source: Otsu, A threshold selection method from gray-level histograms, 1979.
    """
    level = jnp.round(gray_of(image)[..., 0] * 255).astype(jnp.int32)
    count = jnp.zeros(256).at[level].add(1.0)
    below, total = jnp.cumsum(count), jnp.cumsum(count * jnp.arange(256, dtype=jnp.float32))
    above = below[-1] - below
    between = (total * below[-1] - total[-1] * below) ** 2 / jnp.maximum(below * above, 1)
    bright = level > jnp.argmax(jnp.where((below > 0) & (above > 0), between, -1))
    border = jnp.concatenate([bright[0], bright[-1], bright[:, 0], bright[:, -1]])
    found = jnp.where(border.mean() > 0.5, ~bright, bright)
    return found | ~found.any()


def confetti(
    key: Key,
    image: Float[Array, "h w 3"],
    *,
    most: int = 4,
    side: tuple[float, float] = (8 / 240, 54 / 240),
    degrees: float = 45.0,
) -> Anomalous:
    """Confetti: rotated rectangles of one random color each, half of them gray; a later one covers earlier ones.

    Args:
        key: Draws all that is random.
        image: In [0, 1].
        most: Rectangles at most; how many is drawn evenly from 1.
        side: Least and largest height and width, as shares of the image's height.
        degrees: Largest rotation, either way.

    Source: FCDD, ICLR 2021, arXiv:2007.01760; there a rectangle's color is added to the image's, and smoothed.
    """
    h, w, _ = image.shape
    many, place, size, turn, hue, plain = jax.random.split(key, 6)
    middle = jax.random.uniform(place, (most, 2)) * jnp.asarray([h, w], jnp.float32)
    half = h / 2 * jax.random.uniform(size, (most, 2), minval=side[0], maxval=side[1])
    angle = jax.random.uniform(turn, (most, 1, 1), minval=-degrees, maxval=degrees) * (jnp.pi / 180)
    y = jnp.arange(h, dtype=jnp.float32)[:, None] - middle[:, 0, None, None]
    x = jnp.arange(w, dtype=jnp.float32)[None, :] - middle[:, 1, None, None]
    down = jnp.abs(jnp.cos(angle) * y + jnp.sin(angle) * x) < half[:, 0, None, None]
    across = jnp.abs(jnp.cos(angle) * x - jnp.sin(angle) * y) < half[:, 1, None, None]
    number = jnp.arange(1, most + 1)[:, None, None]
    covered = down & across & (number <= jax.random.randint(many, (), 1, most + 1))
    last = jnp.where(covered, number, 0).max(0)
    color = jax.random.uniform(hue, (most, 3))
    color = jnp.where(jax.random.bernoulli(plain, shape=(most, 1)), color.mean(1, keepdims=True), color)
    mask = last > 0
    return jnp.where(mask[..., None], color[last - 1], image), mask
