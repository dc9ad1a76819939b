"""NSA: the distribution of patch sizes, medians against scipy, objects."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from scipy import ndimage, stats

from jaxad.synthesis import nsa
from tests.synthesis.inputs import SEEDS, SIZE, SOURCE, noise


def test_half_sides_follow_a_clipped_gamma_distribution():
    dims = jnp.asarray([200.0, 300.0])
    keys = jax.random.split(jax.random.key(0), 2000)
    halves = np.asarray(jax.vmap(lambda key: nsa.half_sides(key, dims, nsa.Sizes(0.06, 0.2)) / dims)(keys))
    gamma = stats.gamma(2.0, loc=0.03, scale=0.05)
    np.testing.assert_allclose((halves.min(), halves.max()), (0.06, 0.2), rtol=1e-6)
    for share, clipped in ((gamma.cdf(0.06), halves < 0.06001), (gamma.sf(0.2), halves > 0.19999)):
        np.testing.assert_allclose(clipped.mean(), share, atol=0.03)
    between = halves[(halves > 0.06001) & (halves < 0.19999)]
    low, high = gamma.cdf([0.06, 0.2])
    assert stats.kstest(between, lambda x: (gamma.cdf(x) - low) / (high - low)).pvalue > 1e-3


PROGRAM = jax.jit(functools.partial(nsa.natural_anomaly, pieces=1, sizes=nsa.Sizes(0.2, 0.4), labels="binary"))


@given(SEEDS)
@settings(deadline=None, max_examples=15)
def test_patches_have_sizes_in_range(seed):
    image = jnp.broadcast_to(jnp.asarray(128 / 255), (*SIZE, 3))
    output, _ = PROGRAM(jax.random.key(seed), image, SOURCE)
    changed = np.asarray(jnp.abs(output - image).max(-1)) > 1e-5
    for side, n in zip((changed.any(1).sum(), changed.any(0).sum()), SIZE, strict=True):
        assert 0.2 * n - 6 <= side <= 0.4 * n + 1


def test_the_median_of_a_window():
    x = np.random.default_rng(0).integers(0, 766, (20, 30))
    for window in (nsa.SQUARE, nsa.DISK):
        expected = ndimage.median_filter(x, footprint=window, mode="nearest")
        np.testing.assert_array_equal(nsa.local_median(jnp.asarray(x, jnp.float32), window, 765), expected)


def test_patches_show_the_object_and_overlap_the_targets():
    left, right = (np.zeros(SIZE, bool) for _ in range(2))
    left[:, :32], right[:, 32:] = True, True
    image = noise(0)
    draw = jax.jit(PROGRAM.__wrapped__, static_argnames="least_overlap")

    def overlaps(least: float) -> list[float]:
        """The share of each patch on the target's object; at least a quarter of the patch shows the source's."""
        options = dict(foregrounds=(left, right), least_overlap=least)
        masks = [np.asarray(draw(jax.random.key(i), image, SOURCE, **options)[1]) for i in range(12)]
        return [float(mask[left].mean() / mask.mean() / 2) for mask in masks if mask.any()]

    low, high = overlaps(0.25), overlaps(0.8)
    assert len(low) > 6 and min(low) > 0.05
    assert len(high) > 6 and min(high) > 0.8 * 0.25 - 0.05 and np.mean(high) > np.mean(low)
    nowhere = draw(jax.random.key(0), image, SOURCE, foregrounds=(left, np.zeros(SIZE, bool)))
    np.testing.assert_allclose(nowhere[0], image, atol=0.51 / 255)
