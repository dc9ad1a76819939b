"""Anomalies drawn onto normal images: textures in random shapes, shuffled tiles, confetti.

Every generator is a pure function of a key and an image in [0, 1], and returns the image and the mask of its anomaly.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxad.base import Key
from jaxad.synthesis.color import color_jitter, gray_of
from jaxad.synthesis.perlin import perlin_mask
from jaxad.synthesis.warp import rotate

Anomalous = tuple[Float[Array, "h w 3"], Bool[Array, "h w"]]
"""An image with an anomaly, and the mask of the anomaly."""


def blend(
    image: Float[Array, "h w 3"], source: Float[Array, "h w 3"], mask: Bool[Array, "h w"], opacity: Float[Array, ""]
) -> Float[Array, "h w 3"]:
    """The image, with the source blended in inside the mask (DRAEM, section 3.3).

    An opacity of 1 shows the source alone.
    """
    return jnp.where(mask[..., None], (1 - opacity) * image + opacity * source, image)


def add_texture(
    key: Key,
    image: Float[Array, "h w 3"],
    source: Float[Array, "h w 3"],
    *,
    opacity: tuple[float, float] = (0.2, 1.0),
    exponents: tuple[int, int] | None = None,
    foreground: Bool[Array, "h w"] | None = None,
) -> Anomalous:
    """DRAEM's anomaly: a source blended into the image where Perlin noise is high.

    Args:
        key: Draws shape and opacity.
        image: In [0, 1].
        source: The texture, in [0, 1].
        opacity: Range of the opacity; 0.2 to 1 in DRAEM's code (0.1 to 1 in its paper), 0.15 to 1 in MemSeg.
        exponents: Range of the noise's cells, see `perlin_mask`.
        foreground: Pixels where the anomaly may be (in MemSeg, the object); all by default.

    Source: DRAEM, ICCV 2021, arXiv:2108.07610, section 3.3.
    """
    mask_key, opacity_key = jax.random.split(key)
    mask = perlin_mask(mask_key, (image.shape[0], image.shape[1]), exponents)
    if foreground is not None:
        mask = mask & foreground
    return blend(image, source, mask, jax.random.uniform(opacity_key, minval=opacity[0], maxval=opacity[1])), mask


def shuffled_tiles(key: Key, image: Float[Array, "h w 3"], grid: tuple[int, int] = (4, 8)) -> Float[Array, "h w 3"]:
    """MemSeg's structural source: the image, randomly flipped, rotated and recolored, with its tiles shuffled.

    Args:
        key: Draws flips, rotation, color jitter and order.
        image: In [0, 1]; height and width are multiples of the grid.
        grid: Rows and columns of tiles.

    Raises:
        ValueError: The sides of the image are not multiples of the grid.

    Source: MemSeg, arXiv:2205.00908, section 3.2.
    """
    h, w, _ = image.shape
    rows, columns = grid
    if h % rows or w % columns:
        raise ValueError(f"height and width must be multiples of {grid}, the rows and columns of tiles, got {(h, w)}")
    flip_key, angle_key, color_key, tiles_key = jax.random.split(key, 4)
    flips = jax.random.bernoulli(flip_key, shape=(2,))
    image = jnp.where(flips[0], image[::-1], image)
    image = jnp.where(flips[1], image[:, ::-1], image)
    image = rotate(image, jax.random.uniform(angle_key, minval=-45.0, maxval=45.0))
    image = color_jitter(color_key, image, 0.2)
    return shuffle_tiles(tiles_key, image, grid)


def shuffle_tiles(key: Key, image: Float[Array, "h w c"], grid: tuple[int, int]) -> Float[Array, "h w c"]:
    """The image with the tiles of a grid (rows, columns) in random order."""
    (h, w, c), (rows, columns) = image.shape, grid
    tiles = image.reshape(rows, h // rows, columns, w // columns, c).swapaxes(1, 2).reshape(rows * columns, -1)
    tiles = jax.random.permutation(key, tiles).reshape(rows, columns, h // rows, w // columns, c)
    return tiles.swapaxes(1, 2).reshape(h, w, c)


def foreground(image: Float[Array, "h w 3"]) -> Bool[Array, "h w"]:
    """The mask of the object by Otsu's threshold of the luma; most of the image's border is background.

    An image of uniform luma is all foreground.

    Source: Otsu, A threshold selection method from gray-level histograms, 1979.
    """
    level = jnp.round(gray_of(image)[..., 0] * 255).astype(jnp.int32)
    count = jnp.zeros(256).at[level].add(1.0)
    below, total = jnp.cumsum(count), jnp.cumsum(count * jnp.arange(256, dtype=jnp.float32))
    above = below[-1] - below
    variance = (total * below[-1] - total[-1] * below) ** 2 / jnp.maximum(below * above, 1)  # between both sides
    bright = level > jnp.argmax(jnp.where((below > 0) & (above > 0), variance, -1))
    border = jnp.concatenate([bright[0], bright[-1], bright[:, 0], bright[:, -1]])
    mask = jnp.where(border.mean() > 0.5, ~bright, bright)
    return mask | ~mask.any()


def confetti(
    key: Key,
    image: Float[Array, "h w 3"],
    *,
    max_rectangles: int = 4,
    side: tuple[float, float] = (8 / 240, 54 / 240),
    degrees: float = 45.0,
) -> Anomalous:
    """Confetti: rotated rectangles of one random color each, half of them gray; later ones cover earlier ones.

    Args:
        key: Draws number, places, sizes, rotations and colors.
        image: In [0, 1].
        max_rectangles: Largest number of rectangles; the number is uniform from 1.
        side: Range of height and width, as fractions of the image's height.
        degrees: Largest rotation, in both directions.

    Source: FCDD, ICLR 2021, arXiv:2007.01760, where the colors are added to the image and smoothed.
    """
    h, w, _ = image.shape
    count_key, center_key, size_key, angle_key, color_key, gray_key = jax.random.split(key, 6)
    center = jax.random.uniform(center_key, (max_rectangles, 2)) * jnp.asarray([h, w], jnp.float32)
    half = h / 2 * jax.random.uniform(size_key, (max_rectangles, 2), minval=side[0], maxval=side[1])
    angle = jax.random.uniform(angle_key, (max_rectangles, 1, 1), minval=-degrees, maxval=degrees) * (jnp.pi / 180)
    y = jnp.arange(h, dtype=jnp.float32)[:, None] - center[:, 0, None, None]
    x = jnp.arange(w, dtype=jnp.float32)[None, :] - center[:, 1, None, None]
    in_height = jnp.abs(jnp.cos(angle) * y + jnp.sin(angle) * x) < half[:, 0, None, None]
    in_width = jnp.abs(jnp.cos(angle) * x - jnp.sin(angle) * y) < half[:, 1, None, None]
    number = jnp.arange(1, max_rectangles + 1)[:, None, None]
    drawn = number <= jax.random.randint(count_key, (), 1, max_rectangles + 1)
    top = jnp.where(in_height & in_width & drawn, number, 0).max(0)
    color = jax.random.uniform(color_key, (max_rectangles, 3))
    is_gray = jax.random.bernoulli(gray_key, shape=(max_rectangles, 1))
    color = jnp.where(is_gray, color.mean(1, keepdims=True), color)
    mask = top > 0
    return jnp.where(mask[..., None], color[top - 1], image), mask
