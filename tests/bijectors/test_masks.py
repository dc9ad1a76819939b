"""The bound of log scales, the masks and the squeezing of images."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.bijectors import Squeeze, checkerboard_mask, half_mask, quadrant_mask, soft_clamp


@pytest.mark.parametrize("kind", ["atan", "tanh"])
def test_soft_clamp(kind):
    x = jnp.linspace(-1e3, 1e3, 101)
    y = soft_clamp(x, 2.0, kind)
    assert (jnp.abs(y) <= 2).all() and (jnp.diff(y) >= 0).all()
    slope = {"atan": 0.636, "tanh": 2.0}[kind]
    np.testing.assert_allclose(soft_clamp(jnp.float32(1e-3), 2.0, kind), slope * 1e-3, rtol=1e-4)


def test_masks_split_images_into_halves():
    for mask in (checkerboard_mask, half_mask):
        first, second = mask(4, 6, 2), mask(4, 6, 2, True)
        assert (first ^ second).all() and first.sum() == second.sum()
    assert checkerboard_mask(2, 2, 1)[..., 0].tolist() == [[True, False], [False, True]]
    assert half_mask(2, 2, 1)[..., 0].tolist() == [[True, True], [False, False]]
    corners = [np.argwhere(quadrant_mask(2, 2, 1, i)[..., 0]).tolist() for i in range(5)]
    assert corners == [[[0, 0]], [[0, 1]], [[1, 1]], [[1, 0]], [[0, 0]]]


def test_squeeze_moves_blocks_of_pixels_to_channels():
    x = jnp.arange(32.0).reshape(1, 4, 4, 2)
    np.testing.assert_array_equal(Squeeze().forward(x)[0, 0, 0], [0, 2, 8, 10, 1, 3, 9, 11])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: soft_clamp(jnp.zeros(1), 0.0, "atan"), "clamp must be above 0, got 0"),
        (lambda: inspect.unwrap(soft_clamp)(jnp.zeros(1), 1.0, "sin"), 'must be "atan" or "tanh", got "sin"'),
        (lambda: Squeeze().forward(jnp.zeros((3, 4, 1))), "even height and width, got 3 x 4"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
