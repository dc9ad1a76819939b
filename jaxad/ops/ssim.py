"""Structural similarity of images."""

from typing import Any

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

WINDOW, SIGMA = 11, 1.5
"""Width and standard deviation of the Gaussian window in pixels."""


def window_matrix(n: int) -> Float[Array, "n n"]:
    """The matrix of the Gaussian window along an axis; the image is padded with zeros."""
    position = jnp.arange(n, dtype=jnp.float32)
    offset = jnp.abs(position[:, None] - position)
    weights = np.exp(-(np.arange(-(WINDOW // 2), WINDOW // 2 + 1) ** 2) / (2 * SIGMA**2))
    return jnp.where(offset <= WINDOW // 2, jnp.exp(-(offset**2) / (2 * SIGMA**2)), 0) / float(weights.sum())


def ssim(a: Float[Array, "b h w c"], b: Float[Array, "b h w c"]) -> Float[Array, "b"]:
    """The mean structural similarity of images in [0, 1], in a window around every pixel.

    Source: Wang et al., Image quality assessment, IEEE Transactions on Image Processing 13 (2004).
    """
    rows, columns = (window_matrix(n) for n in a.shape[1:3])

    def smooth(x: Any) -> Any:
        return jnp.einsum("Hh,bhwc,Ww->bHWc", rows, x, columns, precision=jax.lax.Precision.HIGHEST)

    similarity: Any = dm_pix.ssim(a, b, filter_fn=smooth)
    return similarity
