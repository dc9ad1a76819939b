"""How linear bijectors are initialized."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxad.bijectors import ActNorm, act_norm_init, init_in_order, random_orthogonal

KEY = jax.random.key(0)


def test_actnorm_starts_with_mean_0_and_variance_1():
    x = 5 + 3 * np.random.default_rng(0).normal(size=(64, 4, 4, 3)).astype(np.float32)
    valid = np.arange(64) < 50
    x[50:] = np.nan
    params = jax.jit(act_norm_init)(np.where(valid[:, None, None, None], x, 0), valid)
    y = ActNorm(*params, 3).forward(jnp.asarray(x[:50]))
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(y.std((0, 1, 2)), 1, atol=1e-4)


def test_levels_are_initialized_in_order():
    """The key of a level depends on the rotations of the level before it."""

    def keys(first: float) -> Any:
        levels = init_in_order(lambda key, c: (jax.random.key_data(key), jnp.full((1, c, c), first)), KEY, (2, 3))
        assert [rotations.shape for _, rotations in levels] == [(1, 2, 2), (1, 3, 3)]
        return [np.asarray(key) for key, _ in levels]

    plain, waiting = keys(1.0), keys(np.nan)
    np.testing.assert_array_equal(plain[0], waiting[0])
    assert (plain[1] != waiting[1]).any()


def test_a_random_rotation_has_determinant_1():
    matrix = np.asarray(jax.vmap(lambda key: random_orthogonal(key, 5))(jax.random.split(KEY, 8)))
    np.testing.assert_allclose(matrix @ matrix.transpose(0, 2, 1), np.broadcast_to(np.eye(5), (8, 5, 5)), atol=1e-5)
    np.testing.assert_allclose(np.linalg.det(matrix), 1, atol=1e-5)
