"""Structural similarity, the focal loss and unit vectors against plain computations."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from jaxad.ops.cosine import unit
from jaxad.ops.losses import focal_loss
from jaxad.ops.ssim import ssim

RNG = np.random.default_rng(0)


def test_ssim_has_gaussian_windows_and_pads_with_zeros():
    a, b = RNG.random((2, 2, 20, 17, 3))
    b = 0.7 * a + 0.3 * b

    def smooth(x):
        return ndimage.gaussian_filter(x, 1.5, radius=5, mode="constant", axes=(1, 2))

    ma, mb = smooth(a), smooth(b)
    va, vb, vab = smooth(a * a) - ma**2, smooth(b * b) - mb**2, smooth(a * b) - ma * mb
    expected = (2 * ma * mb + 1e-4) * (2 * vab + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    similarity = jax.jit(ssim)(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    np.testing.assert_allclose(similarity, expected.mean((1, 2, 3)), atol=1e-3)
    np.testing.assert_allclose(jax.jit(ssim)(jnp.asarray(a, jnp.float32), jnp.asarray(a, jnp.float32)), 1, atol=1e-5)


def test_focal_loss_weights_predicted_labels_less():
    probability, label = RNG.random(200), RNG.integers(0, 2, 200)
    label_probability = np.where(label == 1, probability, 1 - probability)
    loss = focal_loss(jnp.asarray(probability, jnp.float32), jnp.asarray(label == 1))
    expected = -((1 - label_probability) ** 2) * np.log(label_probability)
    np.testing.assert_allclose(loss, expected, rtol=1e-2, atol=1e-4)


def test_unit_vectors_and_the_gradient_of_zeros():
    x = jnp.asarray([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(unit(x), [[0.6, 0.8], [0, 0]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: unit(x).sum())(x)).all()
