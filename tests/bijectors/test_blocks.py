"""The affine block before training; tests/parity compares it with FrEIA's."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxad.bijectors import Invertible1x1, affine_block, block_params


def test_a_block_starts_with_scale_1_and_shift_0():
    params = block_params(None, 4)
    identity = Invertible1x1(jnp.eye(4), 1, orthogonal=True)
    x = jax.random.normal(jax.random.key(0), (3, 4))
    block = affine_block(params, lambda half: jnp.zeros((3, 4)), identity, clamp=1.0, event_ndims=1)
    y, log_det = block.forward_and_log_det(x)
    np.testing.assert_allclose(y, x, rtol=1e-5)
    np.testing.assert_allclose(log_det, 0, atol=1e-5)
