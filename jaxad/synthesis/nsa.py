"""Natural synthetic anomalies (NSA): patches of another normal image, resized and cloned in without a visible border.

Source: Natural Synthetic Anomalies for Self-Supervised Anomaly Detection and Localization, ECCV 2022, arXiv:2109.15222.
Differences from its code: labels average the change over 11 x 11 pixels instead of taking the median of a disk, and are
not restricted to the objects; the change is measured before values are rounded to levels, and zero outside the image;
32 places of a patch are tried instead of 200, and compared at 16 x 16 points; small patches are kept.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Bool, Float

from jaxad.base import Key
from jaxad.ops.heatmap import neighborhood_mean
from jaxad.synthesis.poisson import seamless_clone

TRIES = 32
"""Random places of a patch; the first valid one is used, and the patch is left out if none is valid."""
POINTS = 16
"""Rows and columns of the points at which two foregrounds are compared."""
CHANGED = 1 / 255
"""Mean absolute change of the channels above which a pixel is anomalous."""
LABEL_WINDOW = 11
"""Height and width of the neighborhood over which labels average the change."""


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


def half_sides(key: Key, dims: Float[Array, "2"], sizes: Sizes) -> Float[Array, "2"]:
    """Half the height and width of a random patch in pixels, for images of height and width `dims`."""
    shape, scale, offset = sizes.gamma
    return jnp.clip((offset + scale * jax.random.gamma(key, shape, (2,))) * dims, sizes.least * dims, sizes.most * dims)


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
) -> Float[Array, "h w 3"]:
    """The target with one random patch of the source; the arguments are those of `natural_anomaly`."""
    dims = jnp.asarray(target.shape[:2], jnp.float32)
    low, high = sizes.least * dims, sizes.most * dims
    side_key, center_key, resize_key, place_key = jax.random.split(key, 4)
    half = half_sides(side_key, dims, sizes)
    centers = low + jax.random.uniform(center_key, (TRIES, 2)) * (dims - 2 * low)
    corners = jnp.round(jnp.maximum(centers - half, 0))
    lengths = jnp.round(jnp.minimum(centers + half, dims)) - corners
    valid = jnp.ones(TRIES, bool) if foregrounds is None else coverage(foregrounds[1], corners, lengths) > least_object
    box, has_box = first_valid(valid, jnp.concatenate([corners, lengths], 1))
    corner, length = box[:2], box[2:]
    factor = jnp.clip(1 + 0.5 * jax.random.normal(resize_key), *resize)
    factor = jnp.clip(factor, (low / length).max(), (high / length).min())
    size = jnp.floor(jnp.minimum(factor * length, high))
    places = jnp.floor(jax.random.uniform(place_key, (TRIES, 2)) * (dims - size + 1))
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
    grid = ((i + 0.5) * n / s - 0.5 + c for i, n, s, c in zip((row, column), length, size, corner, strict=True))
    y, x = jnp.meshgrid(*grid, indexing="ij")
    patch = jax.vmap(lambda channel: map_coordinates(channel, [y, x], 1, "nearest"), -1, -1)(source)
    in_rows, in_columns = ((i > 0) & (i < s - 1) for i, s in zip((row, column), size, strict=True))
    mask = in_rows[:, None] & in_columns[None, :] & has_box & has_place
    begin = (*start, jnp.int32(0))
    cloned = seamless_clone(jax.lax.dynamic_slice(target, begin, (*window, 3)), patch, mask, mixed)
    return jax.lax.dynamic_update_slice(target, cloned, begin)


def local_mean(x: Float[Array, "h w"], side: int) -> Float[Array, "h w"]:
    """The mean of the side x side neighborhood of every pixel, with zeros outside the image."""
    return neighborhood_mean(x[None, ..., None], side)[0, ..., 0]


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
    image = target
    for i, patch_key in enumerate(jax.random.split(key, pieces)):
        draw_key, presence_key = jax.random.split(patch_key)
        options = (foregrounds, sizes, resize, least_object, least_overlap, jnp.asarray(mixed))
        patched = add_patch(draw_key, image, source, *options)
        image = patched if i == 0 else jnp.where(jax.random.bernoulli(presence_key), patched, image)
    change = jnp.abs(image - target).mean(-1)
    mask = local_mean((change > CHANGED).astype(jnp.float32), 5) > 0.5
    label = mask.astype(jnp.float32)
    if labels == "binary":
        return image, label
    intensity = local_mean(change * label, LABEL_WINDOW) / jnp.maximum(local_mean(label, LABEL_WINDOW), 1e-6)
    if labels == "intensity":
        return image, label * intensity
    slope, midpoint = logistic
    return image, label * jax.nn.sigmoid(slope * (255 * intensity - midpoint))
