"""Thresholds: from held-out normal images at a target false-positive rate, or from the test set, marked as an oracle.

A sample is predicted anomalous if its score is greater than the threshold.
"""

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from jaxad.metrics import exact
from jaxad.schema import count, number, optional, record, shallow, text

Groups = Sequence[Hashable] | None
"""(n,) the group of each sample; None: each is on its own."""
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
    n_groups: int
    """Number of independent groups that the samples belong to; n where each is on its own."""


def conformal_threshold(normal_scores: ArrayLike, fpr: float, groups: Groups = None) -> Threshold:
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
    scores, members = _one_an_image(normal_scores, groups)
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


def _one_an_image(normal_scores: ArrayLike, groups: Groups) -> tuple[np.ndarray, Sequence[Hashable]]:
    """The image scores, or the maxima of the maps, and the groups; raises ValueError as `conformal_threshold`."""
    scores = exact.as_finite(normal_scores, "scores of held-out normals")
    if scores.ndim == 0 or scores.size == 0:
        raise ValueError(f"a threshold needs scores of held-out normals, got shape {scores.shape}")
    members = range(len(scores)) if groups is None else groups
    if len(members) != len(scores):
        raise ValueError(f"groups must have one entry per score ({len(scores)}), got {len(members)}")
    return scores.reshape(len(scores), -1).max(1), members


def cross_threshold(
    normal_scores: ArrayLike, fpr: float, folds: ArrayLike, groups: Groups = None, *, monotone: bool = False
) -> Threshold:
    """The threshold from scores of a cross-holdout: every normal image is scored by a model of the other folds.

    It is that of `conformal_threshold`. But new images are scored by a model of all folds, so that their scores are not
    exchangeable with these. If no score can rise when normal images are added, a new normal sample that exceeds the
    threshold is rejected by the cross-conformal rule, too, which compares it with each score under that score's own
    model. `guaranteed_fpr` is then the smaller one of two bounds for that rule. With K folds, n samples in all and
    allowed = n + 1 - k (k is the rank of the threshold), all counted in groups:

    - 2 (allowed + K - 1) / (n + K), because twice the average of the folds' conformal p-values is a p-value;
    - (2 allowed + m - 2) / (m (c + 1)) for c folds of m samples, by the tournament in the proof of the jackknife+; if
      samples are held out one by one, this is (2 allowed - 1) / (n + 1).

    For other methods the rate is near the target as far as a model of all folds scores like one without a fold, and
    `guaranteed_fpr` is 1.

    Sources: Vovk, Cross-conformal predictors, Annals of Mathematics and Artificial Intelligence 2015; Barber, Candes,
    Ramdas and Tibshirani, Predictive inference with the jackknife+, Annals of Statistics 2021, theorem 4 and its proof.

    Args:
        normal_scores: as for `conformal_threshold`, of all normal images.
        fpr: target false-positive rate, in [0, 1).
        folds: (n,) the fold with which each image was held out; folds are drawn at random, and groups not split.
        groups: as for `conformal_threshold`.
        monotone: whether normal images that are added to the fit can only lower scores.

    Raises:
        ValueError: as for `conformal_threshold`, or there is only one fold.
    """
    threshold = conformal_threshold(normal_scores, fpr, groups)
    numbers, n = np.asarray(folds).tolist(), threshold.n_groups
    members = range(len(numbers)) if groups is None else groups
    sizes = Counter(fold for fold, _ in {*zip(numbers, members, strict=True)}).values()
    if len(sizes) < 2:
        raise ValueError(f"a cross-holdout needs two folds or more, got {len(sizes)}")
    bound = 1.0
    if monotone:
        allowed = threshold.guaranteed_fpr * (n + 1)
        tournaments = ((2 * allowed + m - 2) / (m * (c + 1)) for m, c in Counter(sizes).items())
        bound = min(1.0, 2 * (allowed + len(sizes) - 1) / (n + len(sizes)), *tournaments)
    return threshold._replace(guaranteed_fpr=bound, source=CROSS_HOLDOUT)


def tail_threshold(normal_scores: ArrayLike, fpr: float, groups: Groups = None) -> Threshold:
    """The threshold at a rate that is too low for the number of scores: a model of their tail, without a guarantee.

    What the scores above the median u have in excess of it is taken as a sample of a generalized Pareto distribution
    (peaks over threshold). If n samples have m scores above u, a new one exceeds u with probability (m + 1) / (n + 1);
    of groups, m is the sum of their shares above u, and n their number. The fit is the quasi-Bayesian one, the best at
    small m of those tried: docs/metrics.md has its bias.

    Source: Zhang and Stephens, A new and efficient estimation method for the generalized Pareto distribution,
    Technometrics 2009, section 3.

    Args:
        normal_scores: as for `conformal_threshold`.
        fpr: target false-positive rate, in (0, (m + 1) / (n + 1)).
        groups: as for `conformal_threshold`.

    Raises:
        ValueError: fewer than `EXCEEDANCES` samples or groups have scores above the median, scores are not finite, or
            the rate is out of range.
    """
    scores, members = _one_an_image(normal_scores, groups)
    median = np.sort(scores)[(len(scores) - 1) // 2]
    sizes, is_above = Counter(members), scores > median
    above = [member for member, flag in zip(members, is_above.tolist(), strict=True) if flag]
    rate = (1 + sum(1 / sizes[member] for member in above)) / (1 + len(sizes))
    if len(set(above)) < EXCEEDANCES:
        raise ValueError(
            f"a Pareto tail needs {EXCEEDANCES} images or groups with scores above the median, got {len(set(above))}: "
            "hold out more"
        )
    if not 0 < fpr < rate:
        raise ValueError(f"fpr must be in (0, {rate:.3g}) for the Pareto tail of these scores, got {fpr}")
    excess = np.sort(scores[is_above] - median).astype(np.float64)
    m = len(excess)
    candidates, quartile = 30 + math.isqrt(m), excess[int(m / 4 + 0.5) - 1]
    theta = 1 / excess[-1] + (1 - np.sqrt(candidates / (np.arange(candidates) + 0.5))) / (3 * quartile)
    theta[theta == 0] = 1e-9 / excess[-1]  # the exponential distribution
    shape = np.log1p(-theta[:, None] * excess).mean(1)
    log_likelihood = m * (np.log(-theta / shape) - shape - 1)
    mean = special.softmax(log_likelihood) @ theta
    quantile = (1 - (fpr / rate) ** -np.log1p(-mean * excess).mean()) / mean
    return Threshold(float(median + quantile), float(fpr), 1.0, len(scores), TAIL, len(sizes))


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
    number()(value, "a threshold")
    assert isinstance(value, int | float)
    return Threshold(float(value), math.nan, 1.0, 0, EDITED, 0)


THRESHOLD = record(
    {
        "value": number(),
        "fpr": optional(number(0, 1)),
        "guaranteed_fpr": number(0, 1),
        "n": count(),
        "source": text(HELD_OUT, CROSS_HOLDOUT, TAIL, ORACLE, EDITED),
        "n_groups": count(),
    }
)


def to_json(threshold: Threshold) -> dict[str, Any]:
    """The fields, ready for `json.dump`."""
    return threshold._asdict() | {"fpr": None if math.isnan(threshold.fpr) else threshold.fpr}


def from_json(fields: Any) -> Threshold:
    """The inverse of `to_json`.

    Raises:
        ValueError: a field is missing, unknown or out of range, or fields contradict each other.
    """
    THRESHOLD(fields, "a threshold")
    if (fields["fpr"] is None) != (fields["source"] == EDITED):
        raise ValueError(f"a threshold has an fpr unless it is {EDITED}, got {fields['fpr']} and {fields['source']}")
    if fields["n_groups"] > fields["n"]:
        raise ValueError(f"a threshold has no more groups than samples, got {fields['n_groups']} and {fields['n']}")
    fpr = math.nan if fields["fpr"] is None else fields["fpr"]
    return Threshold(**fields | {"value": float(fields["value"]), "fpr": fpr})


class Thresholds(NamedTuple):
    """The thresholds of a detector on image and pixel scores; None if there is none."""

    image: Threshold | None
    pixel: Threshold | None


def pair_to_json(thresholds: Thresholds) -> dict[str, Any]:
    """The content of threshold.json."""
    return {kind: None if value is None else to_json(value) for kind, value in thresholds._asdict().items()}


def pair_from_json(values: Any, path: Path) -> Thresholds:
    """The inverse of `pair_to_json`.

    Args:
        values: the content of `path`.
        path: the file, for error messages.

    Raises:
        ValueError: as in `from_json`, or there are other thresholds.
    """
    try:
        record(dict.fromkeys(Thresholds._fields, shallow))(values, "thresholds")
        return Thresholds(*(None if values[kind] is None else from_json(values[kind]) for kind in Thresholds._fields))
    except ValueError as error:
        raise ValueError(f"{path}: {error}: restore a copy") from None
