"""Loops in other forms give the same results."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxad.ops.loops import map_in_order, map_rows


def test_map_rows_is_a_loop():
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    np.testing.assert_array_equal(map_rows(jnp.cumsum, jnp.asarray(x)), np.cumsum(x, 1))


def test_map_in_order_is_a_loop():
    rng = np.random.default_rng(1)
    matrices = [a @ a.T + np.eye(n) for n in (2, 5, 3) for a in [rng.normal(size=(n, n))]]
    scales = [1.0, 2.0, 3.0]

    @jax.jit
    def factors(matrices):
        return map_in_order(lambda m, scale: (scale, jnp.linalg.cholesky(m) * scale), matrices, scales)

    results = factors([jnp.asarray(m, jnp.float32) for m in matrices])
    for (scale, factor), m, expected in zip(results, matrices, scales, strict=True):
        assert scale == expected
        np.testing.assert_allclose(factor, np.linalg.cholesky(m) * scale, rtol=1e-4, atol=1e-5)


def test_map_in_order_makes_every_call_depend_on_the_call_before():
    """So that no two LAPACK calls run at the same time."""

    def last(first):
        return map_in_order(lambda x: 2 * x, [first, jnp.ones(2), jnp.ones(3)])[-1]

    np.testing.assert_array_equal(last(jnp.ones(4)), 2)
    assert np.isnan(last(jnp.full(4, jnp.nan))).all()
