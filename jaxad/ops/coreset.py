"""Greedy k-center coresets: exact, but many centers a pass over the points instead of one."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxad.ops.knn import squared_distances
from jaxad.ops.sharding import DATA, by_rows, own_rows, pad_rows, shards

CANDIDATES = 1024
ACCEPTED = 256
ROWS = 8192


class Coreset(NamedTuple):
    """The chosen points, in the order in which the greedy algorithm picks them."""

    index: Int[Array, "k"]
    """Rows of the points; those at and past `size` are 0."""
    size: Int[Array, ""]
    """How many rows are chosen: k, or the number of valid points where that is smaller."""
    radius: Float[Array, ""]
    """Largest distance of a valid point to its nearest center; its square is exact to about 1e-6 of the largest squared
    distance between two points."""
    passes: Int[Array, ""]
    """Passes made over the points."""


def greedy_coreset(
    points: Float[Array, "n d"],
    k: int,
    first: Int[Array, ""] | int = 0,
    valid: Bool[Array, "n"] | None = None,
    size: Int[Array, ""] | None = None,
) -> Coreset:
    """Farthest-point (greedy k-center) selection, a 2-approximation of the smallest covering radius.

    The plain algorithm takes the point farthest from all centers, then updates every distance: one pass over all
    points for each center. Here a pass looks at the farthest `CANDIDATES` points and runs the algorithm among them
    alone for as long as the farthest of them is at least as far as the next point outside was at the start: distances
    only shrink, so no outsider can be farther. Then one matrix product updates all distances to the centers found. The
    centers and their order are those of the plain algorithm; where several points are equally far, which of them comes
    first may differ.

    Source: Gonzalez, Clustering to minimize the maximum intercluster distance, 1985; PatchCore, arXiv:2106.08265,
    algorithm 1.

    Args:
        points: Vectors to choose from.
        k: Centers wanted, within 1..n.
        first: Row of the first center; a valid one.
        valid: Points that may be chosen and must be covered; all if None.
        size: Where given, stop at so many centers (at most k).

    Returns:
        The centers, their number and the covering radius.

    Raises:
        ValueError: k is not within 1..n.
    """
    n = points.shape[0]
    if not 1 <= k <= n:
        raise ValueError(f"the size of the coreset must be within 1..{n} (the number of points), got {k}")
    valid = jnp.ones(n, bool) if valid is None else valid
    goal = jnp.minimum(jnp.sum(valid, dtype=jnp.int32), k)
    goal = goal if size is None else jnp.minimum(goal, size.astype(jnp.int32))
    points = points - jnp.where(valid[:, None], points, 0).sum(0) / jnp.maximum(valid.sum(), 1).astype(points.dtype)
    points = jnp.where(valid[:, None], points, 0)
    devices = shards()
    greedy = functools.partial(_greedy, k=k, candidates=min(CANDIDATES, n - 1), devices=devices)
    if devices > 1:
        points, valid = pad_rows(points, devices), pad_rows(valid, devices, False)
        greedy = by_rows(greedy, (P(DATA), P(DATA), P(), P()), P())
    return greedy(points, valid, jnp.asarray(first, jnp.int32), goal)


def _greedy(
    points: Float[Array, "n d"],
    valid: Bool[Array, "n"],
    first: Int[Array, ""],
    goal: Int[Array, ""],
    *,
    k: int,
    candidates: int,
    devices: int,
) -> Coreset:
    """The selection among centered points; with several devices, on each of them, from its rows of all points."""
    n, d = points.shape
    accepted = min(ACCEPTED, candidates)
    blocks = -(-n // ROWS)
    rows = -(-n // blocks)
    blocked = jnp.pad(points, ((0, blocks * rows - n), (0, 0))).reshape(blocks, rows, d)
    shard, gather, total, largest = 0, _same, _same, _same
    if devices > 1:
        shard, gather = jax.lax.axis_index(DATA), functools.partial(jax.lax.all_gather, axis_name=DATA, tiled=True)
        total, largest = (functools.partial(f, axis_name=DATA) for f in (jax.lax.psum, jax.lax.pmax))

    def look_up(index):
        return total(points.at[own_rows(index, shard, n)].get(mode="fill", fill_value=0))

    def farthest_of(nearest):
        """One point more than there are candidates; of equally far ones those with the lowest indices."""
        value, index = jax.lax.top_k(nearest, min(candidates + 1, n))
        if devices == 1:
            return value, index
        value, position = jax.lax.top_k(gather(value), candidates + 1)
        return value, gather(index + shard * n)[position]

    def distances_between(pool):
        """The squared distances within the pool, of which every device computes some rows."""
        part = pad_rows(pool, devices).reshape(devices, -1, d)[shard]
        return gather(squared_distances(part, pool))[:candidates]

    def shrink(nearest, centers, count):
        """The squared distances after `count` of these centers have joined."""

        def block(args):
            p, near = args
            distance = jnp.where(jnp.arange(centers.shape[0]) < count, squared_distances(p, centers), jnp.inf)
            return jnp.minimum(near, distance.min(1))

        padded = jnp.pad(nearest, (0, blocks * rows - n)).reshape(blocks, rows)
        return jax.lax.map(block, (blocked, padded)).reshape(-1)[:n]

    def one_pass(carry):
        nearest, order, count, passes = carry
        farthest, index = farthest_of(nearest)
        index, start = jax.lax.sort((index[:-1], farthest[:-1]), num_keys=1)
        pool = look_up(index)
        between = distances_between(pool)

        def more(inner):
            near, _, new = inner
            wanted = (new == 0) | (near.max() >= farthest[-1])
            return wanted & (new < accepted) & (count + new < goal)

        def accept(inner):
            near, chosen, new = inner
            best = jnp.argmax(near).astype(jnp.int32)
            return jnp.minimum(near, between[best]).at[best].set(-1.0), chosen.at[new].set(best), new + 1

        _, chosen, new = jax.lax.while_loop(more, accept, (start, jnp.zeros(accepted, jnp.int32), jnp.int32(0)))
        nearest = shrink(nearest, pool[chosen], new)
        taken = jnp.where(jnp.arange(accepted) < new, index[chosen], devices * n)
        nearest = nearest.at[own_rows(taken, shard, n)].set(-1.0, mode="drop")
        order = jax.lax.dynamic_update_slice(order, taken, (count,))
        return nearest, order, count + new, passes + 1

    nearest = jnp.where(valid, squared_distances(points, look_up(first[None]))[:, 0], -1.0)
    nearest = nearest.at[own_rows(first, shard, n)].set(-1.0, mode="drop")
    order = jnp.zeros(k + accepted, jnp.int32).at[0].set(first)
    carry = (nearest, order, jnp.int32(1), jnp.int32(1))
    if k > 1:
        carry = jax.lax.while_loop(lambda c: c[2] < goal, one_pass, carry)
    nearest, order, count, passes = carry
    index = jnp.where(jnp.arange(k) < count, order[:k], 0)
    return Coreset(index, count, jnp.sqrt(jnp.maximum(largest(nearest.max()), 0)), passes)


def _same(x: Array) -> Array:
    return x
