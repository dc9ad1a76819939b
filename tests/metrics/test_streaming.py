"""The streaming metrics: guaranteed intervals, merging, several devices."""

import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxad import metrics
from jaxad.metrics import streaming

update = jax.jit(streaming.update)


def histogram_of(scores, weights, bits, batch=3, valid=None):
    state = streaming.init(bits)
    for start in range(0, len(scores), batch):
        rows = slice(start, start + batch)
        state = update(
            state,
            jnp.asarray(scores[rows], jnp.float32),
            jnp.asarray(weights[rows], jnp.float32),
            None if valid is None else jnp.asarray(valid[rows]),
        )
    return state


def assert_contains(bounds, report, prefix):
    names = [name for name in metrics.METRICS if name.startswith(prefix)]
    assert list(bounds.values) == names
    for name in names:
        value, low, high = bounds.values[name]
        if math.isnan(report.values[name]):
            assert math.isnan(value) and math.isnan(low) and math.isnan(high)
            assert bounds.reasons[name] == report.reasons[name]
        else:
            assert low <= report.values[name] <= high, name
            assert low <= value <= high, name


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, (4, 5, 3), elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False)),
    hnp.arrays(np.bool_, (4, 5, 3)),
    st.sampled_from([10, 12, 16]),
    st.sampled_from([0.05, 0.3, 1.0]),
)
def test_the_interval_contains_the_exact_value(scores, masks, bits, limit):
    image_scores, labels = scores.max((1, 2)), masks.any((1, 2))
    report = metrics.evaluate(image_scores, labels, scores, masks, limit)
    pixel = streaming.compute(histogram_of(scores, metrics.region_weights(masks), bits), "pixel", limit)
    image = streaming.compute(histogram_of(image_scores, labels, bits), "image")
    assert_contains(pixel, report, "pixel")
    assert_contains(image, report, "image")


def realistic_maps(seed, n=6, size=64):
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, size, size), bool)
    for mask in masks[1:]:
        row, column = rng.integers(0, size - 20, 2)
        mask[row : row + 20, column : column + rng.integers(1, 20)] = True
    return (rng.gamma(4, size=masks.shape) + 3 * masks).astype(np.float32), masks


def test_the_interval_is_narrow_and_shrinks_with_more_bits():
    scores, masks = realistic_maps(0)
    weights = metrics.region_weights(masks)
    report = metrics.evaluate(np.arange(6), np.arange(6) > 0, scores, masks)
    previous_width = math.inf
    for bits, max_width in [(12, 0.3), (16, 0.02), (20, 0.002), (24, 2e-4)]:
        bounds = streaming.compute(histogram_of(scores, weights, bits), "pixel")
        assert_contains(bounds, report, "pixel")
        width = max(high - low for _, low, high in bounds.values.values())
        assert width < min(max_width, previous_width / 4)
        previous_width = width


def test_the_bound_of_auroc_is_half_the_tied_pairs_and_tight():
    scores = np.array([1.0, 1.0001, 5.0, 9.0, 9.0001, 9.0002], np.float32)  # two crowded bins
    best, worst = np.array([0, 1, 0, 0, 0, 1]), np.array([1, 0, 0, 1, 0, 0])
    for labels, side in [(best, "high"), (worst, "low")]:
        interval = streaming.compute(histogram_of(scores, labels, 12), "image").values["image_AUROC"]
        assert interval.high - interval.low == pytest.approx((1 * 1 + 1 * 2) / (2 * 4), abs=3e-9)
        assert metrics.auroc(scores, labels) == pytest.approx(getattr(interval, side), abs=2e-9)


def test_the_value_is_exact_if_all_bins_are_ties():
    rng = np.random.default_rng(1)
    scores = rng.integers(-8, 8, (5, 6, 6)).astype(np.float32) / 4  # representable in a few bits, so bins are ties
    masks = rng.random((5, 6, 6)) < 0.3
    report = metrics.evaluate(np.arange(5), np.arange(5) > 1, scores, masks)
    bounds = streaming.compute(histogram_of(scores, metrics.region_weights(masks), 16), "pixel")
    for name, interval in bounds.values.items():
        assert interval.value == pytest.approx(report.values[name], abs=1e-6)
        assert interval.low <= report.values[name] <= interval.high


def test_bins_preserve_the_order_of_floats():
    edges = np.array([0, 1.2e-38, 1e-20, 0.5, 1, 1.01, 2, 1e30, 3.4e38], np.float32)
    scores = np.concatenate([-edges[::-1], edges])
    bins = [
        int(np.asarray(streaming.update(streaming.init(16), jnp.asarray([s]), jnp.ones(1)).counts)[1].argmax())
        for s in scores
    ]
    assert bins == sorted(bins)
    assert len(set(bins)) == len(scores) - 1  # -0.0 and 0.0 share a bin


def test_merged_parts_equal_one_pass():
    scores, masks = realistic_maps(2)
    weights = metrics.region_weights(masks)
    whole = histogram_of(scores, weights, 16, batch=6)
    parts = [histogram_of(scores[i : i + 2], weights[i : i + 2], 16) for i in (0, 2, 4)]
    merged = streaming.merge(*parts)
    np.testing.assert_array_equal(merged.counts, whole.counts)
    np.testing.assert_allclose(merged.overlap, whole.overlap, rtol=1e-5)
    assert int(merged.counts.sum()) == scores.size
    assert float(merged.overlap.sum()) == pytest.approx(5, rel=1e-5)  # the five regions


def test_a_full_bin_is_an_error_and_does_not_wrap():
    state = streaming.update(streaming.init(10), jnp.zeros(3), jnp.zeros(3))
    state = state._replace(counts=jnp.where(state.counts > 0, jnp.uint32(2**32 - 2), state.counts))
    updated = streaming.update(state, jnp.zeros(3), jnp.zeros(3))
    for full in (updated, streaming.merge(state, state)):
        assert int(full.counts.max()) == 2**32 - 1
        with pytest.raises(ValueError, match="a bin counts at most 4294967295 samples, and one is full"):
            streaming.compute(full)


def test_padding_changes_nothing():
    scores, masks = realistic_maps(3)
    weights = metrics.region_weights(masks)
    padded = np.concatenate([scores, np.full_like(scores[:2], np.nan)])
    state = histogram_of(padded, np.concatenate([weights, weights[:2] + 1]), 12, 8, np.arange(8) < 6)
    expected = histogram_of(scores, weights, 12, 6)
    for leaf, expected_leaf in zip(state, expected, strict=True):
        np.testing.assert_array_equal(leaf, expected_leaf)


def test_update_can_be_vmapped_over_classes():
    scores, masks = realistic_maps(4)
    weights = metrics.region_weights(masks).astype(np.float32)
    states = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), streaming.init(12))
    update_classes = jax.vmap(streaming.update)
    batches = (jnp.asarray(array.reshape(2, 3, 64, 64)) for array in (scores, weights))
    states = update_classes(states, *batches)
    expected = histogram_of(scores[3:], weights[3:], 12)
    np.testing.assert_array_equal(states.counts[1], expected.counts)


def test_the_interval_covers_the_rounding_of_the_overlap():
    area = 50_000  # one bin sums 1 / 49,999 in float32 so often that the sum drifts
    masks = np.ones((1, 1, area), bool)
    masks[0, 0, 0] = False
    scores = np.ones(masks.shape, np.float32)
    scores[0, 0, :100] = 2
    exact = metrics.aupro(scores, masks, 1.0)
    state = histogram_of(scores, metrics.region_weights(masks), 10)
    interval = streaming.compute(state, "pixel", 1.0).values["pixel_AUPRO"]
    assert interval.low <= exact <= interval.high


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: streaming.init(9), "bits must be 10 to 28, got 9"),
        (lambda: streaming.compute(streaming.init(10), "mask"), "'image' or 'pixel', got 'mask'"),
        (lambda: streaming.compute(streaming.init(10), fpr_limit=0.0), r"in \(0, 1\], got 0.0"),
        (lambda: streaming.compute(histogram_of(np.array([1, np.nan, np.inf]), np.ones(3), 10)), "finite, got 2 of 3"),
    ],
)
def test_invalid_input_gives_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()


DEVICES = """
import json, jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from jaxad.metrics import streaming
jax.config.update("jax_numpy_dtype_promotion", "strict")
assert jax.device_count() == 8
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rng = np.random.default_rng(0)
scores = jnp.asarray(rng.normal(size=(16, 6, 5)), jnp.float32)
weights = jnp.asarray(rng.random((16, 6, 5)) < 0.3, jnp.float32)
local = lambda s, w: jax.lax.psum(streaming.update(streaming.init(14), s, w), "data")
summed = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P(), check_vma=False))
whole = streaming.update(streaming.init(14), scores, weights)
is_equal = all(bool((a == b).all()) for a, b in zip(summed(scores, weights), whole, strict=True))
print(json.dumps({"is_equal": is_equal, "count": int(whole.counts.sum())}))
"""


def test_psum_over_eight_devices_equals_one_pass():
    root = pathlib.Path(__file__).parents[2]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    process = subprocess.run([sys.executable, "-c", DEVICES], env=env, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == {"is_equal": True, "count": 480}


def test_ignored_pixels_are_not_counted():
    rng = np.random.default_rng(3)
    scores, masks, ignored = (
        rng.normal(size=(6, 8, 7)).astype(np.float32),
        np.zeros((6, 8, 7), bool),
        rng.random((6, 8, 7)) < 0.3,
    )
    masks[3:, 2:5, 1:4] = True
    weights, pixels = metrics.region_weights(masks, ignored), np.where(ignored, 99, scores)
    bounds = streaming.compute(histogram_of(pixels, weights, 16, valid=~ignored))
    exact = metrics.evaluate(np.arange(6), masks.any((1, 2)), scores, masks, ignored=ignored)
    assert_contains(bounds, exact, "pixel")
