"""Multivariate Gaussians: streaming moments, shrinkage, Cholesky factors and Mahalanobis distances."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxad.ops.sharding import exchange

HIGHEST = jax.lax.Precision.HIGHEST
LEAST_SHRINKAGE = 1e-5
"""Keeps the covariance of two vectors, whose optimal shrinkage is 0, positive definite in float32."""


class Moments(NamedTuple):
    """Count, mean and scatter of the vectors seen, separately for every entry of the leading axes."""

    count: Float[Array, ""]
    mean: Float[Array, "*l d"]
    scatter: Float[Array, "*l d d"]
    """Sum of the outer products of the deviations from the mean."""


def moments_init(shape: tuple[int, ...]) -> Moments:
    """No vectors seen; `shape` is (*leading, d)."""
    return Moments(jnp.zeros(()), jnp.zeros(shape), jnp.zeros((*shape, shape[-1])))


def moments_update(moments: Moments, x: Float[Array, "b *l d"], valid: Bool[Array, "b"]) -> Moments:
    """The moments after a batch; rows that are not valid do not count.

    Source: Chan, Golub, LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
    """
    x = _share_positions(x)
    rows = valid.reshape(-1, *(1,) * (x.ndim - 1))
    count = jnp.sum(valid).astype(x.dtype)
    mean = jnp.where(rows, x, 0).sum(0) / jnp.maximum(count, 1)
    centered = jnp.where(rows, x - mean, 0)
    scatter = jnp.einsum("b...i,b...j->...ij", centered, centered, precision=HIGHEST)
    return moments_merge(moments, Moments(count, mean, scatter))


def channels_update(moments: Moments, x: Float[Array, "b *s c"], valid: Bool[Array, "b"]) -> Moments:
    """The moments of every channel, from `moments_init((c, 1))` on, after all positions of a batch."""
    rows = x.reshape(-1, x.shape[-1], 1)
    return moments_update(moments, rows, jnp.repeat(valid, len(rows) // len(x)))


def channels(moments: Moments) -> tuple[Float[Array, "c"], Float[Array, "c"]]:
    """The mean and the standard deviation of every channel; a constant channel has the deviation 1."""
    variance = moments.scatter[:, 0, 0] / jnp.maximum(moments.count, 1)
    return moments.mean[:, 0], jnp.sqrt(jnp.where(variance > 0, variance, 1))


def moments_merge(a: Moments, b: Moments) -> Moments:
    """The moments of the union of two disjoint sets (Chan et al., 1979, Eq. 2.1)."""
    count = a.count + b.count
    total = jnp.maximum(count, 1)
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.count / total)
    weight = a.count * b.count / total
    scatter = a.scatter + b.scatter + weight * delta[..., :, None] * delta[..., None, :]
    return Moments(count, mean, scatter)


def ledoit_wolf(
    x: Float[Array, "n d"], valid: Bool[Array, "n"], kept: Bool[Array, "d"] | None = None
) -> tuple[Float[Array, "d"], Float[Array, "d d"]]:
    """Mean and covariance, shrunk toward a multiple of the identity by the analytically optimal amount.

    Source: Ledoit, Wolf, A well-conditioned estimator for large-dimensional covariance matrices, 2004, lemmas 3.2-3.4.

    Args:
        x: Samples in rows.
        valid: Rows that count.
        kept: Columns that count; the others must be zero and get variance 1. All if None.

    Returns:
        The mean and the covariance. Where all samples are the same, the covariance is the identity.
    """
    kept = jnp.ones(x.shape[1], bool) if kept is None else kept
    rows = valid[:, None]
    d = jnp.maximum(jnp.sum(kept), 1).astype(x.dtype)
    n = jnp.maximum(jnp.sum(valid), 1).astype(x.dtype)
    mean = jnp.where(rows, x, 0).sum(0) / n
    centered = jnp.where(rows, x - mean, 0)
    sample = jnp.matmul(centered.T, centered, precision=HIGHEST) / n
    scale = jnp.trace(sample) / d
    scale = jnp.where(scale > (4 * jnp.finfo(x.dtype).eps) ** 2 * jnp.sum(mean**2) / d, scale, 0)  # else rounding
    dispersion = jnp.sum(sample**2) - d * scale**2
    noise = (jnp.sum(jnp.sum(centered**2, 1) ** 2) / n - jnp.sum(sample**2)) / n
    optimal = noise / jnp.where(dispersion > 0, dispersion, 1)
    shrinkage = jnp.where(dispersion > 0, jnp.clip(optimal, LEAST_SHRINKAGE, 1), 1)
    diagonal = jnp.where(kept & (scale > 0), shrinkage * scale, 1)
    return mean, (1 - shrinkage) * sample + jnp.diag(diagonal.astype(x.dtype))


def mahalanobis(
    x: Float[Array, "b *l d"], mean: Float[Array, "*l d"], factor: Float[Array, "*l d d"]
) -> Float[Array, "b *l"]:
    """Mahalanobis distances from the lower Cholesky factor of the covariance, without its inverse."""
    centered = jnp.moveaxis(_share_positions(x) - mean, 0, -1)
    white = jax.lax.linalg.triangular_solve(factor, centered, left_side=True, lower=True)
    return jnp.moveaxis(jnp.linalg.norm(white, axis=-2), -1, 0)


def _share_positions(x: Float[Array, "b *l d"]) -> Float[Array, "b *l d"]:
    """Shards positions, as the Gaussians are. With a sharded batch every device would hold and add up all scatters."""
    return x if x.ndim == 2 else exchange(x)
