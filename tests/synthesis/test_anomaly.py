"""Textures in the foreground, Otsu's threshold, shuffled tiles, confetti."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxad.synthesis import anomaly, color
from tests.synthesis.inputs import SEEDS, SIZE, SOURCE, noise


@pytest.mark.slow
def test_textures_stay_in_the_foreground():
    keys, foreground = jax.random.split(jax.random.key(0), 20), jnp.zeros(SIZE, bool).at[10:30, 20:40].set(True)

    @jax.vmap
    def masks(key):
        return [anomaly.add_texture(key, noise(0), SOURCE, foreground=where)[1] for where in (foreground, None)]

    restricted, anywhere = (np.asarray(mask) for mask in masks(keys))
    assert restricted.any() and (anywhere & ~np.asarray(foreground)).any()
    np.testing.assert_array_equal(restricted, anywhere & np.asarray(foreground))


def test_the_foreground_is_the_side_of_otsus_threshold_off_the_border():
    rng = np.random.default_rng(0)
    expected = np.zeros(SIZE, bool)
    expected[10:40, 12:50] = True
    for background, brightness in ((0.2, 0.8), (0.8, 0.2)):
        image = np.where(expected, brightness, background)[..., None] + rng.normal(0, 0.05, (*SIZE, 3))
        foreground = np.asarray(anomaly.foreground(jnp.asarray(np.clip(image, 0, 1), jnp.float32)))
        assert (foreground == expected).mean() > 0.99
    assert anomaly.foreground(jnp.full((*SIZE, 3), 0.3)).all()


def test_otsus_threshold_maximizes_the_variance_between_both_sides():
    image = np.clip(np.random.default_rng(1).normal(0.5, 0.2, (*SIZE, 3)), 0, 1).astype(np.float32)
    level = np.asarray(jnp.round(color.gray_of(jnp.asarray(image))[..., 0] * 255)).astype(int)

    def variance(threshold):
        low, high = level[level <= threshold], level[level > threshold]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2 if len(low) and len(high) else 0

    bright = level > max(range(256), key=variance)
    foreground = np.asarray(anomaly.foreground(jnp.asarray(image)))
    assert (foreground == bright).all() or (foreground == ~bright).all()


def test_tiles_are_shuffled_and_none_is_lost():
    with pytest.raises(ValueError, match=r"multiples of \(4, 8\), the rows and columns of tiles, got \(50, 64\)"):
        anomaly.shuffled_tiles(jax.random.key(0), jnp.zeros((50, 64, 3)))
    assert anomaly.shuffled_tiles(jax.random.key(0), noise(0)).shape == (*SIZE, 3)
    image = np.asarray(noise(0))
    output = np.asarray(anomaly.shuffle_tiles(jax.random.key(0), jnp.asarray(image), (4, 8)))

    def tiles(image):
        return {image[i : i + 12, j : j + 8].tobytes() for i in range(0, 48, 12) for j in range(0, 64, 8)}

    assert len(tiles(image)) == 32 and tiles(output) == tiles(image) and not np.array_equal(output, image)


SINGLE_CONFETTI = jax.jit(functools.partial(anomaly.confetti, max_rectangles=1, degrees=0.0))


@given(SEEDS)
@settings(deadline=None, max_examples=10)
def test_confetti_has_sizes_in_range(seed):
    """One rectangle, not rotated; the part outside the image is missing."""
    _, mask = SINGLE_CONFETTI(jax.random.key(seed), noise(seed))
    rows, columns = np.asarray(mask).any(1), np.asarray(mask).any(0)
    low, high = 8 / 240 * SIZE[0], 54 / 240 * SIZE[0]
    for side in (rows, columns):
        assert side.sum() <= high + 1 and (side[0] or side[-1] or side.sum() >= low - 1)
    assert mask.sum() == rows.sum() * columns.sum() > 0
