"""Perlin noise against a loop over pixels; the size and the borders of masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxad.synthesis import perlin
from tests.examples import slow_after


def perlin_by_pixel(angles, size, cells):
    """Perlin's noise, pixel by pixel."""

    def fade(t):
        return 6 * t**5 - 15 * t**4 + 10 * t**3

    noise = np.zeros(size)
    for y, x in np.ndindex(*size):
        v, u = y * cells[0] / size[0], x * cells[1] / size[1]
        i, j = int(v), int(u)
        corner = {
            (a, b): np.cos(angles[i + a, j + b]) * (u - j - b) + np.sin(angles[i + a, j + b]) * (v - i - a)
            for a in (0, 1)
            for b in (0, 1)
        }
        left, right = ((1 - fade(v - i)) * corner[0, b] + fade(v - i) * corner[1, b] for b in (0, 1))
        noise[y, x] = np.sqrt(2) * ((1 - fade(u - j)) * left + fade(u - j) * right)
    return noise


@pytest.mark.parametrize(
    ("size", "cells", "max_cells"), [((20, 31), (3, 5), 5), ((16, 16), (1, 4), 8), ((7, 9), (2, 2), 2)]
)
def test_perlin_noise_is_the_classical_one(size, cells, max_cells):
    key = jax.random.key(1)
    angles = np.asarray(jax.random.uniform(key, (max_cells + 1, max_cells + 1), maxval=2 * jnp.pi), np.float64)
    noise = jax.jit(perlin.perlin_noise, static_argnums=(1, 3))(key, size, jnp.asarray(cells), max_cells)
    np.testing.assert_allclose(noise, perlin_by_pixel(angles, size, cells), atol=1e-5)
    assert float(jnp.abs(noise).max()) <= 1


def test_fractal_noise_adds_octaves():
    key = jax.random.key(0)
    noise = jax.jit(perlin.perlin_noise, static_argnums=(1, 2))
    octaves = [noise(jax.random.fold_in(key, i), (24, 30), (2 << i, 3 << i)) for i in range(3)]
    expected = sum(0.5**i * octave for i, octave in enumerate(octaves)) / np.sqrt(1 + 0.25 + 0.0625)
    np.testing.assert_allclose(
        jax.jit(perlin.fractal_noise, static_argnums=(1, 2, 3))(key, (24, 30), (2, 3), 3), expected, atol=1e-5
    )


@pytest.mark.parametrize(
    ("size", "high"), slow_after(2, [((256, 256), 6), ((64, 64), 4), ((288, 300), 6), ((128, 160), 5)])
)
def test_the_smallest_cells_of_a_mask_have_about_8_pixels(size, high):
    """At DRAEM's 256 pixels, the range is that of its code."""
    mask = jax.jit(functools.partial(perlin.perlin_mask, jax.random.key(3), size), static_argnums=0)
    np.testing.assert_array_equal(mask(), mask((0, high)))
    assert (mask() != mask((0, high + 1))).any()


def test_octaves_roughen_borders_and_keep_the_area():
    keys = jax.random.split(jax.random.key(1), 48)
    draw = functools.partial(perlin.perlin_mask, size=(128, 128), degrees=0.0)

    def border_share(**options) -> float:
        """The share of the masks' pixels that are on a border."""
        masks = np.asarray(jax.jit(jax.vmap(lambda key: draw(key, **options)))(keys))
        assert 0.02 < masks.mean() < 0.15
        return sum((mask & ~ndimage.binary_erosion(mask)).sum() for mask in masks) / masks.sum()

    one, several = (border_share(exponents=(1, 2), octaves=octaves) for octaves in (1, 5))
    assert several > 1.5 * one
    assert border_share(octaves=4) > 0
