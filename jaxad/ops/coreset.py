"""Greedy k-center coresets: exact, many centers in each pass over the points; also of a stream of points."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxad.ops.knn import squared_distances
from jaxad.ops.sharding import DATA, local_rows, map_shards, pad_rows, shards, split, take_rows

CANDIDATES = 1024
ACCEPTED = 256
ROWS = 8192
FAN = 4
"""Sets of k centers that a stream reduces to one. A larger number makes fewer levels, each of which holds more."""


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


class Centers(NamedTuple):
    """The chosen points themselves."""

    rows: Float[Array, "k d"]
    """The first `size` count."""
    size: Int[Array, ""]
    radius: Float[Array, ""]
    """Bound of the distance of any point to its nearest center."""


def greedy_coreset(
    points: Float[Array, "n d"],
    k: int,
    first: Int[Array, ""] | int = 0,
    valid: Bool[Array, "n"] | None = None,
    size: Int[Array, ""] | None = None,
) -> Coreset:
    """Farthest-point (greedy k-center) selection, a 2-approximation of the smallest covering radius.

    The plain algorithm takes the point farthest from all centers, then updates every distance: one pass over all
    points for each center. Here a pass takes the farthest `CANDIDATES` points and runs the algorithm among them, as
    long as the farthest of them is at least as far as the next point outside was at the start: distances only shrink,
    so no point outside can be farther. Then one matrix product updates all distances to the new centers. The centers
    and their order are those of the plain algorithm; among points that are equally far, the order may differ.

    Source: Gonzalez, Clustering to minimize the maximum intercluster distance, 1985; PatchCore, arXiv:2106.08265,
    algorithm 1.

    Args:
        points: Vectors to choose from.
        k: Centers wanted, within 1..n.
        first: Row of the first center; a valid one.
        valid: Points that may be chosen and must be covered; all if None.
        size: Stop at this number of centers, at most k; k if None.

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
        greedy = map_shards(greedy, (P(DATA), P(DATA), P(), P()), P())
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
    """The selection among centered points. On a mesh it runs on every device, each of which holds some points."""
    n, d = points.shape
    accepted = min(ACCEPTED, candidates)
    blocks = -(-n // ROWS)
    rows = -(-n // blocks)
    blocked = jnp.pad(points, ((0, blocks * rows - n), (0, 0))).reshape(blocks, rows, d)
    shard, gather, total, largest = 0, _identity, _identity, _identity
    if devices > 1:
        shard, gather = jax.lax.axis_index(DATA), functools.partial(jax.lax.all_gather, axis_name=DATA, tiled=True)
        total, largest = (functools.partial(f, axis_name=DATA) for f in (jax.lax.psum, jax.lax.pmax))

    def look_up(index):
        return total(points.at[local_rows(index, shard, n)].get(mode="fill", fill_value=0))

    def farthest_of(nearest):
        """The candidates and one point more; among equally far points those with the lowest indices."""
        value, index = jax.lax.top_k(nearest, min(candidates + 1, n))
        if devices == 1:
            return value, index
        value, position = jax.lax.top_k(gather(value), candidates + 1)
        return value, gather(index + shard * n)[position]

    def distances_between(pool):
        """The squared distances within the pool; every device computes some rows."""
        part = pad_rows(pool, devices).reshape(devices, -1, d)[shard]
        return gather(squared_distances(part, pool))[:candidates]

    def shrink(nearest, centers, count):
        """The squared distances after the first `count` of these centers are added."""

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

        def goes_on(inner):
            near, _, new = inner
            farther = (new == 0) | (near.max() >= farthest[-1])
            return farther & (new < accepted) & (count + new < goal)

        def accept(inner):
            near, chosen, new = inner
            best = jnp.argmax(near).astype(jnp.int32)
            return jnp.minimum(near, between[best]).at[best].set(-1.0), chosen.at[new].set(best), new + 1

        _, chosen, new = jax.lax.while_loop(goes_on, accept, (start, jnp.zeros(accepted, jnp.int32), jnp.int32(0)))
        nearest = shrink(nearest, pool[chosen], new)
        centers = jnp.where(jnp.arange(accepted) < new, index[chosen], devices * n)
        nearest = nearest.at[local_rows(centers, shard, n)].set(-1.0, mode="drop")
        order = jax.lax.dynamic_update_slice(order, centers, (count,))
        return nearest, order, count + new, passes + 1

    nearest = jnp.where(valid, squared_distances(points, look_up(first[None]))[:, 0], -1.0)
    nearest = nearest.at[local_rows(first, shard, n)].set(-1.0, mode="drop")
    order = jnp.zeros(k + accepted, jnp.int32).at[0].set(first)
    carry = (nearest, order, jnp.int32(1), jnp.int32(1))
    if k > 1:
        carry = jax.lax.while_loop(lambda c: c[2] < goal, one_pass, carry)
    nearest, order, count, passes = carry
    index = jnp.where(jnp.arange(k) < count, order[:k], 0)
    return Coreset(index, count, jnp.sqrt(jnp.maximum(largest(nearest.max()), 0)), passes)


def _identity(x: Array) -> Array:
    return x


def coreset_centers(
    points: Float[Array, "n d"],
    k: int,
    first: Int[Array, ""] | int = 0,
    valid: Bool[Array, "n"] | None = None,
    size: Int[Array, ""] | None = None,
    project: Float[Array, "d e"] | None = None,
) -> Centers:
    """The points that `greedy_coreset` chooses; on a mesh, devices share them, and no device ever holds all points.

    Args:
        points: Vectors to choose from.
        k: Centers wanted, within 1..n.
        first: Row of the first center; a valid one.
        valid: Points that may be chosen and must be covered; all if None.
        size: Stop at this number of centers, at most k; k if None.
        project: Distances, and so the radius, are those of `points @ project`; of the points themselves if None.
    """
    coreset = greedy_coreset(_projected(points, project), k, first, valid, size)
    return Centers(take_rows(points, coreset.index), coreset.size, coreset.radius)


class CoresetStream(NamedTuple):
    """A stream of points, thinned as they come: see `stream_init`."""

    rows: Float[Array, "k f l d"]
    """Every level is filled column by column, of which it has `FAN`: level 0 with points as they come, level i + 1 with
    what full levels i are reduced to. Every row is a point of the stream. Devices may share the first axis."""
    count: Int[Array, "l"]
    """Rows of every level that are filled."""
    radius: Float[Array, "l"]
    """For every level a bound of the distance from a point that its rows stand for to these rows."""
    project: Float[Array, "d e"] | None
    """Distances are those of `points @ project`; of the points themselves if None."""


def stream_init(n: int, k: int, d: int, project: Float[Array, "d e"] | None = None) -> CoresetStream:
    """An empty stream, thinned to k centers as its points come, by merge and reduce.

    Every level has room for `FAN` * k rows. A full level that has to take more is reduced to k rows by
    `greedy_coreset`, which go to the level above, as a counter in base `FAN` carries digits; at the end
    `stream_finish` thins what all levels hold. For n points that makes L levels, the fewest with
    k (`FAN` + `FAN`^2 + ... + `FAN`^L) >= n, and about 1 / (`FAN` - 1) more work than thinning every buffer once. For a
    stream that fits into level 0 the centers are exactly those of `greedy_coreset`. More than n points are possible,
    too: the last level is then reduced in place, again and again.

    A row stands for points within the sum of the radii of the reductions that led to it (triangle inequality). `radius`
    keeps that sum, so that the final radius is a proven bound for the points seen.

    A priori, the covering radius of the centers is at most 2 L times that of the centers that `greedy_coreset` chooses
    among all points at once. Proof: let a reduction have the radius r. Its k centers and the point farthest from them
    lie pairwise at least r apart, and all k + 1 are points of the stream. Of any k balls that cover the stream one
    holds two of them, so the balls have a radius of at least r / 2: those around the centers chosen at once, and the
    smallest possible ones. No point of n goes through more than L reductions, and each adds its r at most.

    Source: Har-Peled, Mazumdar, On coresets for k-means and k-median clustering, 2004 (after Bentley, Saxe,
    Decomposable searching problems, 1980); Gonzalez, 1985.

    Args:
        n: Points that the levels have room for.
        k: Centers wanted.
        d: Length of a point.
        project: Linear map before distances are taken; the rows stay whole. None for none.
    """
    levels = 1
    while k * sum(FAN ** (i + 1) for i in range(levels)) < n:
        levels += 1
    return CoresetStream(jnp.zeros((k, FAN, levels, d)), jnp.zeros(levels, jnp.int32), jnp.zeros(levels), project)


def stream_update(
    stream: CoresetStream, points: Float[Array, "m d"], valid: Bool[Array, "m"] | None = None
) -> CoresetStream:
    """The stream after more points, in their order; how they are cut into batches makes no difference.

    Args:
        stream: The stream so far.
        points: Any number of points.
        valid: Points that count; all if None.
    """
    k = stream.rows.shape[0]
    room = FAN * k
    valid = jnp.ones(points.shape[0], bool) if valid is None else valid
    rank = jnp.cumsum(valid, dtype=jnp.int32) - 1
    total = rank[-1] + 1

    def append(carry: tuple[CoresetStream, Array]) -> tuple[CoresetStream, Array]:
        stream, done = carry
        stream = jax.lax.while_loop(lambda s: s.count[0] == room, _reduce, stream)
        start = stream.count[0]
        place = jnp.where(valid & (rank >= done), start + rank - done, room)
        appended = jnp.minimum(total - done, room - start)
        rows = stream.rows.at[place % k, place // k, 0].set(points, mode="drop")
        return stream._replace(rows=rows, count=stream.count.at[0].add(appended)), done + appended

    return jax.lax.while_loop(lambda carry: carry[1] < total, append, (stream, jnp.int32(0)))[0]


def _reduce(stream: CoresetStream) -> CoresetStream:
    """Reduces the lowest full level with room above it, or the last if there is none; level 0 is full."""
    k, _, levels, d = stream.rows.shape
    source = jnp.argmin(jnp.append(stream.count == FAN * k, False)) - 1
    target = jnp.minimum(source + 1, levels - 1)
    points = stream.rows[:, :, source].reshape(-1, d)
    coreset = greedy_coreset(_projected(points, stream.project), k)
    count, radius = stream.count.at[source].set(0), stream.radius.at[source].set(0)
    # Not `take_rows`, whose ring would wait forever for classes on other devices that leave the loop earlier.
    column = split(points[coreset.index], 0)[:, None, None]
    return stream._replace(
        rows=jax.lax.dynamic_update_slice(stream.rows, column, (0, count[target] // k, target, 0)),
        count=count.at[target].add(k),
        radius=radius.at[target].max(stream.radius[source] + coreset.radius),
    )


def stream_finish(stream: CoresetStream, first: Int[Array, ""] | int = 0) -> Centers:
    """The centers of the points seen: k, or all points where there are fewer.

    Args:
        stream: The stream at its end.
        first: Which of the `count.sum()` rows that it holds is the first center.
    """
    k, _, levels, d = stream.rows.shape
    valid = jnp.arange(k)[:, None, None] + k * jnp.arange(FAN)[:, None] < stream.count
    before = jnp.cumsum(stream.count) - stream.count
    level = jnp.searchsorted(before, jnp.asarray(first, jnp.int32), side="right") - 1
    place = first - before[level]
    start = (place % k * FAN + place // k) * levels + level
    centers = coreset_centers(stream.rows.reshape(-1, d), k, start, valid.reshape(-1), project=stream.project)
    return centers._replace(radius=stream.radius.max() + centers.radius)


def _projected(points: Float[Array, "n d"], project: Float[Array, "d e"] | None) -> Float[Array, "n _"]:
    return points if project is None else jnp.matmul(points, project, precision=jax.lax.Precision.HIGHEST)
