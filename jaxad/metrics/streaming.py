"""Metrics of any number of samples in bounded memory: a mergeable histogram, and intervals that hold the exact values.

The bins are the leading `bits` of a float32 in an order-preserving code (sign, exponent, first bits of the mantissa):
they need no range, cover every finite score, and have a relative width of 2^(9 - bits). Scores in different bins are in
their true order, and only the order within a bin is unknown. The metrics of the binned scores are what one possible
order gives (all tied); the best and the worst order give the interval.

The overlap of a region, for AUPRO, is the sum over its detected pixels of 1 / area: a histogram in which pixels carry
that weight holds the overlap of all regions together, however many there are.

`update` is pure and may be jitted, vmapped and sharded; states add up: `merge`, or `jax.lax.psum` over devices. A bin
counts to 2^32 - 1 and stays there; `compute` refuses a full one.
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
    """What is known of all samples seen; 12 bytes a bin."""

    counts: UInt32[Array, "2 bins"]
    """Normal and anomalous samples."""
    overlap: Float32[Array, "bins"]
    """Sum of the weights of the anomalous samples."""
    non_finite: UInt32[Array, ""]
    """Valid samples left out because their score is NaN or infinite; `compute` refuses them."""


class Interval(NamedTuple):
    """A streaming value with its error bound: the exact metric lies in [low, high]."""

    value: float
    low: float
    high: float


class Bounds(NamedTuple):
    """What `compute` found, as `jaxad.metrics.Report` with intervals."""

    values: dict[str, Interval]
    reasons: dict[str, str]


def init(bits: int = 20) -> Histogram:
    """An empty histogram of 2^bits bins: the relative resolution of scores is 2^(9 - bits), 1/2048 by default.

    Args:
        bits: 10 to 28. Each one more doubles the memory (12 MiB by default) and about halves the error bounds.

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
    valid: Bool[Array, "b"] | None = None,
) -> Histogram:
    """Adds a batch of samples: images or pixels.

    Args:
        state: of `init` or an earlier update.
        scores: higher is more anomalous; used in float32.
        weights: 0 for normal samples; for anomalous ones 1 where no AUPRO is wanted, such as labels or a mask, and
            otherwise the overlap of a pixel in its region (`jaxad.metrics.region_weights` of the batch).
        valid: False marks padding.

    Returns:
        The new state.
    """
    bins = state.overlap.size
    scores = scores.astype(jnp.float32)
    weights = weights.astype(jnp.float32)
    valid = jnp.ones(len(scores), bool) if valid is None else valid
    valid = jnp.broadcast_to(valid.reshape(-1, *[1] * (scores.ndim - 1)), scores.shape)
    finite = jnp.isfinite(scores)
    code = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0, scores), jnp.uint32)  # -0.0 ties with 0.0
    code = jnp.where(code >> 31, ~code, code | jnp.uint32(1 << 31))
    index = jnp.where(valid & finite, code >> (33 - bins.bit_length()), bins).astype(jnp.int32)  # bins: dropped
    counts = state.counts.at[(weights > 0).astype(jnp.int32), index].add(jnp.uint32(1), mode="drop")
    return Histogram(
        jnp.where(counts < state.counts, FULL, counts),
        state.overlap.at[index].add(weights, mode="drop"),
        state.non_finite + jnp.sum(valid & ~finite, dtype=jnp.uint32),
    )


def merge(*states: Histogram) -> Histogram:
    """The histogram of all the samples of all states: their sum."""

    def add(a: Histogram, b: Histogram) -> Histogram:
        both = jax.tree.map(jnp.add, a, b)
        return both._replace(counts=jnp.where(both.counts < a.counts, FULL, both.counts))

    return reduce(add, states)


def _binned(state: Histogram) -> exact.Curve:
    """The operating points of the binned scores, whose ties are the bins and whose scores are the bin numbers."""
    normal, anomalous = np.asarray(state.counts)[:, ::-1].astype(np.int64)
    some = np.flatnonzero(anomalous)
    at_or_above = np.cumsum(normal)[some]
    overlap = np.cumsum(np.asarray(state.overlap)[::-1][some], dtype=np.float64)
    return exact.Curve(
        normal.size - 1 - some,
        at_or_above - normal[some],
        at_or_above,
        np.cumsum(anomalous)[some],
        overlap / overlap[-1:],
        int(normal.sum()),
        int(anomalous.sum()),
    )


def _overlap_bounds(state: Histogram, points: exact.Curve) -> tuple[Float[np.ndarray, "k"], Float[np.ndarray, "k"]]:
    """Bounds of the per-region overlap that account for the rounding of the weights and of their float32 sums."""
    summed = np.asarray(state.overlap)[points.score].astype(np.float64)
    terms = np.diff(points.anomalous, prepend=0)
    error = np.minimum(terms * 2.0**-24, 0.25)  # m roundings err by at most m u / (1 - m u)
    known = error < 0.25
    error = error / (1 - error)
    low = np.cumsum(np.where(known, summed / (1 + error), 0))
    high = np.cumsum(np.where(known, summed / (1 - error), terms))  # no weight is larger than one
    return low / (low + high[-1] - high), high / (high + low[-1] - low)


def compute(state: Histogram, prefix: str = "pixel", fpr_limit: float = 0.3) -> Bounds:
    """The metrics of all samples seen, each with an interval that is certain to hold the exact value.

    The value is the exact metric of the binned scores. The interval is what the best and the worst order of the samples
    within every bin would give; for AUROC this is the value plus and minus half the sum over bins of normal * anomalous
    samples, divided by the number of such pairs. It includes the rounding of the weights' float32 sums and 1e-9 for
    that of float64. The work is done on the host.

    Args:
        state: of updates, merged over devices.
        prefix: "pixel", whose weights must have come from `region_weights`, or "image", which has no AUPRO.
        fpr_limit: integration limit of AUPRO, in (0, 1].

    Returns:
        An interval for every name of `METRICS` with the prefix, of NaN with a reason where the metric is undefined.

    Raises:
        ValueError: non-finite scores (with their number), a full bin, another prefix, or a limit outside (0, 1].
    """
    if prefix not in ("image", "pixel"):
        raise ValueError(f"prefix must be 'image' or 'pixel', got {prefix!r}")
    exact.check_limit(fpr_limit)
    if (np.asarray(state.counts) == FULL).any():
        raise ValueError(f"a bin counts at most {FULL} samples, and one is full: use more bits or fewer samples")
    points = _binned(state)
    bad = int(state.non_finite)
    if bad:
        total = bad + points.n_normal + points.n_anomalous
        raise ValueError(f"{prefix} scores must be finite, got {bad} of {total} that are NaN or infinite")
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
    """AP with the normal samples of every bin first and then the anomalous ones, one by one.

    The precision t / (t + f) after the t-th of them is concave in t, so its sum over t is at least its integral from
    half a step before the first to half a step after the last (midpoint rule).
    """
    gained = np.diff(worst.anomalous, prepend=0)
    start = worst.anomalous - gained + 0.5
    return float(np.sum(gained - worst.normal * np.log1p(gained / (start + worst.normal))) / worst.n_anomalous)
