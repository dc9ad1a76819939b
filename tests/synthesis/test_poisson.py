"""Seamless cloning against a sparse direct solver."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
from scipy import ndimage

from jaxad.synthesis import poisson
from tests.synthesis.inputs import SIZE, noise

MASKS = {
    "rectangle": lambda: np.pad(np.ones((18, 26), bool), ((9, 21), (5, 33))),
    "blob": lambda: ndimage.gaussian_filter(np.random.default_rng(0).normal(size=SIZE), 3) > 0.03,
    "pixel": lambda: np.pad(np.ones((1, 1), bool), ((9, 38), (5, 58))),
}


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_seamless_cloning_is_the_sparse_solution(name, mixed):
    target, source, mask = np.asarray(noise(0), np.float64) * 0.2 + 0.4, np.asarray(noise(1), np.float64), MASKS[name]()
    source = np.stack([ndimage.gaussian_filter(source[..., c], 4) for c in range(3)], -1)
    cloned = np.asarray(
        jax.jit(poisson.seamless_clone)(
            jnp.asarray(target, jnp.float32), jnp.asarray(source, jnp.float32), jnp.asarray(mask), mixed
        )
    )
    inner = mask.copy()
    inner[[0, -1]] = inner[:, [0, -1]] = False
    sizes = [np.abs(np.diff(x, axis=0)[:, :-1] - np.diff(x, axis=1)[:-1]) for x in (source, target)]
    use_target = mixed & (sizes[1] >= sizes[0])
    number = np.full(SIZE, -1)
    number[inner] = np.arange(inner.sum())
    matrix = scipy.sparse.lil_array((inner.sum(), inner.sum()))
    right = np.zeros((inner.sum(), 3))
    for y, x in np.argwhere(inner):
        i = number[y, x]
        matrix[i, i] = 4
        for p, q in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            gradient, target_gradient = source[y, x] - source[p, q], target[y, x] - target[p, q]
            right[i] += np.where(use_target[min(y, p), min(x, q)], target_gradient, gradient)
            if inner[p, q]:
                matrix[i, number[p, q]] = -1
            else:
                right[i] += target[p, q]
    expected = target.copy()
    expected[inner] = scipy.sparse.linalg.spsolve(matrix.tocsc(), right).reshape(-1, 3)
    np.testing.assert_allclose(cloned, np.clip(expected, 0, 1), atol=1e-3)
    np.testing.assert_array_equal(cloned[~inner], target.astype(np.float32)[~inner])
