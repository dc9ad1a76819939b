"""Exact nearest neighbors by brute force, as one matrix product in blocks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

BLOCK_ELEMENTS = 1 << 22
"""Distances held at a time (16 MiB in float32, which stays in a processor cache)."""
GROUP = 64


def squared_distances(a: Float[Array, "n d"], b: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """Squared Euclidean distances |a|^2 - 2 a.b + |b|^2, never negative, in full float32 on every device."""
    product = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(jnp.sum(a * a, 1)[:, None] - 2 * product + jnp.sum(b * b, 1)[None], 0)


def smallest_k(x: Float[Array, "n m"], k: int) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
    """The k smallest entries of every row, ascending, and their columns.

    The k smallest entries lie in the k groups of columns with the smallest minima, because every other entry is at
    least as large as those k minima. One cheap pass for the minima leaves k * 64 columns to sort.
    """
    n, m = x.shape
    groups, rest = divmod(m, GROUP)
    if groups <= 2 * k:
        value, index = jax.lax.top_k(-x, k)
        return -value, index
    minima = x[:, : groups * GROUP].reshape(n, groups, GROUP).min(-1)
    group = jnp.sort(jax.lax.top_k(-minima, k)[1], -1)
    column = (group[:, :, None] * GROUP + jnp.arange(GROUP)).reshape(n, k * GROUP)
    column = jnp.concatenate([column, jnp.broadcast_to(groups * GROUP + jnp.arange(rest), (n, rest))], 1)
    value, position = jax.lax.top_k(-jnp.take_along_axis(x, column, 1), k)
    return -value, jnp.take_along_axis(column, position, 1)


def knn(
    query: Float[Array, "n d"], bank: Float[Array, "m d"], k: int, valid: Bool[Array, "m"] | None = None
) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
    """The k nearest rows of a bank to every query; equal distances are ordered by index.

    Args:
        query: Vectors to look up.
        bank: Vectors to find.
        k: Neighbors wanted, at most m.
        valid: Rows of the bank that count. Where fewer than k do, the rest have distance infinity.

    Returns:
        Euclidean distances, ascending, and indices into the bank. At no time are more than `BLOCK_ELEMENTS` distances
        (or those of one query) in memory.

    Raises:
        ValueError: k is not within 1..m.
    """
    (n, d), m = query.shape, bank.shape[0]
    if not 1 <= k <= m:
        raise ValueError(f"the number of neighbors must be within 1..{m} (the size of the bank), got {k}")
    norms = jnp.sum(bank * bank, 1)
    valid = jnp.ones(m, bool) if valid is None else valid

    def block(q: Float[Array, "r d"]) -> tuple[Float[Array, "r k"], Int[Array, "r k"]]:
        product = jnp.matmul(q, bank.T, precision=jax.lax.Precision.HIGHEST)
        partial, index = smallest_k(jnp.where(valid, norms - 2 * product, jnp.inf), k)
        return jnp.sqrt(jnp.maximum(partial + jnp.sum(q * q, 1)[:, None], 0)), index

    rows = max(1, BLOCK_ELEMENTS // m)
    if n <= rows:
        return block(query)
    blocks = -(-n // rows)
    rows = -(-n // blocks)
    padded = jnp.pad(query, ((0, blocks * rows - n), (0, 0))).reshape(blocks, rows, d)
    distance, index = jax.lax.map(block, padded)
    return distance.reshape(-1, k)[:n], index.reshape(-1, k)[:n]
