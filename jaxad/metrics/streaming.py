"""Metrics of any number of samples in bounded memory: a mergeable histogram, and intervals around the exact values.

The bins are the leading `bits` of a float32 in an order-preserving code (sign, exponent, first bits of the mantissa).
They need no range, cover every finite score, and have a relative width of 2^(9 - bits). The order of scores in
different bins is exact; only the order within a bin is unknown. The value treats the scores of a bin as ties; the best
and the worst order within the bins give the interval.

For AUPRO, the overlap of a region is the sum of 1 / area over its detected pixels. So one histogram of pixels with
these weights holds the overlap of any number of regions.

`update` is pure and may be jitted, vmapped and sharded. States add up: use `merge`, or `jax.lax.psum` over devices.
The count of a bin saturates at 2^32 - 1, and `compute` raises an error if one has.
"""

import math
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Shaped, UInt32

from jaxad.metrics import exact

FULL = np.uint32(2**32 - 1)


class Histogram(NamedTuple):
    """A histogram of all samples so far; 12 bytes per bin."""

    counts: UInt32[Array, "2 bins"]
    """Numbers of normal and anomalous samples."""
    overlap: Float32[Array, "bins"]
    """Sums of the weights of the anomalous samples."""
    non_finite: UInt32[Array, ""]
    """Number of valid samples whose score is NaN or infinite; if there are any, `compute` raises an error."""


class Interval(NamedTuple):
    """A streaming value with its error bounds: the exact metric lies in [low, high]."""

    value: float
    low: float
    high: float


class Bounds(NamedTuple):
    """The result of `compute`: like `jaxad.metrics.Report`, with intervals as values."""

    values: dict[str, Interval]
    reasons: dict[str, str]


def init(bits: int = 20) -> Histogram:
    """An empty histogram with 2^bits bins. The relative resolution of scores is 2^(9 - bits), by default 1/2048.

    Args:
        bits: 10 to 28. One more bit doubles the memory (12 MiB by default) and about halves the error bounds.

    Raises:
        ValueError: bits outside that range.
    """
    if not 10 <= bits <= 28:
        raise ValueError(f"bits must be 10 to 28, got {bits}")
    return Histogram(jnp.zeros((2, 2**bits), jnp.uint32), jnp.zeros(2**bits, jnp.float32), jnp.zeros((), jnp.uint32))


def update(
    state: Histogram,
    scores: Float[Array, "b *s"],
    weights: Shaped[Array, "b *s"],
    valid: Bool[Array, "b *valid"] | None = None,
) -> Histogram:
    """Adds a batch of samples: images or pixels.

    Args:
        state: from `init` or an earlier update.
        scores: higher is more anomalous; converted to float32.
        weights: 0 for normal samples. For anomalous samples the `jaxad.metrics.region_weights` of the batch, or 1 (so
            labels or masks will do) if AUPRO is not needed.
        valid: False marks padding, of images or, in the shape of the scores, of pixels that are ignored.

    Returns:
        The new state.
    """
    bins = state.overlap.size
    scores = scores.astype(jnp.float32)
    weights = weights.astype(jnp.float32)
    valid = jnp.ones(len(scores), bool) if valid is None else valid
    valid = jnp.broadcast_to(valid.reshape(*valid.shape, *[1] * (scores.ndim - valid.ndim)), scores.shape)
    finite = jnp.isfinite(scores)
    code = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0, scores), jnp.uint32)  # -0.0 ties with 0.0
    code = jnp.where(code >> 31, ~code, code | jnp.uint32(1 << 31))
    code = jnp.where(valid & finite, code >> (33 - bins.bit_length()), bins)  # `bins` is out of range, hence dropped
    index = code.astype(jnp.int32)
    counts = state.counts.at[(weights > 0).astype(jnp.int32), index].add(jnp.uint32(1), mode="drop")
    return Histogram(
        jnp.where(counts < state.counts, FULL, counts),
        state.overlap.at[index].add(weights, mode="drop"),
        state.non_finite + jnp.sum(valid & ~finite, dtype=jnp.uint32),
    )


def merge(*states: Histogram) -> Histogram:
    """Sums histograms."""

    def add(a: Histogram, b: Histogram) -> Histogram:
        total = jax.tree.map(jnp.add, a, b)
        return total._replace(counts=jnp.where(total.counts < a.counts, FULL, total.counts))

    return reduce(add, states)


def _binned(state: Histogram) -> exact.Curve:
    """The operating points of the binned scores. The scores are the bin numbers, so a bin is a group of ties."""
    normal, anomalous = np.asarray(state.counts)[:, ::-1].astype(np.int64)
    occupied = np.flatnonzero(anomalous)
    at_or_above = np.cumsum(normal)[occupied]
    overlap = np.cumsum(np.asarray(state.overlap)[::-1][occupied], dtype=np.float64)
    return exact.Curve(
        normal.size - 1 - occupied,
        at_or_above - normal[occupied],
        at_or_above,
        np.cumsum(anomalous)[occupied],
        overlap / overlap[-1:],
        int(normal.sum()),
        int(anomalous.sum()),
    )


def _overlap_bounds(state: Histogram, points: exact.Curve) -> tuple[Float[np.ndarray, "k"], Float[np.ndarray, "k"]]:
    """Lower and upper bounds of the per-region overlap, given the rounding of the weights and of their float32 sums."""
    sums = np.asarray(state.overlap)[points.score].astype(np.float64)
    terms = np.diff(points.anomalous, prepend=0)
    error = np.minimum(terms * 2.0**-24, 0.25)  # m roundings err by at most m u / (1 - m u)
    is_bounded = error < 0.25
    error = error / (1 - error)
    low = np.cumsum(np.where(is_bounded, sums / (1 + error), 0))
    high = np.cumsum(np.where(is_bounded, sums / (1 - error), terms))  # no weight is larger than one
    return low / (low + high[-1] - high), high / (high + low[-1] - low)


def compute(state: Histogram, prefix: str = "pixel", fpr_limit: float = 0.3) -> Bounds:
    """Computes the metrics of all samples so far, each with an interval that is guaranteed to contain the exact value.

    The value is the exact metric of the binned scores. The interval spans the best and the worst order of the samples
    within every bin. For AUROC its half width is half the number of (normal, anomalous) pairs that share a bin, divided
    by the number of all such pairs. The interval also covers the rounding of the float32 sums of the weights, and 1e-9
    for rounding in float64. This function runs on the host.

    Args:
        state: from `update`, merged over devices.
        prefix: "pixel" (with weights from `region_weights`), or "image", which has no AUPRO.
        fpr_limit: integration limit of AUPRO, in (0, 1].

    Returns:
        An interval for every name in `METRICS` with the prefix; NaN with a reason if the metric is undefined.

    Raises:
        ValueError: non-finite scores (the message gives their number), a full bin, another prefix, or a limit outside
            (0, 1].
    """
    if prefix not in ("image", "pixel"):
        raise ValueError(f"prefix must be 'image' or 'pixel', got {prefix!r}")
    exact.check_limit(fpr_limit)
    if (np.asarray(state.counts) == FULL).any():
        raise ValueError(f"a bin counts at most {FULL} samples, and one is full: use more bits or fewer samples")
    points = _binned(state)
    non_finite = int(state.non_finite)
    if non_finite:
        total = non_finite + points.n_normal + points.n_anomalous
        raise ValueError(f"{prefix} scores must be finite, got {non_finite} of {total} that are NaN or infinite")
    values, reasons = exact.summarize(points, prefix, fpr_limit)
    if reasons:
        return Bounds(dict.fromkeys(values, Interval(math.nan, math.nan, math.nan)), reasons)
    low_overlap, high_overlap = _overlap_bounds(state, points)
    worst = points._replace(above=points.normal, overlap=low_overlap)  # all normal samples of a bin first
    best = points._replace(normal=points.above, overlap=high_overlap)  # all anomalous samples of a bin first
    low = exact.summarize(worst, prefix, fpr_limit).values
    high = exact.summarize(best, prefix, fpr_limit).values
    low[f"{prefix}_AP"] = _lowest_average_precision(worst)
    slack = 1e-9
    return Bounds({name: Interval(value, low[name] - slack, high[name] + slack) for name, value in values.items()}, {})


def _lowest_average_precision(worst: exact.Curve) -> float:
    """A lower bound of AP if the normal samples of every bin score higher than its anomalous samples.

    The precision t / (t + f) at the t-th anomalous sample is concave in t. So its sum over t is at least its integral
    from half a step before the first sample of the bin to half a step after the last (midpoint rule).
    """
    new = np.diff(worst.anomalous, prepend=0)
    start = worst.anomalous - new + 0.5
    return float(np.sum(new - worst.normal * np.log1p(new / (start + worst.normal))) / worst.n_anomalous)
