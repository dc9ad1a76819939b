"""Color changes against matplotlib in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from matplotlib import colors

from jaxad.synthesis import color
from tests.synthesis.inputs import SEEDS, SIZE, noise


def reference_hue(image: np.ndarray, shift: float, saturation: float = 0.0) -> np.ndarray:
    h, s, v = np.moveaxis(colors.rgb_to_hsv(image), -1, 0)
    return colors.hsv_to_rgb(np.stack([(h + shift) % 1, np.clip(s + saturation, 0, 1), v], -1))


def reference_jitter(image: np.ndarray, changes: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Changes of brightness, contrast, saturation and hue, in this order."""
    brightness, contrast, saturation, hue = np.asarray(changes, np.float64)
    image = np.clip(image * (1 + brightness), 0, 1)
    mean = (image @ color.LUMA)[where].mean()
    image = np.clip(mean + (1 + contrast) * (image - mean), 0, 1)
    gray = (image @ color.LUMA)[..., None]
    image = np.clip(gray + (1 + saturation) * (image - gray), 0, 1)
    return reference_hue(image, hue)


@pytest.mark.parametrize("saturation", [-0.2, 0.0, 0.1])
def test_change_of_hue(saturation):
    image = noise(1)
    expected = reference_hue(np.asarray(image, np.float64), 0.3, saturation)
    np.testing.assert_allclose(color.change_hue(image, jnp.float32(0.3), saturation), expected, atol=1e-4)


@pytest.mark.parametrize(
    "pixel", [(0, 0, 0), (1, 1, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1), (0.5, 0.5, 0.5), (0.2, 0.7, 0.7)]
)
def test_hue_where_channels_are_equal(pixel):
    image = jnp.broadcast_to(jnp.asarray(pixel, jnp.float32), (2, 2, 3))
    np.testing.assert_allclose(color.rgb_to_hsv(image), colors.rgb_to_hsv(np.asarray(image)), atol=1e-6)
    expected = reference_hue(np.asarray(image, np.float64), 0.4)
    np.testing.assert_allclose(color.change_hue(image, jnp.float32(0.4)), expected, atol=1e-6)


def test_rounding_errors_of_gray_have_no_hue():
    """With more saturation, they would become noise of all colors."""
    gray = jnp.broadcast_to(noise(0)[..., :1], (*SIZE, 3))
    change = jax.jit(color.change_hue)
    rounded = jnp.clip(gray + 3e-7 * (noise(1) - 0.5), 0, 1)
    np.testing.assert_allclose(
        change(rounded, jnp.float32(0.2), jnp.float32(0.2)), change(gray, jnp.float32(0.2), jnp.float32(0.2)), atol=1e-5
    )


@given(SEEDS)
@settings(deadline=None, max_examples=20)
def test_jitter(seed):
    image, key = noise(seed), jax.random.key(seed)
    where = np.random.default_rng(seed).random(SIZE) < 0.3
    jitter = jax.jit(color.color_jitter, static_argnums=2)
    np.testing.assert_allclose(jitter(key, image, 0.0), image, atol=1e-5)
    changes = jax.random.uniform(key, (4,), minval=-0.1, maxval=0.1)
    for options in ((), (jnp.asarray(where),)):
        expected = reference_jitter(np.asarray(image, np.float64), changes, where if options else np.ones(SIZE, bool))
        np.testing.assert_allclose(jitter(key, image, 0.1, *options), expected, atol=1e-4)
