"""The blocked greedy k-center selection against the plain loop in float64, and its guarantees."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.distance import cdist

from jaxad.ops import coreset as module
from jaxad.ops.coreset import FAN, coreset_centers, greedy_coreset, stream_finish, stream_init, stream_update

jitted = jax.jit(greedy_coreset, static_argnums=1)
append = jax.jit(stream_update)
finish = jax.jit(stream_finish)


def distances(points):
    points = points.astype(np.float64)
    return np.linalg.norm(points[:, None] - points[None], axis=-1)


def plain_greedy(points, k, first=0):
    """One center at a time, each the point farthest from those before."""
    points = points.astype(np.float64)
    chosen = [first]
    nearest = np.linalg.norm(points - points[first], axis=1)
    while len(chosen) < k:
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, np.linalg.norm(points - points[chosen[-1]], axis=1))
    return np.array(chosen), nearest.max()


def radius_of(points, centers):
    return distances(points)[:, centers].min(1).max()


@pytest.mark.parametrize(("n", "d", "k", "first"), [(500, 8, 60, 0), (1500, 16, 150, 7), (40, 3, 40, 39), (3, 2, 2, 1)])
def test_same_centers_in_the_same_order(n, d, k, first):
    points = np.random.default_rng(n).normal(size=(n, d)).astype(np.float32)
    result = jitted(jnp.asarray(points), k, first)
    index, radius = plain_greedy(points, k, first)
    np.testing.assert_array_equal(result.index, index)
    np.testing.assert_allclose(result.radius, radius, rtol=1e-4, atol=1e-6)
    assert result.size == k


@pytest.mark.parametrize(("candidates", "accepted", "rows"), [(1, 1, 8192), (4, 4, 64), (16, 3, 50), (1024, 256, 7)])
def test_any_block_size_is_exact(candidates, accepted, rows, monkeypatch):
    monkeypatch.setattr(module, "CANDIDATES", candidates)
    monkeypatch.setattr(module, "ACCEPTED", accepted)
    monkeypatch.setattr(module, "ROWS", rows)
    points = np.random.default_rng(5).normal(size=(120, 4)).astype(np.float32)
    result = jax.jit(lambda p: greedy_coreset(p, 50, 3))(jnp.asarray(points))
    np.testing.assert_array_equal(result.index, plain_greedy(points, 50, 3)[0])


def test_far_fewer_passes_than_centers():
    points = np.random.default_rng(0).normal(size=(3000, 8)).astype(np.float32)
    assert jitted(jnp.asarray(points), 300).passes < 30


def test_clusters_far_from_the_origin():
    rng = np.random.default_rng(1)
    clusters = rng.normal(size=(4, 6))[rng.integers(0, 4, 200)] * 50
    points = (clusters + rng.normal(size=(200, 6)) + 1000).astype(np.float32)
    result = jitted(jnp.asarray(points), 30)
    np.testing.assert_allclose(result.radius, radius_of(points, np.asarray(result.index)), rtol=1e-3)
    np.testing.assert_allclose(result.radius, plain_greedy(points, 30)[1], rtol=1e-3)


def test_exact_ties_take_the_lowest_index():
    """On an integer grid all distances are exact, and so are ties."""
    grid = np.array(list(itertools.product(range(-4, 5), repeat=2)), np.float32)
    result = jitted(jnp.asarray(grid), 30, 40)
    nearest = ((grid - grid[40]) ** 2).sum(1)
    expected = [40]
    while len(expected) < 30:
        expected.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, ((grid - grid[expected[-1]]) ** 2).sum(1))
    np.testing.assert_array_equal(result.index, expected)


def test_duplicates_come_last_and_never_twice():
    points = np.repeat(np.arange(5, dtype=np.float32)[:, None], 3, 0)
    result = jitted(jnp.asarray(points), 15, 6)
    assert sorted(np.asarray(result.index)) == list(range(15))
    assert len({float(points[i, 0]) for i in np.asarray(result.index)[:5]}) == 5
    assert result.radius == 0


@pytest.mark.parametrize("n", [1, 2])
def test_tiny(n):
    result = jitted(jnp.arange(n, dtype=jnp.float32)[:, None], n)
    assert sorted(np.asarray(result.index)) == list(range(n)) and result.radius == 0 and result.size == n


@settings(deadline=None, max_examples=40)
@given(
    points=hnp.arrays(np.float32, (24, 2), elements=st.integers(-40, 40).map(lambda i: i / 8)),
    valid=hnp.arrays(np.bool_, 24),
    size=st.integers(1, 12),
)
def test_properties(points, valid, size):
    """With a traced size and mask, one compiled program serves all examples."""
    valid[np.random.default_rng(size).integers(24)] = True
    first = int(np.flatnonzero(valid)[-1])
    result = jitted(jnp.asarray(points), 12, jnp.int32(first), jnp.asarray(valid), jnp.int32(size))
    total = int(result.size)
    assert total == min(size, valid.sum())
    centers = np.asarray(result.index)[:total]
    assert centers[0] == first and len(set(centers)) == total and valid[centers].all()
    assert (np.asarray(result.index)[total:] == 0).all()
    between = distances(points)[valid]
    np.testing.assert_allclose(result.radius, between[:, centers].min(1).max(), atol=2e-3)
    inner = np.asarray(result.index)[: min(total, 3)]
    optimum = min(between[:, list(c)].min(1).max() for c in itertools.combinations(np.flatnonzero(valid), len(inner)))
    assert between[:, inner].min(1).max() <= 2 * optimum + 1e-6  # a head is greedy, too


def test_invalid_points_may_hold_anything():
    points = np.random.default_rng(8).normal(size=(60, 3)).astype(np.float32)
    valid = np.arange(60) % 3 != 0
    poisoned = np.where(valid[:, None], points, np.nan).astype(np.float32)
    result = jitted(jnp.asarray(poisoned), 20, 1, jnp.asarray(valid))
    index, radius = plain_greedy(points[valid], 20)
    np.testing.assert_array_equal(result.index, np.flatnonzero(valid)[index])
    np.testing.assert_allclose(result.radius, radius, rtol=1e-4)


def test_vmap_equals_a_loop():
    points = jnp.asarray(np.random.default_rng(9).normal(size=(2, 50, 3)), jnp.float32)
    stacked = jax.jit(jax.vmap(lambda p: greedy_coreset(p, 10)))(points)
    for i in range(2):
        np.testing.assert_array_equal(stacked.index[i], jitted(points[i], 10).index)


@pytest.mark.parametrize("projected", [False, True])
def test_centers_are_the_chosen_points(projected):
    rng = np.random.default_rng(10)
    points, valid = rng.normal(size=(80, 4)).astype(np.float32), rng.random(80) < 0.7
    project = jnp.asarray(rng.normal(size=(4, 2)), jnp.float32) if projected else None
    first, space = int(np.flatnonzero(valid)[0]), points if project is None else points @ np.asarray(project)
    rows, size, radius = jax.jit(coreset_centers, static_argnums=1)(
        points, 20, first, jnp.asarray(valid), jnp.int32(12), project
    )
    index, expected = plain_greedy(space[valid], 12)
    np.testing.assert_array_equal(rows[:12], points[valid][index])
    np.testing.assert_allclose(radius, expected, rtol=1e-3)
    assert size == 12 and rows.shape == (20, 4)


@pytest.mark.parametrize("k", [0, 4])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=rf"within 1\.\.3 .* got {k}"):
        greedy_coreset(jnp.ones((3, 2)), k)


def test_copies_do_not_cost_a_pass_each():
    """With more centers than distinct points, all others are equally far, and any of them will do."""
    points = np.tile(np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32), (20, 1))
    result = jax.jit(lambda p: greedy_coreset(p, 600))(points)
    assert len(set(np.asarray(result.index).tolist())) == 600 and result.size == 600
    assert result.radius < 1e-2 and result.passes < 30


def streamed(points, k, batch, n=None, project=None, first=0):
    """The centers of points in full batches, the last of which ends with NaN; and the number of levels."""
    stream = stream_init(n or len(points), k, points.shape[1], project)
    for i in range(0, len(points), batch):
        part = points[i : i + batch]
        padded = np.pad(part, ((0, batch - len(part)), (0, 0)), constant_values=np.nan)
        stream = append(stream, jnp.asarray(padded), jnp.arange(batch) < len(part))
    return finish(stream, first), stream.count.shape[0]


def cover(points, centers):
    """The covering radius, in float64."""
    return cdist(points.astype(np.float64), np.asarray(centers, np.float64)).min(1).max()


def plain_stream(points, k):
    """The centers and their bound, one point at a time, with a list of (rows, bound) for every level."""
    levels = [[]]

    def thin(sets):
        rows = np.concatenate([rows for rows, _ in sets])
        index, radius = plain_greedy(rows, min(k, len(rows)))
        return rows[index], radius + max(bound for _, bound in sets)

    def push(i, rows_and_bound):
        if i == len(levels):
            levels.append([])
        if sum(len(rows) for rows, _ in levels[i]) == FAN * k:
            push(i + 1, thin(levels[i]))
            levels[i] = []
        levels[i].append(rows_and_bound)

    for point in points:
        push(0, (point[None], 0.0))
    return thin([part for level in levels for part in level])


@pytest.mark.parametrize("n", [41, 160, 161, 800, 801, 1500])
def test_a_stream_carries_like_a_counter(n):
    """Two, three and four levels (200, 840 and 3,400 points), full and with one point more."""
    points = np.random.default_rng(n).normal(size=(n, 3)).astype(np.float32)
    (rows, size, bound), levels = streamed(points, 10, 64)
    expected, radius = plain_stream(points, 10)
    assert size == 10 and levels == (2 if n <= 200 else 3 if n <= 840 else 4)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(bound, radius, rtol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 39, 40])
def test_a_stream_that_fits_is_the_greedy_selection(n):
    points = np.random.default_rng(n).normal(size=(n, 3)).astype(np.float32)
    (rows, size, radius), levels = streamed(points, 10, 7, first=n - 1)
    expected, _ = plain_greedy(points, min(10, n), n - 1)
    assert levels == 1 and size == min(10, n)
    np.testing.assert_array_equal(rows[:size], points[expected])
    np.testing.assert_allclose(radius, cover(points, points[expected]), rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    points=hnp.arrays(np.float32, (170, 2), elements=st.integers(-40, 40).map(lambda i: i / 8)),
    n=st.integers(1, 170),
    drift=st.integers(0, 2),
)
def test_the_radius_of_a_stream_is_bounded(points, n, drift):
    """By the bound in the state, which is at most 2 L times the radius of all at once; centers are points."""
    points = (points + drift * np.arange(170, dtype=np.float32)[:, None] / 8)[:n]
    (rows, size, bound), levels = streamed(points, 2, 16, n=170)  # 2 * (4 + 16 + 64) = 168 < 170: four levels
    rows = np.asarray(rows)[:size]
    assert levels == 4 and size == min(2, n) and cdist(rows, points).min(1).max() == 0
    radius, at_once = cover(points, rows), plain_greedy(points, min(2, n))[1]
    rounding = 1e-2  # a squared radius is exact to 1e-6 of the largest squared distance
    assert radius <= bound + rounding and bound <= 2 * levels * at_once + levels * rounding


@pytest.mark.parametrize("order", ["random", "sorted"])
def test_a_stream_covers_nearly_as_well_as_all_at_once(order):
    rng = np.random.default_rng(0)
    points = (rng.normal(size=(40, 8))[rng.integers(0, 40, 5000)] * 4 + rng.normal(size=(5000, 8))).astype(np.float32)
    points = points[points[:, 0].argsort()] if order == "sorted" else points
    (rows, _, bound), levels = streamed(points, 50, 999)
    radius, at_once = cover(points, rows), float(jitted(jnp.asarray(points), 50).radius)
    assert levels == 4 and radius <= bound <= 2 * levels * at_once
    assert radius <= 1.25 * at_once


def test_batches_of_a_stream_do_not_matter():
    points = np.random.default_rng(1).normal(size=(500, 4)).astype(np.float32)
    expected, _ = streamed(points, 8, 500)
    for batch in (1, 30, 32, 33, 499):
        jax.tree.map(np.testing.assert_array_equal, streamed(points, 8, batch)[0], expected)


def test_more_room_does_not_matter():
    points = np.random.default_rng(2).normal(size=(500, 4)).astype(np.float32)
    expected, levels = streamed(points, 8, 100)
    got, more = streamed(points, 8, 100, n=50_000)
    assert more > levels
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)


def test_a_stream_longer_than_its_room():
    points = np.random.default_rng(3).normal(size=(700, 4)).astype(np.float32)
    for n in (1, 300):
        (rows, size, bound), _ = streamed(points, 8, 64, n=n)
        assert size == 8 and cdist(rows, points).min(1).max() == 0
        assert cover(points, rows) <= bound


def test_a_stream_skips_invalid_points_anywhere():
    points = np.random.default_rng(4).normal(size=(300, 3)).astype(np.float32)
    valid = np.random.default_rng(5).random(300) < 0.6
    poisoned = np.where(valid[:, None], points, np.nan).astype(np.float32)
    stream = append(stream_init(300, 6, 3), jnp.asarray(poisoned), jnp.asarray(valid))
    empty = append(stream, jnp.full((5, 3), jnp.nan), jnp.zeros(5, bool))
    expected, _ = streamed(points[valid], 6, 300, n=300)
    for state in (stream, empty):
        jax.tree.map(np.testing.assert_array_equal, finish(state), expected)


def test_a_projected_stream_keeps_whole_rows():
    points = np.random.default_rng(6).normal(size=(300, 5)).astype(np.float32)
    first_two = jnp.eye(5, 2)
    (rows, _, bound), _ = streamed(points, 6, 50, project=first_two)
    (short, _, expected), _ = streamed(points[:, :2], 6, 50)
    np.testing.assert_array_equal(rows[:, :2], short)
    assert cdist(rows, points).min(1).max() == 0 and bound == expected


@pytest.mark.slow
def test_a_stream_under_scan_and_vmap_equals_a_loop():
    points = jnp.asarray(np.random.default_rng(7).normal(size=(2, 10, 25, 3)), jnp.float32)
    valid = jnp.arange(250).reshape(10, 25) < jnp.array([250, 130])[:, None, None]

    @jax.jit
    @jax.vmap
    def centers_of_classes(points, valid):
        return finish(jax.lax.scan(lambda s, b: (append(s, *b), None), stream_init(250, 6, 3), (points, valid))[0])

    stacked = centers_of_classes(points, valid)
    for i, n in enumerate((250, 130)):
        expected, _ = streamed(np.asarray(points[i]).reshape(-1, 3)[:n], 6, 25, n=250)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5), stacked, expected)


def test_the_memory_of_a_stream_grows_logarithmically():
    def size(n):
        stream = jax.eval_shape(lambda: stream_init(n, 1000, 64))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stream))

    sizes = [size(784 * images) for images in (10**4, 10**6, 10**8)]
    level = FAN * 1000 * 64 * 4
    assert sizes[0] < 8 * level
    for smaller, larger in itertools.pairwise(sizes):
        assert larger - smaller <= 1.01 * level * np.ceil(np.log(100) / np.log(FAN))
