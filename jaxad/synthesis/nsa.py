"""Natural synthetic anomalies: pieces of another normal image, resized and cloned in without a seam.

Source: Natural Synthetic Anomalies for Self-Supervised Anomaly Detection and Localization, ECCV 2022, arXiv:2109.15222.
What differs from its code: labels average changes over a neighborhood of 11 pixels, where it takes the median of a
disk, and are not cut to the objects; what has changed is told before levels are rounded, and is not beyond the border;
a place for a piece is sought 32 times, not 200, and judged on 16 x 16 of its points; small pieces are not dropped.
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
"""Places of a piece that are drawn; the first that suits is taken, and no piece where none does."""
POINTS = 16
"""Rows and columns of the points by which two foregrounds are compared."""
CHANGED = 1 / 255
"""Mean change of the channels above which a pixel is anomalous."""
NEAR = 11
"""Height and width of the neighborhood over which a change is averaged."""


Label = Literal["binary", "intensity", "logistic"]
"""Whether a pixel has changed, by how much, and the logistic function of that."""


class Sizes(NamedTuple):
    """How large pieces are, as shares of the image."""

    least: float = 0.03
    most: float = 0.4
    gamma: tuple[float, float, float] = (2.0, 0.05, 0.03)
    """Half a side is drawn from a Gamma distribution of this shape and scale, and moved by the last."""


def share_of(mask: Bool[Array, "h w"], corner: Float[Array, "n 2"], size: Float[Array, "n 2"]) -> Float[Array, "n"]:
    """The shares of rectangles that are marked."""
    sums = jnp.pad(jnp.cumsum(jnp.cumsum(mask.astype(jnp.float32), 0), 1), ((1, 0), (1, 0)))
    (top, left), (bottom, right) = (jnp.round(at).astype(jnp.int32).T for at in (corner, corner + size))
    total = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    return total / jnp.maximum((bottom - top) * (right - left), 1).astype(jnp.float32)


def first_of(suits: Bool[Array, "n"], x: Float[Array, "n d"]) -> tuple[Float[Array, "d"], Bool[Array, ""]]:
    """The first that suits, and whether there is one."""
    return x[jnp.argmax(suits)], suits.any()


def half_sides(key: Key, dims: Float[Array, "2"], sizes: Sizes) -> Float[Array, "2"]:
    """Half the height and width of what is cut out, in pixels."""
    shape, scale, least = sizes.gamma
    return jnp.clip((least + scale * jax.random.gamma(key, shape, (2,))) * dims, sizes.least * dims, sizes.most * dims)


def add_piece(
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
    """The target with one piece more."""
    dims = jnp.asarray(target.shape[:2], jnp.float32)
    low, high = sizes.least * dims, sizes.most * dims
    side, center, grow, place = jax.random.split(key, 4)
    half = half_sides(side, dims, sizes)
    middle = low + jax.random.uniform(center, (TRIES, 2)) * (dims - 2 * low)
    corners = jnp.round(jnp.maximum(middle - half, 0))
    lengths = jnp.round(jnp.minimum(middle + half, dims)) - corners
    suits = jnp.ones(TRIES, bool) if foregrounds is None else share_of(foregrounds[1], corners, lengths) > least_object
    found, there = first_of(suits, jnp.concatenate([corners, lengths], 1))
    corner, length = found[:2], found[2:]
    factor = jnp.clip(1 + 0.5 * jax.random.normal(grow), *resize)
    factor = jnp.clip(factor, (low / length).max(), (high / length).min())
    size = jnp.floor(jnp.minimum(factor * length, high))
    goals = jnp.floor(jax.random.uniform(place, (TRIES, 2)) * (dims - size + 1))
    if foregrounds is not None:
        own, other = foregrounds
        points = (jnp.arange(POINTS, dtype=jnp.float32) + 0.5) / POINTS

        def seen(mask: Array, corner: Array, length: Array) -> Array:
            row, column = (jnp.floor(c + points * n).astype(jnp.int32) for c, n in zip(corner, length, strict=True))
            return mask[row[:, None], column[None, :]]

        piece = seen(other, corner, length)
        both = jax.vmap(lambda goal: (seen(own, goal, size) & piece).mean())(goals)
        suits = both > least_overlap * jnp.maximum(piece.mean(), 1e-6)
    goal, fits = first_of(suits if foregrounds is not None else jnp.ones(TRIES, bool), goals)

    window = tuple(min(n, math.ceil(sizes.most * n) + 1) for n in target.shape[:2])
    start = jnp.minimum(goal, dims - jnp.asarray(window, jnp.float32)).astype(jnp.int32)
    within = goal - start.astype(jnp.float32)
    row, column = (jnp.arange(n, dtype=jnp.float32) - w for n, w in zip(window, within, strict=True))
    at = ((i + 0.5) * n / s - 0.5 + c for i, n, s, c in zip((row, column), length, size, corner, strict=True))
    y, x = jnp.meshgrid(*at, indexing="ij")
    piece = jax.vmap(lambda plane: map_coordinates(plane, [y, x], 1, "nearest"), -1, -1)(source)
    down, across = ((i > 0) & (i < s - 1) for i, s in zip((row, column), size, strict=True))
    begin, extent = (*start, jnp.int32(0)), (*window, 3)
    cut = jax.lax.dynamic_slice(target, begin, extent)
    cloned = seamless_clone(cut, piece, down[:, None] & across[None, :] & there & fits, mixed)
    return jax.lax.dynamic_update_slice(target, cloned, begin)


def around(x: Float[Array, "h w"], side: int) -> Float[Array, "h w"]:
    """The mean of the neighborhood of every pixel; beyond the image are zeros."""
    return neighborhood_mean(x[None, ..., None], side)[0, ..., 0]


def natural(
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
    """NSA's anomaly and its label, in [0, 1]: how much a pixel has changed.

    Args:
        key: Draws all that is random.
        target: The image to change, in [0, 1].
        source: Another normal image, where the pieces come from.
        foregrounds: The objects on both; pieces show an object, and where they go it overlaps the other.
        pieces: At most so many; after the first one each is there with even odds.
        sizes: Of the pieces.
        resize: Least and largest factor by which a piece is resized.
        least_object: Least share of a piece that shows the object.
        least_overlap: Least share of that which lies on the target's object.
        mixed: Whether the larger gradients of both images are cloned (for textures).
        labels: What the label tells.
        logistic: Slope and middle, in levels of 255, of the logistic function of the change.
    """
    image = target
    for i, k in enumerate(jax.random.split(key, pieces)):
        draw, odds = jax.random.split(k)
        options = (foregrounds, sizes, resize, least_object, least_overlap, jnp.asarray(mixed))
        more = add_piece(draw, image, source, *options)
        image = more if i == 0 else jnp.where(jax.random.bernoulli(odds), more, image)
    change = jnp.abs(image - target).mean(-1)
    mask = around((change > CHANGED).astype(jnp.float32), 5) > 0.5
    label = mask.astype(jnp.float32)
    if labels == "binary":
        return image, label
    intensity = around(change * label, NEAR) / jnp.maximum(around(label, NEAR), 1e-6)
    if labels == "intensity":
        return image, label * intensity
    slope, middle = logistic
    return image, label * jax.nn.sigmoid(slope * (255 * intensity - middle))
