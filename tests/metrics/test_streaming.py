"""The streaming metrics: certain intervals, merging, devices."""

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


def feed(scores, weights, bits, batch=3, valid=None):
    state = streaming.init(bits)
    for start in range(0, len(scores), batch):
        part = slice(start, start + batch)
        state = update(
            state,
            jnp.asarray(scores[part], jnp.float32),
            jnp.asarray(weights[part], jnp.float32),
            None if valid is None else jnp.asarray(valid[part]),
        )
    return state


def assert_holds(bounds, report, prefix):
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
def test_interval_holds_the_exact_value(scores, masks, bits, limit):
    images, labels = scores.max((1, 2)), masks.any((1, 2))
    report = metrics.evaluate(images, labels, scores, masks, limit)
    pixel = streaming.compute(feed(scores, metrics.region_weights(masks), bits), "pixel", limit)
    image = streaming.compute(feed(images, labels, bits), "image")
    assert_holds(pixel, report, "pixel")
    assert_holds(image, report, "image")


def realistic(seed, n=6, size=64):
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, size, size), bool)
    for mask in masks[1:]:
        row, column = rng.integers(0, size - 20, 2)
        mask[row : row + 20, column : column + rng.integers(1, 20)] = True
    return (rng.gamma(4, size=masks.shape) + 3 * masks).astype(np.float32), masks


def test_interval_is_narrow_and_shrinks_with_bits():
    scores, masks = realistic(0)
    weights = metrics.region_weights(masks)
    report = metrics.evaluate(np.arange(6), np.arange(6) > 0, scores, masks)
    before = math.inf
    for bits, widest in [(12, 0.3), (16, 0.02), (20, 0.002), (24, 2e-4)]:
        bounds = streaming.compute(feed(scores, weights, bits), "pixel")
        assert_holds(bounds, report, "pixel")
        width = max(high - low for _, low, high in bounds.values.values())
        assert width < min(widest, before / 4)
        before = width


def test_bound_of_auroc_is_half_the_tied_pairs_and_attained():
    scores = np.array([1.0, 1.0001, 5.0, 9.0, 9.0001, 9.0002], np.float32)  # two crowded bins
    best, worst = np.array([0, 1, 0, 0, 0, 1]), np.array([1, 0, 0, 1, 0, 0])
    for labels, side in [(best, "high"), (worst, "low")]:
        interval = streaming.compute(feed(scores, labels, 12), "image").values["image_AUROC"]
        assert interval.high - interval.low == pytest.approx((1 * 1 + 1 * 2) / (2 * 4), abs=3e-9)
        assert metrics.auroc(scores, labels) == pytest.approx(getattr(interval, side), abs=2e-9)


def test_value_is_exact_where_all_bins_are_ties():
    rng = np.random.default_rng(1)
    scores = rng.integers(-8, 8, (5, 6, 6)).astype(np.float32) / 4  # representable in a few bits: bins are ties
    masks = rng.random((5, 6, 6)) < 0.3
    report = metrics.evaluate(np.arange(5), np.arange(5) > 1, scores, masks)
    bounds = streaming.compute(feed(scores, metrics.region_weights(masks), 16), "pixel")
    for name, interval in bounds.values.items():
        assert interval.value == pytest.approx(report.values[name], abs=1e-6)
        assert interval.low <= report.values[name] <= interval.high


def test_bins_keep_the_order_of_floats():
    edges = np.array([0, 1.2e-38, 1e-20, 0.5, 1, 1.01, 2, 1e30, 3.4e38], np.float32)
    scores = np.concatenate([-edges[::-1], edges])
    counted = [
        int(np.asarray(streaming.update(streaming.init(16), jnp.asarray([s]), jnp.ones(1)).counts)[1].argmax())
        for s in scores
    ]
    assert counted == sorted(counted)
    assert len(set(counted)) == len(scores) - 1  # -0.0 and 0.0 share theirs


def test_merge_is_one_pass():
    scores, masks = realistic(2)
    weights = metrics.region_weights(masks)
    whole = feed(scores, weights, 16, batch=6)
    parts = [feed(scores[i : i + 2], weights[i : i + 2], 16) for i in (0, 2, 4)]
    merged = streaming.merge(*parts)
    np.testing.assert_array_equal(merged.counts, whole.counts)
    np.testing.assert_allclose(merged.overlap, whole.overlap, rtol=1e-5)
    assert int(merged.counts.sum()) == scores.size
    assert float(merged.overlap.sum()) == pytest.approx(5, rel=1e-5)  # the five regions


def test_a_full_bin_is_refused_instead_of_wrapping():
    state = streaming.update(streaming.init(10), jnp.zeros(3), jnp.zeros(3))
    state = state._replace(counts=jnp.where(state.counts > 0, jnp.uint32(2**32 - 2), state.counts))
    more = streaming.update(state, jnp.zeros(3), jnp.zeros(3))
    for full in (more, streaming.merge(state, state)):
        assert int(full.counts.max()) == 2**32 - 1
        with pytest.raises(ValueError, match="a bin counts at most 4294967295 samples, and one is full"):
            streaming.compute(full)


def test_padding_changes_nothing():
    scores, masks = realistic(3)
    weights = metrics.region_weights(masks)
    padded = np.concatenate([scores, np.full_like(scores[:2], np.nan)])
    state = feed(padded, np.concatenate([weights, weights[:2] + 1]), 12, 8, np.arange(8) < 6)
    expected = feed(scores, weights, 12, 6)
    for ours, theirs in zip(state, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_vmaps_over_classes():
    scores, masks = realistic(4)
    weights = metrics.region_weights(masks).astype(np.float32)
    states = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), streaming.init(12))
    fold = jax.vmap(streaming.update)
    states = fold(states, jnp.asarray(scores.reshape(2, 3, 64, 64)), jnp.asarray(weights.reshape(2, 3, 64, 64)))
    alone = feed(scores[3:], weights[3:], 12)
    np.testing.assert_array_equal(states.counts[1], alone.counts)


def test_rounding_of_the_overlap_is_in_the_interval():
    area = 50_000  # one bin sums 1 / 49,999 in float32 so often that the sum drifts
    masks = np.ones((1, 1, area), bool)
    masks[0, 0, 0] = False
    scores = np.ones(masks.shape, np.float32)
    scores[0, 0, :100] = 2
    exact = metrics.aupro(scores, masks, 1.0)
    interval = streaming.compute(feed(scores, metrics.region_weights(masks), 10), "pixel", 1.0).values["pixel_AUPRO"]
    assert interval.low <= exact <= interval.high


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: streaming.init(9), "bits must be 10 to 28, got 9"),
        (lambda: streaming.compute(streaming.init(10), "mask"), "'image' or 'pixel', got 'mask'"),
        (lambda: streaming.compute(streaming.init(10), fpr_limit=0.0), r"in \(0, 1\], got 0.0"),
        (lambda: streaming.compute(feed(np.array([1, np.nan, np.inf]), np.ones(3), 10)), "finite, got 2 of 3"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
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
both = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P(), check_vma=False))
whole = streaming.update(streaming.init(14), scores, weights)
same = all(bool((a == b).all()) for a, b in zip(both(scores, weights), whole, strict=True))
print(json.dumps({"same": same, "seen": int(whole.counts.sum())}))
"""


def test_psum_over_eight_devices_is_one_pass():
    root = pathlib.Path(__file__).parents[2]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run([sys.executable, "-c", DEVICES], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"same": True, "seen": 480}
