"""Natural synthetic anomalies (NSA): patches of another normal image, resized and cloned in without a visible border.

Source: Natural Synthetic Anomalies for Self-Supervised Anomaly Detection and Localization, ECCV 2022, arXiv:2109.15222.
Differences from its code: objects are compared at 16 x 16 points, and a patch with an odd number of columns is not
moved to the right by a pixel.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Bool, Float

from jaxad.base import Key
from jaxad.synthesis.poisson import seamless_clone

TRIES = 200
"""Random places of a patch; the first valid one is used, and the patch is left out if none is valid."""
POINTS = 16
"""Rows and columns of the points at which two foregrounds are compared."""
ROUNDING = 1e-3
"""Added before numbers are rounded down, which are integers but for the last bits of a float."""
LEAST_AREA = 50
"""Pixels of the smallest patch that is cloned."""
SQUARE, DISK = np.ones((5, 5), bool), np.hypot(*(np.indices((11, 11)) - 5)) <= 5
"""Neighborhoods whose median says whether a pixel has changed, and how much."""


Label = Literal["binary", "intensity", "logistic"]
"""Label of a changed pixel: 1, its mean change, or a logistic function of that; 0 for all others."""


class Sizes(NamedTuple):
    """Distribution of half the height and width of a patch, as fractions of the image's.

    A Gamma distribution of the given shape and scale is shifted by the offset and clipped to [least, most].
    """

    least: float = 0.03
    most: float = 0.4
    gamma: tuple[float, float, float] = (2.0, 0.05, 0.03)
    """Shape, scale and offset."""


def coverage(mask: Bool[Array, "h w"], corner: Float[Array, "n 2"], size: Float[Array, "n 2"]) -> Float[Array, "n"]:
    """The fraction of every rectangle that lies in the mask."""
    sums = jnp.pad(jnp.cumsum(jnp.cumsum(mask.astype(jnp.float32), 0), 1), ((1, 0), (1, 0)))
    (top, left), (bottom, right) = (jnp.round(edge).astype(jnp.int32).T for edge in (corner, corner + size))
    total = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    return total / jnp.maximum((bottom - top) * (right - left), 1).astype(jnp.float32)


def first_valid(valid: Bool[Array, "n"], x: Float[Array, "n d"]) -> tuple[Float[Array, "d"], Bool[Array, ""]]:
    """The first valid row, and whether there is one."""
    return x[jnp.argmax(valid)], valid.any()


def side_range(dims: Float[Array, "2"], sizes: Sizes) -> tuple[Float[Array, "2"], Float[Array, "2"]]:
    """The least and the most pixels of half a side, for images of height and width `dims`."""
    return jnp.round(sizes.least * dims), jnp.round(sizes.most * dims)


def half_sides(key: Key, dims: Float[Array, "2"], sizes: Sizes) -> Float[Array, "2"]:
    """Half the height and width of a random patch in pixels, for images of height and width `dims`."""
    shape, scale, offset = sizes.gamma
    return jnp.floor(jnp.clip((offset + scale * jax.random.gamma(key, shape, (2,))) * dims, *side_range(dims, sizes)))


def add_patch(
    key: Key,
    target: Float[Array, "h w 3"],
    source: Float[Array, "h w 3"],
    foregrounds: tuple[Bool[Array, "h w"], Bool[Array, "h w"]] | None,
    sizes: Sizes,
    resize: tuple[float, float],
    least_object: float,
    least_overlap: float,
    mixed: Bool[Array, ""],
) -> tuple[Float[Array, "h w 3"], Bool[Array, "h w"], Bool[Array, "h w"]]:
    """The target with a random patch of the source, the pixels of the patch, and those of them that show an object.

    The arguments are those of `natural_anomaly`.
    """
    dims = jnp.asarray(target.shape[:2], jnp.float32)
    low, high = side_range(dims, sizes)
    side_key, center_key, resize_key, place_key = jax.random.split(key, 4)
    half = half_sides(side_key, dims, sizes)
    centers = low + jnp.floor(jax.random.uniform(center_key, (TRIES, 2)) * (dims - 2 * low))
    corners = jnp.maximum(centers - half, 0)
    lengths = jnp.minimum(centers + half, dims) - corners
    valid = jnp.ones(TRIES, bool) if foregrounds is None else coverage(foregrounds[1], corners, lengths) > least_object
    box, has_box = first_valid(valid, jnp.concatenate([corners, lengths], 1))
    corner, length = box[:2], box[2:]
    height = jnp.clip(jnp.clip(1 + 0.5 * jax.random.normal(resize_key), *resize) * length[0], low[0], high[0])
    width = jnp.clip(jnp.floor(height / length[0] * length[1] + ROUNDING), low[1], high[1])
    height = jnp.clip(jnp.floor(width / length[1] * length[0] + ROUNDING), low[0], high[0])
    size = jnp.stack([height, width])
    places = 1 + jnp.floor(jax.random.uniform(place_key, (TRIES, 2)) * (dims - 2 * jnp.floor(size / 2) - 2))
    valid = jnp.ones(TRIES, bool)
    if foregrounds is not None:
        target_object, source_object = foregrounds
        points = (jnp.arange(POINTS, dtype=jnp.float32) + 0.5) / POINTS

        def sample(mask: Array, corner: Array, length: Array) -> Array:
            row, column = (jnp.floor(c + points * n).astype(jnp.int32) for c, n in zip(corner, length, strict=True))
            return mask[row[:, None], column[None, :]]

        object_points = sample(source_object, corner, length)
        overlap = jax.vmap(lambda place: (sample(target_object, place, size) & object_points).mean())(places)
        valid = overlap > least_overlap * jnp.maximum(object_points.mean(), 1e-6)
    place, has_place = first_valid(valid, places)

    window = tuple(min(n, math.ceil(sizes.most * n) + 1) for n in target.shape[:2])
    start = jnp.minimum(place, dims - jnp.asarray(window, jnp.float32)).astype(jnp.int32)
    offset = place - start.astype(jnp.float32)
    row, column = (jnp.arange(n, dtype=jnp.float32) - o for n, o in zip(window, offset, strict=True))
    grid = (
        c + jnp.clip((i + 0.5) * n / s - 0.5, 0, n - 1)
        for i, n, s, c in zip((row, column), length, size, corner, strict=True)
    )
    y, x = jnp.meshgrid(*grid, indexing="ij")
    resized = lambda channel: map_coordinates(channel, [y, x], 1, "nearest")  # noqa: E731
    is_cloned = has_box & has_place & ((size - 2).prod() >= LEAST_AREA)

    def pixels(rim: int) -> Bool[Array, "h w"]:
        """Those of the window that lie in the patch, and at least so far from its border."""
        rows, columns = ((i >= rim) & (i < s - rim) for i, s in zip((row, column), size, strict=True))
        return rows[:, None] & columns[None, :] & is_cloned

    begin = (*start, jnp.int32(0))
    background = jax.lax.dynamic_slice(target, begin, (*window, 3))
    piece = jnp.round(255 * jax.vmap(resized, -1, -1)(source)) / 255
    cloned = seamless_clone(background, piece, pixels(2), mixed, pixels(4))  # as OpenCV does near the border
    cloned = jnp.floor(255 * cloned + ROUNDING) / 255
    patch = shown = pixels(0)
    if foregrounds is not None:
        there = jax.lax.dynamic_slice(target_object, start, window)
        shown = patch & (there | (resized(source_object.astype(jnp.float32)) > 0.5))
    nothing = jnp.zeros(target.shape[:2], bool)
    patch, shown = (jax.lax.dynamic_update_slice(nothing, mask, start) for mask in (patch, shown))
    return jax.lax.dynamic_update_slice(target, cloned, begin), patch, shown


def local_median(x: Float[Array, "h w"], window: Bool[np.ndarray, "k k"], largest: int) -> Float[Array, "h w"]:
    """The median of the window around every pixel, of integers from 0 to the largest; the edge repeats outside.

    By bisection: sorting is slow on every device.
    """
    (h, w), places = x.shape, np.argwhere(window)
    padded = jnp.pad(x, len(window) // 2, "edge")

    def halve(_: Array, interval: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = interval
        middle = jnp.floor((low + high) / 2)
        count = sum((padded[i : i + h, j : j + w] <= middle).astype(jnp.int32) for i, j in places)
        reached = 2 * count > len(places)
        return jnp.where(reached, low, middle), jnp.where(reached, middle, high)

    steps = math.ceil(math.log2(largest + 1))
    return jax.lax.fori_loop(0, steps, halve, (jnp.full_like(x, -1), jnp.full_like(x, largest)))[1]


def natural_anomaly(
    key: Key,
    target: Float[Array, "h w 3"],
    source: Float[Array, "h w 3"],
    *,
    foregrounds: tuple[Bool[Array, "h w"], Bool[Array, "h w"]] | None = None,
    pieces: int = 3,
    sizes: Sizes = Sizes(),
    resize: tuple[float, float] = (0.7, 1.3),
    least_object: float = 0.25,
    least_overlap: float = 0.25,
    mixed: bool = False,
    labels: Label = "logistic",
    logistic: tuple[float, float] = (1 / 6, 20.0),
) -> tuple[Float[Array, "h w 3"], Float[Array, "h w"]]:
    """NSA's anomaly: the target with patches of the source, and the label of every pixel, in [0, 1].

    Args:
        key: Draws number, places and sizes of the patches.
        target: The image to change, in [0, 1].
        source: Another normal image in [0, 1], from which the patches come.
        foregrounds: Masks of the objects in target and source. A patch must show an object, and overlap the target's.
        pieces: Largest number of patches; each one after the first is present with probability 1/2.
        sizes: Distribution of the patch size.
        resize: Range of the factor by which a patch is resized.
        least_object: Least fraction of a patch that shows the object; read only with `foregrounds`.
        least_overlap: Least fraction of the patch's object that lies on the target's; read only with `foregrounds`.
        mixed: Whether to clone the larger gradients of both images, as for textures.
        labels: Kind of the label.
        logistic: Slope and midpoint of the logistic function, for changes in levels of 255.

    Source: NSA, ECCV 2022, arXiv:2109.15222.
    """
    target, source = (jnp.round(255 * x) / 255 for x in (target, source))
    image, shown = target, jnp.zeros(target.shape[:2], bool)
    for i, patch_key in enumerate(jax.random.split(key, pieces)):
        draw_key, presence_key = jax.random.split(patch_key)
        options = (foregrounds, sizes, resize, least_object, least_overlap, jnp.asarray(mixed))
        patched, patch, objects = add_patch(draw_key, image, source, *options)
        is_present = jnp.asarray(i == 0) | jax.random.bernoulli(presence_key)
        image = jnp.where(is_present, patched, image)
        shown = jnp.where(is_present & patch, objects, shown)
    change = jnp.round(255 * jnp.abs(image - target).sum(-1))
    mask = local_median(((change > 3) & shown).astype(jnp.float32), SQUARE, 1)
    if labels == "binary":
        return image, mask
    intensity = local_median(mask * change, DISK, 3 * 255) / 3
    if labels == "intensity":
        return image, intensity / 255
    slope, midpoint = logistic
    return image, mask * jax.nn.sigmoid(slope * (intensity - midpoint))
