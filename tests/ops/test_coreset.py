"""The blocked greedy k-center selection against the plain loop in float64, and its guarantees."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxad.ops import coreset as module
from jaxad.ops.coreset import greedy_coreset

jitted = jax.jit(greedy_coreset, static_argnums=1)


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
    wanted, radius = plain_greedy(points, k, first)
    np.testing.assert_array_equal(result.index, wanted)
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
    """On an integer grid all distances are exact, so ties are too."""
    grid = np.array(list(itertools.product(range(-4, 5), repeat=2)), np.float32)
    result = jitted(jnp.asarray(grid), 30, 40)
    nearest = ((grid - grid[40]) ** 2).sum(1)
    wanted = [40]
    while len(wanted) < 30:
        wanted.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, ((grid - grid[wanted[-1]]) ** 2).sum(1))
    np.testing.assert_array_equal(result.index, wanted)


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
    chosen = np.asarray(result.index)[:total]
    assert chosen[0] == first and len(set(chosen)) == total and valid[chosen].all()
    assert (np.asarray(result.index)[total:] == 0).all()
    between = distances(points)[valid]
    np.testing.assert_allclose(result.radius, between[:, chosen].min(1).max(), atol=2e-3)
    inner = np.asarray(result.index)[: min(total, 3)]
    optimum = min(between[:, list(c)].min(1).max() for c in itertools.combinations(np.flatnonzero(valid), len(inner)))
    assert between[:, inner].min(1).max() <= 2 * optimum + 1e-6  # the first centers are the greedy ones of their number


def test_invalid_points_may_hold_anything():
    points = np.random.default_rng(8).normal(size=(60, 3)).astype(np.float32)
    valid = np.arange(60) % 3 != 0
    poisoned = np.where(valid[:, None], points, np.nan).astype(np.float32)
    result = jitted(jnp.asarray(poisoned), 20, 1, jnp.asarray(valid))
    wanted, radius = plain_greedy(points[valid], 20)
    np.testing.assert_array_equal(result.index, np.flatnonzero(valid)[wanted])
    np.testing.assert_allclose(result.radius, radius, rtol=1e-4)


def test_vmap_equals_a_loop():
    points = jnp.asarray(np.random.default_rng(9).normal(size=(2, 50, 3)), jnp.float32)
    together = jax.jit(jax.vmap(lambda p: greedy_coreset(p, 10)))(points)
    for i in range(2):
        np.testing.assert_array_equal(together.index[i], jitted(points[i], 10).index)


@pytest.mark.parametrize("k", [0, 4])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=rf"within 1\.\.3 .* got {k}"):
        greedy_coreset(jnp.ones((3, 2)), k)


def test_copies_do_not_cost_a_pass_each():
    """More centers than different points: the rest are equally far, and one of them is as good as another."""
    points = np.tile(np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32), (20, 1))
    found = jax.jit(lambda p: greedy_coreset(p, 600))(points)
    assert len(set(np.asarray(found.index).tolist())) == 600 and found.size == 600
    assert found.radius < 1e-2 and found.passes < 30
