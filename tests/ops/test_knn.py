"""Nearest neighbors against scikit-learn and against brute force in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.neighbors import NearestNeighbors

from jaxad.ops import knn as module
from jaxad.ops.knn import knn, smallest_k, squared_distances

find = jax.jit(knn, static_argnums=2)
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
    distance, index = find(jnp.asarray(query), jnp.asarray(bank), k)
    wanted_distance, wanted_index = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(bank).kneighbors(query)
    np.testing.assert_array_equal(index, wanted_index)
    np.testing.assert_allclose(distance, wanted_distance, rtol=1e-5)


def test_far_from_the_origin():
    """Cancellation in |a|^2 - 2ab + |b|^2 costs digits of the distance, not the right neighbor."""
    query, bank = vectors(1, 20, 200, 8)
    distance, index = find(jnp.asarray(query + 10), jnp.asarray(bank + 10), 1)
    wanted_distance, wanted_index = brute_force(query + 10, bank + 10, 1)
    np.testing.assert_array_equal(index, wanted_index)
    np.testing.assert_allclose(distance, wanted_distance, atol=1e-2)


def test_k_is_the_whole_bank():
    query, bank = vectors(2, 5, 9, 3)
    distance, index = find(jnp.asarray(query), jnp.asarray(bank), 9)
    wanted_distance, wanted_index = brute_force(query, bank, 9)
    np.testing.assert_array_equal(index, wanted_index)
    np.testing.assert_allclose(distance, wanted_distance, rtol=1e-5)


@pytest.mark.parametrize("m", [12, 400])
def test_ties_are_ordered_by_index(m):
    bank = np.zeros((m, 2), np.float32)
    bank[::3] = 1.0
    _, index = find(jnp.ones((1, 2)), jnp.asarray(bank), 4)
    np.testing.assert_array_equal(index[0], [0, 3, 6, 9])


@pytest.mark.parametrize("m", [30, 700])
def test_valid_rows_alone_count(m):
    query, bank = vectors(3, 11, m, 6)
    valid = np.random.default_rng(4).random(m) < 0.4
    poisoned = np.where(valid[:, None], bank, np.nan).astype(np.float32)
    distance, index = find(jnp.asarray(query), jnp.asarray(poisoned), 3, jnp.asarray(valid))
    wanted_distance, wanted_index = brute_force(query, bank, 3, valid)
    np.testing.assert_array_equal(index, wanted_index)
    np.testing.assert_allclose(distance, wanted_distance, rtol=1e-5)


def test_too_few_valid_rows_give_infinity():
    query, bank = vectors(5, 2, 6, 3)
    valid = jnp.arange(6) == 4
    distance, index = find(jnp.asarray(query), jnp.asarray(bank), 3, valid)
    assert (index[:, 0] == 4).all() and np.isfinite(distance[:, 0]).all() and np.isinf(distance[:, 1:]).all()


@pytest.mark.parametrize("block_elements", [1, 90, 91, 300])
def test_blocks_change_nothing(block_elements, monkeypatch):
    query, bank = vectors(6, 13, 30, 4)
    whole = find(jnp.asarray(query), jnp.asarray(bank), 3)
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


@settings(deadline=None, max_examples=30)
@given(hnp.arrays(np.float32, (3, 200), elements=st.integers(0, 5).map(float)), st.sampled_from([1, 2, 8]))
def test_smallest_k_is_a_stable_sort(x, k):
    value, index = smallest(jnp.asarray(x), k)
    wanted = np.argsort(x, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(index, wanted)
    np.testing.assert_array_equal(value, np.take_along_axis(x, wanted, 1))


def test_squared_distances():
    a, b = vectors(7, 6, 8, 5)
    wanted = ((a[:, None].astype(np.float64) - b[None]) ** 2).sum(-1)
    np.testing.assert_allclose(jax.jit(squared_distances)(a, b), wanted, rtol=1e-5, atol=1e-5)
    assert (np.asarray(jax.jit(squared_distances)(a, a)) >= 0).all()


@pytest.mark.parametrize("k", [0, 5])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=rf"within 1\.\.4 .* got {k}"):
        knn(jnp.ones((1, 2)), jnp.ones((4, 2)), k)
