"""Nearest neighbors against scikit-learn and against brute force in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.neighbors import NearestNeighbors

from jaxad.ops import knn as module
from jaxad.ops.knn import knn, sketch, smallest_k, squared_distances
from tests.examples import slow_after

jit_knn = jax.jit(knn, static_argnums=2)
smallest = jax.jit(smallest_k, static_argnums=1)


def vectors(seed, n, m, d):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)).astype(np.float32), rng.normal(size=(m, d)).astype(np.float32)


def brute_force(query, bank, k, valid=None):
    """Distances and indices in float64, ties ordered by index."""
    distance = np.linalg.norm(query[:, None].astype(np.float64) - bank[None].astype(np.float64), axis=-1)
    if valid is not None:
        distance[:, ~valid] = np.inf
    index = np.argsort(distance, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distance, index, 1), index


@pytest.mark.parametrize(("m", "k"), [(40, 1), (40, 7), (300, 1), (300, 2), (1000, 5)])
def test_equals_scikit_learn(m, k):
    query, bank = vectors(0, 25, m, 16)
    distance, index = jit_knn(jnp.asarray(query), jnp.asarray(bank), k)
    expected_distance, expected_index = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(bank).kneighbors(query)
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_allclose(distance, expected_distance, rtol=1e-5)


def test_far_from_the_origin():
    """Cancellation in |a|^2 - 2ab + |b|^2 changes neither the neighbors nor the digits of their distances."""
    query, bank = vectors(1, 20, 200, 8)
    distance, index = jit_knn(jnp.asarray(query + 10), jnp.asarray(bank + 10), 1)
    expected_distance, expected_index = brute_force(query + 10, bank + 10, 1)
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_allclose(distance, expected_distance, rtol=1e-5)


def test_k_is_the_whole_bank():
    query, bank = vectors(2, 5, 9, 3)
    distance, index = jit_knn(jnp.asarray(query), jnp.asarray(bank), 9)
    expected_distance, expected_index = brute_force(query, bank, 9)
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_allclose(distance, expected_distance, rtol=1e-5)


@pytest.mark.parametrize("m", [12, 400])
def test_ties_are_ordered_by_index(m):
    bank = np.zeros((m, 2), np.float32)
    bank[::3] = 1.0
    _, index = jit_knn(jnp.ones((1, 2)), jnp.asarray(bank), 4)
    np.testing.assert_array_equal(index[0], [0, 3, 6, 9])


@pytest.mark.parametrize("m", [30, 700])
def test_only_valid_rows_count(m):
    query, bank = vectors(3, 11, m, 6)
    valid = np.random.default_rng(4).random(m) < 0.4
    poisoned = np.where(valid[:, None], bank, np.nan).astype(np.float32)
    distance, index = jit_knn(jnp.asarray(query), jnp.asarray(poisoned), 3, jnp.asarray(valid))
    expected_distance, expected_index = brute_force(query, bank, 3, valid)
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_allclose(distance, expected_distance, rtol=1e-5)


def test_too_few_valid_rows_give_infinity():
    query, bank = vectors(5, 2, 6, 3)
    valid = jnp.arange(6) == 4
    distance, index = jit_knn(jnp.asarray(query), jnp.asarray(bank), 3, valid)
    assert (index[:, 0] == 4).all() and np.isfinite(distance[:, 0]).all() and np.isinf(distance[:, 1:]).all()


@pytest.mark.parametrize("block_elements", [1, 90, 91, 300])
def test_blocks_change_nothing(block_elements, monkeypatch):
    query, bank = vectors(6, 13, 30, 4)
    whole = jit_knn(jnp.asarray(query), jnp.asarray(bank), 3)
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block_elements)
    blocked = jax.jit(lambda q, b: knn(q, b, 3))(query, bank)
    np.testing.assert_array_equal(blocked[1], whole[1])
    np.testing.assert_allclose(blocked[0], whole[0], rtol=1e-5)


def test_memory_is_bounded(monkeypatch):
    """No array of the program holds all distances."""
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 1000)
    shapes = jax.ShapeDtypeStruct((500, 2), jnp.float32), jax.ShapeDtypeStruct((100, 2), jnp.float32)
    program = jax.jit(lambda a, b: knn(a, b, 1)).lower(*shapes).compile()
    assert program.memory_analysis().temp_size_in_bytes < 500 * 100 * 4


def features(seed, n, m, d=160, rank=20):
    """Vectors with most of their variance in few directions, like features of a deep network."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(rank, d))
    rows = rng.normal(size=(n + m, rank)) @ directions + 0.3 * rng.normal(size=(n + m, d)) + 2
    return rows[:n].astype(np.float32), rows[n:].astype(np.float32)


@functools.cache
def with_sketch(k):
    return jax.jit(lambda query, bank, valid: knn(query, bank, k, valid, sketch(bank, valid)))


@pytest.mark.parametrize("k", slow_after(1, [9, 1]))
@pytest.mark.parametrize(
    "case",
    ["features", "isotropic", "duplicates", "constant", "bank itself", "few valid", "far from the origin", "huge"],
)
def test_a_sketch_changes_nothing(case, k):
    """Whatever the first pass proves, the neighbors are those of brute force."""
    query, bank = features(8, 100, 2100)
    valid = np.random.default_rng(9).random(2100) < 0.9
    if case == "isotropic":
        query, bank = vectors(8, 100, 2100, 160)
    elif case == "duplicates":
        bank[1::2] = bank[::2]
    elif case == "constant":
        bank[:] = 1
    elif case == "bank itself":
        query = bank[:100].copy()
    elif case == "few valid":
        valid[:] = np.arange(2100) % 400 == 7
    elif case == "far from the origin":
        query[::2] += 50
    elif case == "huge":
        query, bank = query * 1e12, bank * 1e12
    poisoned = np.where(valid[:, None], bank, np.nan)
    distance, index = with_sketch(k)(query, poisoned, valid)
    expected_distance, expected_index = brute_force(query, bank, k, valid)
    exists = np.isfinite(expected_distance)
    if case not in ("bank itself", "far from the origin"):  # where rounding decides between nearly equal rows
        np.testing.assert_array_equal(np.where(exists, index, 0), np.where(exists, expected_index, 0))
    exact = np.linalg.norm(bank[index].astype(np.float64) - query[:, None].astype(np.float64), axis=-1)
    np.testing.assert_allclose(exact[exists], expected_distance[exists], rtol=1e-6)
    assert (np.diff(np.sort(index, 1), axis=1) > 0).all() or not exists.all()
    np.testing.assert_allclose(distance, expected_distance, rtol=1e-5)


@pytest.mark.parametrize("k", slow_after(1, [9, 1]))
def test_a_sketch_leaves_little_to_brute_force(k, monkeypatch):
    """For vectors like deep features, the first pass proves nearly all neighbors."""
    query, bank = map(jnp.asarray, features(10, 200, 2100))
    bank_sketch, unproven = sketch(bank, jnp.ones(2100, bool)), []
    monkeypatch.setattr(jax.lax, "while_loop", lambda _, retry, carry: unproven.append(np.asarray(carry[2])) or carry)
    knn(query, bank, k, sketch=bank_sketch)
    assert unproven[0].shape == (200,) and unproven[0].mean() < 0.05


def test_sketches_are_never_farther_apart_than_vectors():
    query, bank = features(11, 60, 2100)
    bank_sketch = jax.jit(sketch)(jnp.asarray(bank), jnp.ones(2100, bool))
    short = np.asarray(module._sketch_rows(query - bank_sketch.mean, bank_sketch.basis), np.float64)
    lower = np.linalg.norm(short[:, None] - np.asarray(bank_sketch.rows, np.float64), axis=-1)
    exact = np.linalg.norm(query[:, None].astype(np.float64) - bank, axis=-1)
    assert (lower <= exact * (1 + 1e-5)).all()
    assert np.median(lower / exact) > 0.95
    basis = bank_sketch.basis
    np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-5)


@pytest.mark.parametrize(("m", "d"), [(2047, 160), (3000, 100)])
def test_no_sketch_of_a_small_bank(m, d):
    assert sketch(jnp.zeros((m, d)), jnp.ones(m, bool)) is None


@settings(deadline=None, max_examples=30)
@given(hnp.arrays(np.float32, (3, 200), elements=st.integers(0, 5).map(float)), st.sampled_from([1, 2, 8]))
def test_smallest_k_is_a_stable_sort(x, k):
    value, index = smallest(jnp.asarray(x), k)
    expected = np.argsort(x, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(index, expected)
    np.testing.assert_array_equal(value, np.take_along_axis(x, expected, 1))


def test_squared_distances():
    a, b = vectors(7, 6, 8, 5)
    expected = ((a[:, None].astype(np.float64) - b[None]) ** 2).sum(-1)
    np.testing.assert_allclose(jax.jit(squared_distances)(a, b), expected, rtol=1e-5, atol=1e-5)
    assert (np.asarray(jax.jit(squared_distances)(a, a)) >= 0).all()


@pytest.mark.parametrize("k", [0, 5])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=rf"within 1\.\.4 .* got {k}"):
        knn(jnp.ones((1, 2)), jnp.ones((4, 2)), k)
