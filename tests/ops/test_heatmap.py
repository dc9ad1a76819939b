"""Pooling and stacking against loops in numpy, smoothing against scipy."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxad.ops.heatmap import counted, neighborhood_mean, stack_maps, upsample_blur


def maps(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def bilinear(image, size):
    """torch's `interpolate(mode="bilinear", align_corners=False)` of one h w image, pixel by pixel."""
    (h, w), out = image.shape, np.zeros(size)
    for i, j in np.ndindex(*size):
        y = max((i + 0.5) * h / size[0] - 0.5, 0)
        x = max((j + 0.5) * w / size[1] - 0.5, 0)
        top, left = int(y), int(x)
        bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
        dy, dx = y - top, x - left
        upper = image[top, left] * (1 - dx) + image[top, right] * dx
        lower = image[bottom, left] * (1 - dx) + image[bottom, right] * dx
        out[i, j] = upper * (1 - dy) + lower * dy
    return out


@pytest.mark.parametrize("sigma", [0.0, 0.6, 4.0])
@pytest.mark.parametrize(("grid", "size"), [((4, 4), (16, 16)), ((5, 3), (17, 20)), ((1, 2), (6, 7)), ((8, 8), (8, 8))])
def test_upsample_blur_is_bilinear_then_gaussian(grid, size, sigma):
    scores = maps(0, 2, *grid)
    result = upsample_blur(jnp.asarray(scores), size, sigma)
    assert result.shape == (2, *size) and result.dtype == jnp.float32
    for heatmap, score in zip(result, scores.astype(np.float64), strict=True):
        expected = bilinear(score, size)
        if sigma:
            expected = ndimage.gaussian_filter(expected, sigma, mode="reflect")
        np.testing.assert_allclose(heatmap, expected, atol=1e-5)


def test_upsample_blur_keeps_constants():
    np.testing.assert_allclose(upsample_blur(jnp.full((1, 3, 3), 7.0), (24, 24), 4.0), 7, rtol=1e-6)


@pytest.mark.parametrize("sigma", [-1.0, float("nan"), float("inf")])
def test_sigma_out_of_range(sigma):
    with pytest.raises(ValueError, match=f"sigma must be 0 or more pixels, got {sigma}"):
        upsample_blur(jnp.ones((1, 2, 2)), (4, 4), sigma)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_neighborhood_mean_with_zeros_beyond_the_border(size):
    x = maps(1, 2, 5, 6, 3)
    before = (size - 1) // 2
    expected = np.zeros(x.shape)
    for i, j in np.ndindex(5, 6):
        window = x[:, max(i - before, 0) : i - before + size, max(j - before, 0) : j - before + size]
        expected[:, i, j] = window.astype(np.float64).sum((1, 2)) / size**2
    np.testing.assert_allclose(neighborhood_mean(jnp.asarray(x), size), expected, atol=1e-6)


def test_stack_maps_linear():
    fine, coarse = maps(2, 2, 8, 6, 3), maps(3, 2, 4, 3, 2)
    result = stack_maps([jnp.asarray(fine), jnp.asarray(coarse)])
    np.testing.assert_array_equal(result[..., :3], fine)
    for image, channel in np.ndindex(2, 2):
        expected = bilinear(coarse[image, ..., channel], (8, 6))
        np.testing.assert_allclose(result[image, ..., 3 + channel], expected, atol=1e-6)


def test_stack_maps_nearest_repeats():
    fine, middle, coarse = maps(4, 1, 8, 8, 1), maps(5, 1, 4, 4, 2), maps(6, 1, 2, 2, 1)
    result = stack_maps([jnp.asarray(m) for m in (fine, middle, coarse)], "nearest")
    expected = np.concatenate([fine, middle.repeat(2, 1).repeat(2, 2), coarse.repeat(4, 1).repeat(4, 2)], -1)
    np.testing.assert_array_equal(result, expected)


def test_a_position_counts_unless_all_of_its_pixels_are_ignored():
    scores, ignore = maps(0, 1, 3, 2), np.zeros((1, 9, 8), bool)
    ignore[0, :5, :4] = True  # the first cell, and most of the second row of the first column
    expected = scores.copy()
    expected[0, 0, 0] = -np.inf
    np.testing.assert_array_equal(counted(jnp.asarray(scores), jnp.asarray(ignore)), expected)
    np.testing.assert_array_equal(counted(jnp.asarray(scores), None), scores)
