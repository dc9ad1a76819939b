"""k-means against scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans

from jaxad.ops.kmeans import kmeans, plus_plus

KEY = jax.random.key(0)


def points(n: int, d: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(n, d)) + 4 * rng.normal(size=(5, d))[rng.integers(0, 5, n)]).astype(np.float32)


@pytest.mark.parametrize(("n", "d", "k"), [(200, 3, 7), (60, 8, 5), (20, 2, 20)])
def test_kmeans_equals_scikit_learn(n, d, k):
    x = points(n, d)
    start = np.asarray(plus_plus(KEY, jnp.asarray(x), k))
    expected = KMeans(k, init=start, n_init=1, tol=0, algorithm="lloyd").fit(x).cluster_centers_
    centers = jax.jit(kmeans)(jnp.asarray(x), jnp.asarray(start))
    np.testing.assert_allclose(centers, expected, atol=1e-4)


def test_a_center_without_points_stays():
    x, start = jnp.array([[0.0], [1.0]]), jnp.array([[0.0], [99.0]])
    np.testing.assert_allclose(kmeans(x, start), [[0.5], [99.0]])


def test_seeds_are_points_far_from_each_other():
    x = jnp.asarray(np.repeat(np.array([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]], np.float32), 40, 0))
    seeds = np.asarray(plus_plus(KEY, x, 3))
    assert {tuple(seed) for seed in seeds.tolist()} == {(0.0, 0.0), (50.0, 0.0), (0.0, 50.0)}
