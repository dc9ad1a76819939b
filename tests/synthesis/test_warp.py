"""Rotations against scipy; shifts are tested with the method that uses them."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxad.synthesis import warp


@pytest.mark.parametrize("degrees", [-63.0, 0.0, 20.0, 90.0])
def test_rotation_is_scipys(degrees):
    image = np.random.default_rng(0).random((21, 30, 3), np.float32)
    expected = ndimage.rotate(image, degrees, reshape=False, order=1, mode="grid-constant")
    np.testing.assert_allclose(warp.rotate(jnp.asarray(image), degrees), expected, atol=1e-3)
