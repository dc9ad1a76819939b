"""Thresholds: from held-out normals at a wanted false-positive rate, or, marked as such, from the test set.

A sample is predicted anomalous where its score is greater than the threshold.
"""

import math
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jaxad.metrics import exact

HELD_OUT = "held-out normals"
ORACLE = "oracle (test set)"
EDITED = "edited by hand"


class Threshold(NamedTuple):
    """A decision `score > value` and how far it can be trusted."""

    value: float
    fpr: float
    """False-positive rate: the wanted one, or for an oracle the one found on the test set; NaN if edited by hand."""
    guaranteed_fpr: float
    """Bound on the chance that a new normal sample is a false positive; 1.0 where nothing is guaranteed."""
    n: int
    """Samples it was computed from."""
    source: str
    """`HELD_OUT`, `ORACLE` or `EDITED`."""


def conformal_threshold(normal_scores: ArrayLike, fpr: float) -> Threshold:
    """The split-conformal threshold: a new normal sample exceeds it with probability at most `guaranteed_fpr`.

    It is the k-th smallest of the n scores, k = ceil((n + 1) (1 - fpr)), with `guaranteed_fpr` = (n + 1 - k) / (n + 1)
    <= fpr. Where n is too small for the wanted rate, k > n, it is the maximum, with `guaranteed_fpr` = 1 / (n + 1) >
    fpr. The guarantee is over the draw of both the held-out and the new sample, which must be exchangeable.

    Source: Lei et al., Distribution-free predictive inference for regression, JASA 2018, section 2.2.

    Args:
        normal_scores: (n,) image scores of normals kept out of the fit, or (n, h, w) anomaly maps of such, of which the
            maximum of each image counts: then at most that fraction of normal images shows any false pixel.
        fpr: wanted false-positive rate, in [0, 1).

    Returns:
        The threshold, exactly representable in the precision of the scores.

    Raises:
        ValueError: no scores, non-finite scores, or a rate outside [0, 1).
    """
    if not 0 <= fpr < 1:
        raise ValueError(f"fpr must be in [0, 1), got {fpr}")
    scores = exact.finite(normal_scores, "scores of held-out normals")
    if scores.ndim == 0 or scores.size == 0:
        raise ValueError(f"a threshold needs scores of held-out normals, got shape {scores.shape}")
    scores = scores.reshape(len(scores), -1).max(1)
    n = len(scores)
    allowed = max(1, math.floor((n + 1) * Fraction(str(float(fpr)))))  # str: 0.29 means 29/100, not the float below it
    value = np.partition(scores, n - allowed)[n - allowed]
    return Threshold(float(value), float(fpr), allowed / (n + 1), n, HELD_OUT)


def oracle_threshold(scores: ArrayLike, labels: ArrayLike) -> Threshold:
    """The threshold with the best F1 on the test set itself: for upper bounds only, and marked by its source.

    Args:
        scores: any shape, higher is more anomalous.
        labels: of the same shape; 0 normal, 1 anomalous.

    Returns:
        The threshold, with the false-positive rate found on these scores and no guarantee: the highest score that the
        best F1 leaves undetected.

    Raises:
        ValueError: one class only, non-finite scores, labels other than 0 and 1, or shapes that differ.
    """
    scores = exact.finite(scores, "scores")
    points = exact.curve(scores, labels)
    reason = exact.undefined(points, "sample")
    if reason:
        raise ValueError(f"an oracle threshold needs normal and anomalous samples: {reason}")
    best = int(exact.f1(points).argmax())
    lowest = points.score[best]
    below = scores[scores < lowest]
    value = below.max() if below.size else float(lowest) - max(1.0, abs(float(lowest)))
    fpr = float(points.normal[best] / points.n_normal)
    return Threshold(float(value), fpr, 1.0, points.n_normal + points.n_anomalous, ORACLE)


def edited(value: object) -> Threshold:
    """A threshold that a person chose: nothing is known of its false-positive rate.

    Args:
        value: a finite number.

    Raises:
        ValueError: a value that is not a finite number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"a threshold must be a finite number, got {value!r}")
    return Threshold(float(value), math.nan, 1.0, 0, EDITED)


def to_json(threshold: Threshold) -> dict[str, Any]:
    """The fields, ready for `json.dump`, and the value once more as `computed`, by which an edit is recognized."""
    fpr = None if math.isnan(threshold.fpr) else threshold.fpr
    return threshold._asdict() | {"fpr": fpr, "computed": threshold.value}


def from_json(fields: Mapping[str, Any]) -> Threshold:
    """The inverse of `to_json`; a value that was changed in the file makes it `EDITED`, as does a value alone.

    Args:
        fields: as `to_json` made them, or by hand, such as `{"value": 3.5}`.

    Raises:
        ValueError: no value, one that is not a finite number, or fields that are missing or unknown.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f'a threshold must be an object such as {{"value": 3.5}}, got {fields!r}')
    if "value" not in fields:
        raise ValueError(f"a threshold needs the field 'value', got {sorted(fields)}")
    by_hand = edited(fields["value"])
    if set(fields) == {"value"} or fields.get("computed") != fields["value"]:
        return by_hand
    wanted = {*Threshold._fields, "computed"}
    if set(fields) != wanted:
        raise ValueError(f"a threshold has the fields {sorted(wanted)} or 'value' alone, got {sorted(fields)}")
    fpr = math.nan if fields["fpr"] is None else fields["fpr"]
    return Threshold(by_hand.value, fpr, fields["guaranteed_fpr"], fields["n"], fields["source"])


class Thresholds(NamedTuple):
    """Those of a detector; None where it has none."""

    image: Threshold | None
    pixel: Threshold | None


def pair_to_json(thresholds: Thresholds) -> dict[str, Any]:
    """What threshold.json holds."""
    return {kind: None if one is None else to_json(one) for kind, one in thresholds._asdict().items()}


def pair_from_json(values: Mapping[str, Any], path: Path) -> Thresholds:
    """The inverse of `pair_to_json`; what is missing is None.

    Args:
        values: What `path` holds.
        path: Named in errors.

    Raises:
        ValueError: as `from_json`.
    """
    try:
        return Thresholds(*(from_json(values[k]) if values.get(k) is not None else None for k in Thresholds._fields))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
