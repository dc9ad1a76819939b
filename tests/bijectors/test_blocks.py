"""The affine block against its formula in numpy (FrEIA's AllInOneBlock)."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxad.bijectors import BlockParams, Invertible1x1, Permutation, affine_block, block_params


def test_the_formula():
    rng = np.random.default_rng(0)
    c, clamp = 5, 1.9
    x = rng.normal(size=(7, c)).astype(np.float32)
    weight = rng.normal(size=(3, 4)).astype(np.float32)
    scale, shift = (rng.normal(size=c).astype(np.float32) for _ in range(2))
    index = rng.permutation(c)
    params = BlockParams(None, jnp.asarray(8 + scale), jnp.asarray(shift))
    block = affine_block(
        params, lambda half: half @ weight, Permutation(jnp.asarray(index), 1), clamp=clamp, event_ndims=1
    )
    y, log_det = block.forward_and_log_det(jnp.asarray(x))

    raw = 0.1 * (x[:, :3] @ weight)
    log_scale = clamp * np.tanh(raw[:, :2] / clamp)
    transformed = np.concatenate([x[:, :3], x[:, 3:] * np.exp(log_scale) + raw[:, 2:]], 1)
    softplus = 2 * np.log1p(np.exp((8 + scale) / 2))
    np.testing.assert_allclose(y, (transformed * 0.1 * softplus + shift)[:, index], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(log_det, log_scale.sum(1) + np.log(0.1 * softplus).sum(), rtol=1e-4, atol=1e-5)


def test_a_block_starts_with_scale_1_and_shift_0():
    params = block_params(None, 4)
    identity = Invertible1x1(jnp.eye(4), 1, orthogonal=True)
    x = jax.random.normal(jax.random.key(0), (3, 4))
    block = affine_block(params, lambda half: jnp.zeros((3, 4)), identity, clamp=1.0, event_ndims=1)
    y, log_det = block.forward_and_log_det(x)
    np.testing.assert_allclose(y, x, rtol=1e-5)
    np.testing.assert_allclose(log_det, 0, atol=1e-5)
