"""Thresholds: from held-out normal images at a target false-positive rate, or from the test set, marked as an oracle.

A sample is predicted anomalous if its score is greater than the threshold.
"""

import math
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from jaxad.metrics import exact

HELD_OUT = "held-out normals"
CROSS_HOLDOUT = "normals held out in turn"
TAIL = "generalized Pareto tail of held-out normals"
ORACLE = "oracle (test set)"
EDITED = "edited by hand"
EXCEEDANCES = 8
"""Scores above the median that a Pareto tail needs, at least; fewer give more than three times the wanted rate."""


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
    """`HELD_OUT`, `CROSS_HOLDOUT`, `TAIL`, `ORACLE` or `EDITED`."""


def conformal_threshold(normal_scores: ArrayLike, fpr: float) -> Threshold:
    """The split-conformal threshold: a new normal sample exceeds it with probability at most `guaranteed_fpr`.

    The threshold is the k-th smallest of the n scores, k = ceil((n + 1) (1 - fpr)), and `guaranteed_fpr` is
    (n + 1 - k) / (n + 1) <= fpr. If n is too small for the target rate (k > n), the threshold is the maximum, and
    `guaranteed_fpr` is 1 / (n + 1) > fpr. The guarantee holds on average over draws of the held-out samples and the new
    one, which must be exchangeable.

    Source: Lei et al., Distribution-free predictive inference for regression, JASA 2018, section 2.2.

    Args:
        normal_scores: (n,) image scores of normal images held out of the fit, or (n, h, w) their anomaly maps. Of a map
            the maximum is used, so that at most the target rate of normal images has any false-positive pixel.
        fpr: target false-positive rate, in [0, 1).

    Returns:
        The threshold, exactly representable in the precision of the scores.

    Raises:
        ValueError: no scores, non-finite scores, or a rate outside [0, 1).
    """
    if not 0 <= fpr < 1:
        raise ValueError(f"fpr must be in [0, 1), got {fpr}")
    scores = _one_an_image(normal_scores)
    n = len(scores)
    allowed = max(1, math.floor((n + 1) * Fraction(str(float(fpr)))))  # str: 0.29 means 29/100, not the float below it
    value = np.partition(scores, n - allowed)[n - allowed]
    return Threshold(float(value), float(fpr), allowed / (n + 1), n, HELD_OUT)


def _one_an_image(normal_scores: ArrayLike) -> np.ndarray:
    """The image scores, or the maxima of the maps; raises ValueError as `conformal_threshold`."""
    scores = exact.as_finite(normal_scores, "scores of held-out normals")
    if scores.ndim == 0 or scores.size == 0:
        raise ValueError(f"a threshold needs scores of held-out normals, got shape {scores.shape}")
    return scores.reshape(len(scores), -1).max(1)


def cross_threshold(normal_scores: ArrayLike, fpr: float, folds: ArrayLike, *, monotone: bool = False) -> Threshold:
    """The threshold from scores of a cross-holdout: every normal image is scored by a model of the other folds.

    It is the quantile that `conformal_threshold` takes. New images are scored by a model of all folds, so these scores
    and theirs are not exchangeable. If no score can rise when normal images are added, a new normal sample that exceeds
    the threshold is rejected by the cross-conformal rule as well, which compares it with each score under that score's
    own model. `guaranteed_fpr` is then the smaller of two bounds for that rule. With K folds of n samples in all and
    allowed = n + 1 - k (k is the rank of the threshold):

    - 2 (allowed + K - 1) / (n + K): twice the average of the K conformal p-values is a p-value;
    - (2 allowed + m - 2) / (m (c + 1)), for c folds of m samples each: the tournament of the jackknife+. With folds of
      one sample it is (2 allowed - 1) / (n + 1).

    Otherwise the rate is near the target only as far as a model of all folds scores like one without a fold, and
    `guaranteed_fpr` is 1.

    Sources: Vovk, Cross-conformal predictors, Annals of Mathematics and Artificial Intelligence 2015; Barber, Candes,
    Ramdas and Tibshirani, Predictive inference with the jackknife+, Annals of Statistics 2021, theorem 4 and its proof.

    Args:
        normal_scores: as for `conformal_threshold`, of all normal images.
        fpr: target false-positive rate, in [0, 1).
        folds: (n,), the fold with which each image was held out; drawn at random, whatever the images show.
        monotone: whether adding normal images to the fit can only lower scores.

    Raises:
        ValueError: as for `conformal_threshold`, or there is only one fold.
    """
    threshold = conformal_threshold(normal_scores, fpr)
    n, sizes = threshold.n, Counter(np.asarray(folds).tolist()).values()
    if len(sizes) < 2:
        raise ValueError(f"a cross-holdout needs two folds or more, got {len(sizes)}")
    bound = 1.0
    if monotone:
        allowed = threshold.guaranteed_fpr * (n + 1)
        tournaments = [(2 * allowed + m - 2) / (m * (c + 1)) for m, c in Counter(sizes).items()]
        bound = min(1.0, 2 * (allowed + len(sizes) - 1) / (n + len(sizes)), *tournaments)
    return threshold._replace(guaranteed_fpr=bound, source=CROSS_HOLDOUT)


def tail_threshold(normal_scores: ArrayLike, fpr: float) -> Threshold:
    """The threshold at a rate that is too low for the number of scores: a model of their tail, without a guarantee.

    The m scores above the median u exceed it by amounts that are taken as samples of a generalized Pareto distribution
    (peaks over threshold). A new normal sample exceeds u with probability (m + 1) / (n + 1). The fit is the
    quasi-Bayesian one, which is the most robust of those tried at small m: docs/metrics.md has its measured bias.

    Source: Zhang and Stephens, A new and efficient estimation method for the generalized Pareto distribution,
    Technometrics 2009, section 3.

    Args:
        normal_scores: as for `conformal_threshold`.
        fpr: target false-positive rate, in (0, (m + 1) / (n + 1)).

    Raises:
        ValueError: fewer than `EXCEEDANCES` scores above the median, non-finite scores, or a rate out of range.
    """
    scores = np.sort(_one_an_image(normal_scores)).astype(np.float64)
    n = len(scores)
    median = scores[(n - 1) // 2]
    excess = scores[scores > median] - median
    m = len(excess)
    if m < EXCEEDANCES:
        raise ValueError(f"a Pareto tail needs {EXCEEDANCES} scores above the median, got {m}: hold out more images")
    if not 0 < fpr < (m + 1) / (n + 1):
        raise ValueError(f"fpr must be in (0, {(m + 1) / (n + 1):.3g}) for a Pareto tail of {n} scores, got {fpr}")
    candidates = 30 + math.isqrt(m)
    quartile = excess[int(m / 4 + 0.5) - 1]
    theta = 1 / excess[-1] + (1 - np.sqrt(candidates / (np.arange(candidates) + 0.5))) / (3 * quartile)
    theta[theta == 0] = 1e-9 / excess[-1]  # the exponential distribution
    shape = np.log1p(-theta[:, None] * excess).mean(1)
    log_likelihood = m * (np.log(-theta / shape) - shape - 1)
    mean = special.softmax(log_likelihood) @ theta
    value = median + (1 - (fpr * (n + 1) / (m + 1)) ** -np.log1p(-mean * excess).mean()) / mean
    return Threshold(float(value), float(fpr), 1.0, n, TAIL)


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
    return Threshold(float(value), fpr, 1.0, points.n_normal + points.n_anomalous, ORACLE)


def manual_threshold(value: object) -> Threshold:
    """A threshold that a person chose. Its false-positive rate is unknown.

    Args:
        value: a finite number.

    Raises:
        ValueError: the value is not a finite number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"a threshold must be a finite number, got {value!r}")
    return Threshold(float(value), math.nan, 1.0, 0, EDITED)


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
    names = {*Threshold._fields, "computed"}
    if set(fields) != names:
        raise ValueError(f"a threshold must have the fields {sorted(names)} or only 'value', got {sorted(fields)}")
    fpr = math.nan if fields["fpr"] is None else fields["fpr"]
    return Threshold(manual.value, fpr, fields["guaranteed_fpr"], fields["n"], fields["source"])


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
