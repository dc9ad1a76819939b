"""SSPCAB: which positions it sees, and its values in numpy."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxad.nn.sspcab import Sspcab

RNG = np.random.default_rng(0)


def test_sspcab_sees_only_the_corners_around_a_position():
    block, x = Sspcab(), jnp.asarray(RNG.normal(size=(1, 9, 9, 16)), jnp.float32)
    variables = jax.jit(block.init)(jax.random.key(0), x)
    assert jax.eval_shape(block.apply, variables, x).shape == x.shape

    def center_output(x):  # its attention averages over all positions, and so has small gradients
        corners = [variables["params"][f"corner{i}"] for i in range(4)]
        return sum(p["kernel"][0, 0].sum() for p in corners) + block.apply(variables, x)[0, 4, 4].sum()

    slope = np.abs(np.asarray(jax.jit(jax.grad(center_output))(x))[0]).sum(-1)
    corners = {(2, 2), (2, 6), (6, 2), (6, 6)}
    largest = {tuple(map(int, np.unravel_index(i, slope.shape))) for i in np.argsort(slope.ravel())[-4:]}
    assert largest <= corners and slope[4, 4] < 0.2 * slope.max()


def test_sspcab_in_numpy():
    block, x = Sspcab(), jnp.asarray(RNG.normal(size=(2, 5, 6, 16)), jnp.float32)
    variables = jax.jit(block.init)(jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    padded, output = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0))), 0
    for i, (down, right) in enumerate(((0, 0), (4, 0), (0, 4), (4, 4))):
        corner = padded[:, down : down + 5, right : right + 6]
        output = output + corner @ params[f"corner{i}"]["kernel"][0, 0] + params[f"corner{i}"]["bias"]
    output = np.maximum(output, 0)
    hidden = np.maximum(output.mean((1, 2)) @ params["squeeze"]["kernel"] + params["squeeze"]["bias"], 0)
    weight = 1 / (1 + np.exp(-(hidden @ params["excite"]["kernel"] + params["excite"]["bias"])))
    np.testing.assert_allclose(jax.jit(block.apply)(variables, x), output * weight[:, None, None], rtol=1e-4, atol=1e-5)
