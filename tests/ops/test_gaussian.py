"""Streaming moments against numpy, shrinkage against scikit-learn, distances against scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import distance
from sklearn.covariance import LedoitWolf

from jaxad.ops.gaussian import ledoit_wolf, mahalanobis, moments_init, moments_merge, moments_update

update, merge = jax.jit(moments_update), jax.jit(moments_merge)
shrink = jax.jit(ledoit_wolf)
ROWS = 6


def samples(seed, n, d, offset=3.0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + offset).astype(np.float32)


def batches(x, cuts):
    """The rows between the cuts, padded with NaN to ROWS at random positions."""
    rng = np.random.default_rng(len(cuts))
    for part in np.split(x, sorted(cuts)):
        for start in range(0, len(part), ROWS):
            rows = part[start : start + ROWS]
            padded = np.full((ROWS, *x.shape[1:]), np.nan, np.float32)
            where = np.sort(rng.permutation(ROWS)[: len(rows)])
            padded[where] = rows
            yield jnp.asarray(padded), jnp.asarray(np.isin(np.arange(ROWS), where))


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 40), st.lists(st.integers(0, 40), max_size=6), st.data())
def test_any_split_padding_and_merge_order_gives_the_covariance(n, cuts, data):
    x = samples(n, n, 6).reshape(n, 2, 3)
    parts = [update(moments_init((2, 3)), *batch) for batch in batches(x, cuts)]
    parts = [*data.draw(st.permutations(parts)), moments_init((2, 3))]
    while len(parts) > 1:
        i = data.draw(st.integers(0, len(parts) - 2))
        parts[i : i + 2] = [merge(parts[i], parts[i + 1])]
    count, mean, scatter = parts[0]
    assert count == n
    for position in range(2):
        np.testing.assert_allclose(mean[position], x[:, position].astype(np.float64).mean(0), rtol=1e-4, atol=1e-4)
        expected = np.cov(x[:, position].astype(np.float64).T) * (n - 1)
        np.testing.assert_allclose(scatter[position], expected, atol=1e-4 * max(1, abs(expected).max()))


def test_a_sequence_of_batches_is_a_merge():
    x = samples(0, 30, 6).reshape(30, 2, 3)
    streamed, merged = moments_init((2, 3)), moments_init((2, 3))
    for batch in batches(x, [7, 20]):
        streamed = update(streamed, *batch)
        merged = merge(merged, update(moments_init((2, 3)), *batch))
    for a, b in zip(streamed, merged, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_a_large_offset_does_not_cancel():
    """Sums of squares would lose all digits here."""
    x = samples(1, 200, 4, offset=1000)
    moments = moments_init((4,))
    for batch in batches(x, []):
        moments = update(moments, *batch)
    np.testing.assert_allclose(moments.scatter / 199, np.cov(x.astype(np.float64).T), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("n", "d"), [(100, 5), (30, 30), (10, 40), (2, 6)])
def test_ledoit_wolf_equals_scikit_learn(n, d):
    x = samples(n, n, d)
    padded, valid = np.full((n + 3, d), np.nan, np.float32), np.arange(n + 3) >= 3
    padded[valid] = x
    mean, covariance = shrink(jnp.asarray(padded), jnp.asarray(valid))
    oracle = LedoitWolf().fit(x.astype(np.float64))
    np.testing.assert_allclose(mean, oracle.location_, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(covariance, oracle.covariance_, atol=1e-4 * abs(oracle.covariance_).max())


def test_ledoit_wolf_shrinks_isotropic_noise_fully():
    x = np.random.default_rng(3).normal(size=(20, 50)).astype(np.float32)
    _, covariance = shrink(jnp.asarray(x), jnp.ones(20, bool))
    np.testing.assert_allclose(covariance, LedoitWolf().fit(x).covariance_, atol=1e-4)


@pytest.mark.parametrize("n", [12, 60])
def test_ledoit_wolf_of_kept_columns(n):
    x = samples(4, n, 9)
    kept = np.array([1, 0, 1, 1, 0, 1, 1, 1, 0], bool)
    zeros_elsewhere = jnp.asarray(np.where(kept, x, 0).astype(np.float32))
    mean, covariance = shrink(zeros_elsewhere, jnp.ones(n, bool), jnp.asarray(kept))
    oracle = LedoitWolf().fit(x[:, kept].astype(np.float64))
    np.testing.assert_allclose(mean[kept], oracle.location_, rtol=1e-4, atol=1e-4)
    scale = abs(oracle.covariance_).max()
    np.testing.assert_allclose(np.asarray(covariance)[np.ix_(kept, kept)], oracle.covariance_, atol=1e-4 * scale)
    np.testing.assert_array_equal(np.asarray(covariance)[~kept], np.eye(9)[~kept])


def test_ledoit_wolf_of_equal_samples_is_the_identity():
    mean, covariance = shrink(jnp.full((5, 3), 2.0), jnp.ones(5, bool))
    np.testing.assert_array_equal(mean, [2, 2, 2])
    np.testing.assert_array_equal(covariance, np.eye(3))


def test_mahalanobis_equals_scipy():
    x = samples(5, 8, 8).reshape(8, 2, 4)
    mean = samples(6, 2, 4)
    covariance = np.stack([np.cov(samples(7 + i, 50, 4).T) for i in range(2)])
    factor = jnp.asarray(np.linalg.cholesky(covariance), jnp.float32)
    result = jax.jit(mahalanobis)(jnp.asarray(x), jnp.asarray(mean), factor)
    inverse = np.linalg.inv(covariance)
    expected = [[distance.mahalanobis(v, m, i) for v, m, i in zip(row, mean, inverse, strict=True)] for row in x]
    np.testing.assert_allclose(result, expected, rtol=1e-4)


def test_mahalanobis_without_leading_axes():
    x, factor = samples(8, 5, 3), np.linalg.cholesky(np.cov(samples(9, 40, 3).T))
    result = jax.jit(mahalanobis)(jnp.asarray(x), jnp.zeros(3), jnp.asarray(factor, jnp.float32))
    expected = [distance.mahalanobis(v, np.zeros(3), np.linalg.inv(factor @ factor.T)) for v in x]
    np.testing.assert_allclose(result, expected, rtol=1e-4)
