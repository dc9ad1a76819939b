"""Exact nearest neighbors: brute force by matrix products in blocks, after a cheaper first pass for large banks."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxad.ops.sharding import DATA, map_shards, pad_rows, shards

HIGHEST = jax.lax.Precision.HIGHEST
BLOCK_ELEMENTS = 1 << 22
"""Distances held at a time (16 MiB in float32, which stays in a processor cache)."""
SKETCH_DIM = 384
SKETCH_SAMPLE = 4096
"""Rows of a bank to which the basis of its sketch is fitted."""
RETRY = 32
"""Queries that brute force takes at a time where the first pass proves nothing."""
SPARE = 3
"""Rows beyond k that brute force compares again without the rounding of a matrix product."""


class Sketch(NamedTuple):
    """A bank in few dimensions for the first pass of `knn`: see `sketch`."""

    mean: Float[Array, "d"]
    basis: Float[Array, "d h"]
    """Orthonormal columns."""
    rows: Float[Array, "m h1"]
    sizes: Float[Array, "m"]
    """Squared norms of `rows`; infinite where a row does not count."""
    norms: Float[Array, "m"]
    """Squared norms of the bank's rows, likewise."""


def squared_distances(a: Float[Array, "n d"], b: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """Squared Euclidean distances |a|^2 - 2 a.b + |b|^2, never negative, in full float32 on every device."""
    product = jnp.matmul(a, b.T, precision=HIGHEST)
    return jnp.maximum(jnp.sum(a * a, 1)[:, None] - 2 * product + jnp.sum(b * b, 1)[None], 0)


def smallest_k(x: Float[Array, "n m"], k: int) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
    """The k smallest entries of every row, ascending, and their columns.

    The k smallest entries lie in the k groups of columns with the smallest minima, because every other entry is at
    least as large as those k minima. One cheap pass for the minima leaves k groups to sort.
    """
    n, m = x.shape
    size = 2 ** round(math.log2(m / k) / 2)  # sorts about as many minima as columns
    groups, rest = divmod(m, size)
    if groups <= 4 * k:
        value, index = jax.lax.top_k(-x, k)
        return -value, index
    minima = x[:, : groups * size].reshape(n, groups, size).min(-1)
    group = jnp.sort(jax.lax.top_k(-minima, k)[1], -1)
    column = (group[:, :, None] * size + jnp.arange(size)).reshape(n, k * size)
    column = jnp.concatenate([column, jnp.broadcast_to(groups * size + jnp.arange(rest), (n, rest))], 1)
    value, position = jax.lax.top_k(-jnp.take_along_axis(x, column, 1), k)
    return -value, jnp.take_along_axis(column, position, 1)


def sketch(bank: Float[Array, "m d"], valid: Bool[Array, "m"]) -> Sketch | None:
    """Makes what the first pass of `knn` on a bank needs.

    A vector's sketch is its projection onto the directions in which the bank varies most, followed by the length of
    what the projection leaves. The distance of two sketches is at most that of the vectors (the triangle inequality
    on the remainders), and nearly as large where few directions hold most of the variance, as with deep features.

    Args:
        bank: Vectors to find.
        valid: Rows that count.

    Returns:
        The sketch; None where the bank is too small, or its vectors are too short, for a first pass to pay off.
    """
    m, d = bank.shape
    dim = min(SKETCH_DIM, d // 4) - 1
    if m < 2048 or dim < 32:
        return None
    rows = valid[:, None]
    mean = jnp.where(rows, bank, 0).sum(0) / jnp.maximum(valid.sum(), 1).astype(bank.dtype)
    centered = jnp.where(rows, bank - mean, 0)
    sample = centered[:: -(-m // SKETCH_SAMPLE)]
    basis = sample[:dim].T
    for _ in range(2):  # subspace iteration; every orthonormal basis is correct, a good one is fast
        basis = jnp.linalg.qr(jnp.matmul(sample.T, jnp.matmul(sample, basis, precision=HIGHEST), precision=HIGHEST))[0]
    short = _sketch_rows(centered, basis)
    sizes, norms = (jnp.where(valid, jnp.sum(x * x, 1), jnp.inf) for x in (short, bank))
    return Sketch(mean, basis, short, sizes, norms)


def _sketch_rows(centered: Float[Array, "n d"], basis: Float[Array, "d h"]) -> Float[Array, "n h1"]:
    """The length of the remainder is rounded up: then inner products are too large, and distances too small."""
    head = jnp.matmul(centered, basis, precision=HIGHEST)
    squared = jnp.sum(centered * centered, 1)
    rounding = centered.shape[1] * jnp.finfo(centered.dtype).eps * squared
    rest = jnp.sqrt(jnp.maximum(squared - jnp.sum(head * head, 1), 0) + rounding)
    return jnp.concatenate([head, rest[:, None]], 1)


def knn(
    query: Float[Array, "n d"],
    bank: Float[Array, "m d"],
    k: int,
    valid: Bool[Array, "m"] | None = None,
    sketch: Sketch | None = None,
) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
    """The k nearest rows of a bank to every query; equal distances are ordered by index.

    With a sketch, a first pass over the sketches picks a few candidates for each query and computes their distances in
    full. Where the k-th distance is below those of all other sketches, by more than rounding, no other row can be
    nearer. All other queries go through brute force: one matrix product, then the full distances of the k + `SPARE`
    rows that it finds nearest.

    Args:
        query: Vectors whose neighbors are wanted.
        bank: Vectors to find.
        k: Neighbors wanted, at most m.
        valid: Rows of the bank that count; all if None. Where fewer than k do, the other distances are infinite.
        sketch: The result of `sketch` for this bank, with the same `valid`.

    Returns:
        Euclidean distances, ascending, and indices into the bank. Distances come from differences of vectors, without
        cancellation. Where more than `SPARE` rows are equally near, to about 1e-6 of the squared norms, brute force may
        confuse them, so center vectors that lie far from the origin. Memory never holds more than `BLOCK_ELEMENTS`
        distances, or those of one query.

    Raises:
        ValueError: k is not within 1..m.
    """
    m = bank.shape[0]
    if not 1 <= k <= m:
        raise ValueError(f"the number of neighbors must be within 1..{m} (the size of the bank), got {k}")
    if sketch is None:
        norms = jnp.sum(bank * bank, 1)
        norms = norms if valid is None else jnp.where(valid, norms, jnp.inf)
    else:
        norms = sketch.norms
    nearest = _nearest if shards() == 1 else _nearest_on_mesh
    squared, index = nearest(query, bank, norms, k, sketch)
    return jnp.sqrt(squared), index


def _nearest(
    query: Float[Array, "n d"],
    bank: Float[Array, "m d"],
    norms: Float[Array, "m"],
    k: int,
    sketch: Sketch | None,
    devices: int = 1,
    minimum: Callable[[Array], Array] = lambda x: x,
    gather: Callable[[Callable[[Array], Array], Array], Array] = lambda f, rows: f(rows),
) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
    """Squared distances and indices. Distances above `minimum` of the k-th may be wrong.

    On a mesh, `minimum` is the one over the devices, and `gather` applies a function to rows that devices share.
    """
    n, m, candidates = query.shape[0], bank.shape[0], _candidates(k, devices)
    if sketch is None or 8 * candidates > m:
        squared, index = _in_blocks(lambda q: _brute_force(q, bank, norms, k), (query,), m)
        return squared, index
    project = lambda q: (_sketch_rows(q - sketch.mean, sketch.basis),)  # noqa: E731
    short = gather(lambda q: _in_blocks(project, (q,), m)[0], query)
    two_passes = functools.partial(_two_passes, bank=bank, k=k, candidates=candidates, sketch=sketch)
    squared, index, bound = _in_blocks(two_passes, (query, short), m)
    unproven = ~(minimum(squared[:, -1]) < bound)

    def retry(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        squared, index, unproven = carry
        rows = jnp.nonzero(unproven, size=min(RETRY, n), fill_value=n)[0]
        nearest = _brute_force(query.at[rows].get(mode="clip"), bank, norms, k)
        updates = zip(carry, (*nearest, jnp.zeros(rows.shape, bool)), strict=True)
        squared, index, unproven = (old.at[rows].set(new, mode="drop") for old, new in updates)
        return squared, index, unproven

    return jax.lax.while_loop(lambda carry: carry[2].any(), retry, (squared, index, unproven))[:2]


def _nearest_on_mesh(
    query: Float[Array, "n d"], bank: Float[Array, "m d"], norms: Float[Array, "m"], k: int, sketch: Sketch | None
) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
    """As `_nearest`: every device finds the neighbors of all queries among its rows; the nearest of all remain."""
    devices = shards()
    bank, norms = pad_rows(bank, devices), pad_rows(norms, devices, jnp.inf)
    rows, parts = bank.shape[0] // devices, ()
    if sketch is not None:
        sizes = pad_rows(sketch.sizes, devices, jnp.inf)
        parts = (sketch.mean, sketch.basis, pad_rows(sketch.rows, devices), sizes, norms)

    def one_shard(query: Array, bank: Array, norms: Array, parts: tuple[Array, ...]) -> tuple[Array, Array]:
        shard = jax.lax.axis_index(DATA)

        def gather(f: Callable[[Array], Array], rows: Array) -> Array:
            """`f` of all rows; every device computes some."""
            part = pad_rows(rows, devices).reshape(devices, -1, rows.shape[1])[shard]
            return jax.lax.all_gather(f(part), DATA, tiled=True)[: rows.shape[0]]

        minimum = functools.partial(jax.lax.pmin, axis_name=DATA)  # no shard proves more than the result needs
        local = Sketch(*parts) if parts else None
        squared, index = _nearest(query, bank, norms, min(k, rows), local, devices, minimum, gather)
        index = index + shard * rows
        squared, index = (jax.lax.all_gather(x, DATA, axis=1, tiled=True) for x in (squared, index))
        value, position = jax.lax.top_k(-squared, k)  # equal distances stay in the order of their indices
        return -value, jnp.take_along_axis(index, position, 1)

    specs = (P(), P(DATA), P(DATA), (P(), P(), P(DATA), P(DATA), P(DATA))[: len(parts)])
    return map_shards(one_shard, specs, P())(query, bank, norms, parts)


def _in_blocks(
    f: Callable[..., tuple[Array, ...]], queries: tuple[Float[Array, "n _"], ...], m: int
) -> tuple[Array, ...]:
    """`f` of all queries, in blocks whose distances to m rows fit into `BLOCK_ELEMENTS`."""
    n = queries[0].shape[0]
    rows = max(1, BLOCK_ELEMENTS // m)
    if n <= rows:
        return f(*queries)
    blocks = -(-n // rows)
    blocked = tuple(pad_rows(part, blocks).reshape(blocks, -(-n // blocks), -1) for part in queries)
    return tuple(part.reshape(-1, *part.shape[2:])[:n] for part in jax.lax.map(lambda q: f(*q), blocked))


def _candidates(k: int, devices: int) -> int:
    """Rows on each device whose distances are computed in full: few enough to be cheap, enough for most queries.

    Chance spreads the nearest rows over the devices, with a deviation of about the root of the number on each.
    """
    return round(29 / math.sqrt(devices)) + 3 * k


def _relative_distances(norms: Float[Array, "m"], product: Float[Array, "*r m"]) -> Float[Array, "*r m"]:
    """Squared distances minus the squared norm of the query; rows that do not count have an infinite norm."""
    return jnp.where(jnp.isfinite(norms), norms - 2 * product, jnp.inf)


def _brute_force(
    q: Float[Array, "r d"], bank: Float[Array, "m d"], norms: Float[Array, "m"], k: int
) -> tuple[Float[Array, "r k"], Int[Array, "r k"]]:
    product = jnp.matmul(bank, q.T, precision=HIGHEST).T  # in this order faster for few queries
    index = smallest_k(_relative_distances(norms, product), min(k + SPARE, bank.shape[0]))[1]
    return _nearest_among(index, q, bank, norms, k)


def _two_passes(
    q: Float[Array, "r d"],
    short: Float[Array, "r h1"],
    bank: Float[Array, "m d"],
    k: int,
    candidates: int,
    sketch: Sketch,
) -> tuple[Float[Array, "r k"], Int[Array, "r k"], Float[Array, "r"]]:
    """As `_brute_force` among the candidates, and a lower bound of the squared distance of every other row."""
    product = jnp.matmul(short, sketch.rows.T, precision=HIGHEST)
    bound, index = smallest_k(_relative_distances(sketch.sizes, product), candidates + 1)
    squared, index = _nearest_among(index[:, :-1], q, bank, sketch.norms, k)
    largest = jnp.where(jnp.isfinite(sketch.norms), sketch.norms, 0).max()
    rounding = 2 * q.shape[1] * jnp.finfo(q.dtype).eps * (jnp.sum(q * q, 1) + largest)
    return squared, index, bound[:, -1] + jnp.sum(short**2, 1) - rounding


def _nearest_among(
    index: Int[Array, "r c"], q: Float[Array, "r d"], bank: Float[Array, "m d"], norms: Float[Array, "m"], k: int
) -> tuple[Float[Array, "r k"], Int[Array, "r k"]]:
    """The k nearest of these rows of the bank, by differences of vectors."""
    index = jnp.sort(index, 1)

    def distances(args: tuple[Float[Array, "d"], Int[Array, "c"]]) -> Float[Array, "c"]:
        vector, rows = args
        return jnp.where(jnp.isfinite(norms[rows]), jnp.sum((bank[rows] - vector) ** 2, 1), jnp.inf)

    queries_per_step = max(1, BLOCK_ELEMENTS // 8 // (index.shape[1] * q.shape[1]))
    squared, position = smallest_k(jax.lax.map(distances, (q, index), batch_size=queries_per_step), k)
    return squared, jnp.take_along_axis(index, position, 1)
