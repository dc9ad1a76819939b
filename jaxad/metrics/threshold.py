"""Thresholds: from held-out normal images at a target false-positive rate, or from the test set, marked as an oracle.

A sample is predicted anomalous if its score is greater than the threshold.
"""

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
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
    """A decision rule, `score > value`, and what is known about its false-positive rate."""

    value: float
    fpr: float
    """False-positive rate: the target, or the rate on the test set for an oracle; NaN if edited by hand."""
    guaranteed_fpr: float
    """Upper bound on the probability that a new normal sample is a false positive; 1.0: no guarantee."""
    n: int
    """Number of samples that it was computed from."""
    source: str
    """`HELD_OUT`, `ORACLE` or `EDITED`."""
    n_groups: int
    """Number of independent groups that the samples belong to; n where each is on its own."""


def conformal_threshold(normal_scores: ArrayLike, fpr: float, groups: Sequence[Hashable] | None = None) -> Threshold:
    """The split-conformal threshold: a new normal sample exceeds it with probability at most `guaranteed_fpr`.

    The threshold is the k-th smallest of the n scores, k = ceil((n + 1) (1 - fpr)), and `guaranteed_fpr` is
    (n + 1 - k) / (n + 1) <= fpr. If n is too small for the target rate (k > n), the threshold is the maximum, and
    `guaranteed_fpr` is 1 / (n + 1) > fpr. The guarantee holds on average over draws of the held-out samples and the new
    one, which must be exchangeable.

    Samples of one group, such as photographs of one part, are not exchangeable with one of a new group; the groups are.
    A sample of one of K groups then weighs 1 / ((K + 1) size of its group), and the threshold is the smallest score for
    which the scores up to it weigh 1 - fpr or more. `guaranteed_fpr`, for a sample of a new group, is fpr, or
    1 / (K + 1) where K is too small. With groups of one sample this is the rule above.

    Sources: Lei et al., Distribution-free predictive inference for regression, JASA 2018, section 2.2; with groups Lee,
    Barber & Willett, Distribution-free inference with hierarchical data, arXiv:2306.06342.

    Args:
        normal_scores: (n,) image scores of normal images held out of the fit, or (n, h, w) their anomaly maps. Of a map
            the maximum is used, so that at most the target rate of normal images has any false-positive pixel.
        fpr: target false-positive rate, in [0, 1).
        groups: (n,) the group of each sample; None: each is on its own.

    Returns:
        The threshold, exactly representable in the precision of the scores.

    Raises:
        ValueError: no scores, non-finite scores, a rate outside [0, 1), or another number of groups.
    """
    if not 0 <= fpr < 1:
        raise ValueError(f"fpr must be in [0, 1), got {fpr}")
    scores = exact.as_finite(normal_scores, "scores of held-out normals")
    if scores.ndim == 0 or scores.size == 0:
        raise ValueError(f"a threshold needs scores of held-out normals, got shape {scores.shape}")
    scores = scores.reshape(len(scores), -1).max(1)
    members = range(len(scores)) if groups is None else groups
    if len(members) != len(scores):
        raise ValueError(f"groups must have one entry per score ({len(scores)}), got {len(members)}")
    sizes = Counter(members)
    k, unit = len(sizes), math.lcm(*sizes.values())
    allowed = max(Fraction(1), (k + 1) * Fraction(str(float(fpr))))  # str: 0.29 means 29/100, not the float below it
    if unit == 1:
        allowed = Fraction(math.floor(allowed))
    order = np.argsort(-scores)
    shares = itertools.accumulate(unit // sizes[members[i]] for i in order.tolist())
    spare = math.floor((allowed - 1) * unit)
    above = sum(share <= spare for share in shares)
    return Threshold(float(scores[order[above]]), float(fpr), float(allowed / (k + 1)), len(scores), HELD_OUT, k)


def oracle_threshold(scores: ArrayLike, labels: ArrayLike) -> Threshold:
    """The threshold with the best F1 on the test set itself: for upper bounds only, and marked as such (`ORACLE`).

    Args:
        scores: any shape, higher is more anomalous.
        labels: of the same shape; 0 normal, 1 anomalous.

    Returns:
        The threshold, with its false-positive rate on these scores and no guarantee. Its value is the highest score
        below the operating point with the best F1.

    Raises:
        ValueError: one class only, non-finite scores, labels other than 0 and 1, or shapes that differ.
    """
    scores = exact.as_finite(scores, "scores")
    points = exact.curve(scores, labels)
    reason = exact.undefined_reason(points, "sample")
    if reason:
        raise ValueError(f"an oracle threshold needs normal and anomalous samples: {reason}")
    best = int(exact.f1(points).argmax())
    lowest_detected = points.score[best]
    undetected = scores[scores < lowest_detected]
    value = undetected.max() if undetected.size else float(lowest_detected) - max(1.0, abs(float(lowest_detected)))
    fpr = float(points.normal[best] / points.n_normal)
    n = points.n_normal + points.n_anomalous
    return Threshold(float(value), fpr, 1.0, n, ORACLE, n)


def manual_threshold(value: object) -> Threshold:
    """A threshold that a person chose. Its false-positive rate is unknown.

    Args:
        value: a finite number.

    Raises:
        ValueError: the value is not a finite number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"a threshold must be a finite number, got {value!r}")
    return Threshold(float(value), math.nan, 1.0, 0, EDITED, 0)


def to_json(threshold: Threshold) -> dict[str, Any]:
    """The fields, ready for `json.dump`. `computed` repeats the value, so that an edit by hand is recognized."""
    fpr = None if math.isnan(threshold.fpr) else threshold.fpr
    return threshold._asdict() | {"fpr": fpr, "computed": threshold.value}


def from_json(fields: Mapping[str, Any]) -> Threshold:
    """The inverse of `to_json`. If the value was edited, or is the only field, the source is `EDITED`.

    Args:
        fields: from `to_json`, or written by hand, such as `{"value": 3.5}`.

    Raises:
        ValueError: a field is missing or unknown, or the value is not a finite number.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f'a threshold must be an object such as {{"value": 3.5}}, got {fields!r}')
    if "value" not in fields:
        raise ValueError(f"a threshold needs the field 'value', got {sorted(fields)}")
    manual = manual_threshold(fields["value"])
    if set(fields) == {"value"} or fields.get("computed") != fields["value"]:
        return manual
    fields = {"n_groups": fields.get("n"), **fields}  # files of older versions have no groups
    names = {*Threshold._fields, "computed"}
    if set(fields) != names:
        raise ValueError(f"a threshold must have the fields {sorted(names)} or only 'value', got {sorted(fields)}")
    fpr = math.nan if fields["fpr"] is None else fields["fpr"]
    guaranteed, n, source, n_groups = (fields[name] for name in ("guaranteed_fpr", "n", "source", "n_groups"))
    return Threshold(manual.value, fpr, guaranteed, n, source, n_groups)


class Thresholds(NamedTuple):
    """The thresholds of a detector on image and pixel scores; None if there is none."""

    image: Threshold | None
    pixel: Threshold | None


def pair_to_json(thresholds: Thresholds) -> dict[str, Any]:
    """The content of threshold.json."""
    return {kind: None if value is None else to_json(value) for kind, value in thresholds._asdict().items()}


def pair_from_json(values: Mapping[str, Any], path: Path) -> Thresholds:
    """The inverse of `pair_to_json`; a missing threshold is None.

    Args:
        values: the content of `path`.
        path: the file, for error messages.

    Raises:
        ValueError: as in `from_json`.
    """
    try:
        return Thresholds(*(from_json(values[k]) if values.get(k) is not None else None for k in Thresholds._fields))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
