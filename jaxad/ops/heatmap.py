"""Patch features and heat maps: neighborhood pooling, stacking of stages, upsampling with blur."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxad.base import Ignored
from jaxad.ops.sharding import split


def neighborhood_mean(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b h w c"]:
    """Mean over the size x size neighborhood of every position; zeros beyond the border count (PatchCore, Eq. 2)."""
    if size == 1:
        return x
    pad = (size - 1) // 2
    window, padding = (1, size, size, 1), ((0, 0), (pad, size - 1 - pad), (pad, size - 1 - pad), (0, 0))
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, (1, 1, 1, 1), padding) / (size * size)


def stack_maps(maps: Sequence[Float[Array, "b _ _ _"]], method: str = "linear") -> Float[Array, "b h w c"]:
    """Feature maps of several stages on the grid of the first, channels side by side.

    Args:
        maps: NHWC maps, the finest first.
        method: "linear" or "nearest" upsampling, pixel centers aligned as in `torch.nn.functional.interpolate`.
    """
    grid = maps[0].shape[:3]
    return jnp.concatenate([maps[0], *(jax.image.resize(m, (*grid, m.shape[-1]), method) for m in maps[1:])], -1)


def patch_features(x: dict[str, Array], layers: Sequence[str], size: int = 3) -> Float[Array, "b h w c"]:
    """Neighborhood means of some stages, their channels side by side on the grid of the first."""
    return stack_maps([neighborhood_mean(x[layer], size) for layer in layers])


def blur_matrix(size: int, sigma: float) -> Float[np.ndarray, "size size"]:
    """The matrix of a Gaussian filter along one axis: mirrored at the border, cut off at 4 sigma, as in scipy."""
    if sigma == 0:
        return np.eye(size)
    radius = int(4 * sigma + 0.5)
    offset = np.arange(-radius, radius + 1)
    weight = np.exp(-0.5 * (offset / sigma) ** 2)
    weight /= weight.sum()
    source = (np.arange(size)[:, None] + offset) % (2 * size)
    source = np.minimum(source, 2 * size - 1 - source)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.arange(size)[:, None], source), weight)
    return matrix


def resize_matrix(size: int, out: int) -> Float[np.ndarray, "out size"]:
    """The matrix of bilinear upsampling along one axis: pixel centers aligned, edges repeated."""
    position = np.clip((np.arange(out) + 0.5) * size / out - 0.5, 0, size - 1)
    low = np.minimum(np.floor(position).astype(int), max(size - 2, 0))
    matrix = np.zeros((out, size))
    matrix[np.arange(out), low] = 1 - (position - low)
    matrix[np.arange(out), np.minimum(low + 1, size - 1)] += position - low
    return matrix


def upsample_blur(scores: Float[Array, "b h w"], size: tuple[int, int], sigma: float) -> Float[Array, "b H W"]:
    """Bilinear upsampling and Gaussian smoothing of patch scores: one matrix product for each axis.

    Args:
        scores: A score for every patch.
        size: (H, W) of the heat map in pixels.
        sigma: Standard deviation of the smoothing in pixels; 0 for none.

    Raises:
        ValueError: sigma is negative or not finite.
    """
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma must be 0 or more pixels, got {sigma}")
    rows, columns = (
        jnp.asarray(blur_matrix(out, sigma) @ resize_matrix(n, out), jnp.float32)
        for n, out in zip(scores.shape[1:], size, strict=True)
    )
    scores = split(scores, 0)
    return jnp.einsum("Hh,bhw,Ww->bHW", rows, scores, columns, precision=jax.lax.Precision.HIGHEST)


def counted(scores: Float[Array, "b h w"], ignore: Ignored) -> Float[Array, "b h w"]:
    """The scores of positions, but -inf where all pixels of a position are ignored; None ignores none.

    A position has the pixels of its cell of the image.
    """
    if ignore is None:
        return scores
    rows, columns = (
        np.arange(n)[:, None] == (2 * np.arange(size) + 1) * n // (2 * size)
        for n, size in zip(scores.shape[1:], ignore.shape[1:], strict=True)
    )
    pixels = jnp.einsum("hH,bHW,wW->bhw", *(jnp.asarray(v, jnp.float32) for v in (rows, ~ignore, columns)))
    return jnp.where(pixels > 0, scores, -jnp.inf)
