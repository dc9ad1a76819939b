"""What a detector decides at its threshold: rates on labeled images, with exact intervals."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import special

from jaxad.schema import count, number, optional, record

RATES = ("FPR", "recall", "precision", "F1")
"""The rates of `Decisions`, in the order of the tables."""


class Rate(NamedTuple):
    """A share of images, and the interval of the rates that would give such a share."""

    value: float
    """NaN of no images."""
    low: float
    high: float
    n: int
    """The images that it is a share of."""


RATE = record({"value": optional(number(0, 1)), "low": number(0, 1), "high": number(0, 1), "n": count()})
"""What `rate_to_json` makes."""


class Decisions(NamedTuple):
    """The rates of a detector at a threshold on labeled images."""

    FPR: Rate
    """Of the normal images, those above the threshold."""
    recall: Rate
    """Of the anomalous images, those above the threshold."""
    precision: Rate
    """Of the images above the threshold, the anomalous ones."""
    F1: Rate
    """2 TP / (2 TP + FP + FN); its `n` is TP + FP + FN."""
    recall_by_defect: Mapping[str, Rate]


def binomial_rate(count: int, n: int, confidence: float = 0.95) -> Rate:
    """A share and its exact interval, which covers the true rate with at least this probability.

    Source: Clopper and Pearson, The use of confidence or fiducial limits, Biometrika 1934.

    Args:
        count: of the n images.
        n: independent images; 0 says nothing: NaN, and the interval [0, 1].
        confidence: in (0, 1).
    """
    tail = (1 - confidence) / 2
    low = special.betaincinv(count, n - count + 1, tail) if count else 0.0
    high = special.betaincinv(count + 1, n - count, 1 - tail) if count < n else 1.0
    return Rate(count / n if n else math.nan, float(low), float(high), n)


def decide(
    scores: Float[np.ndarray, "n"], labels: Int[np.ndarray, "n"], threshold: float, defects: Sequence[str] = ()
) -> Decisions:
    """The decisions `score > threshold` on labeled images, with 95 % intervals.

    F1 = 2 J / (1 + J) grows with the share J = TP / (TP + FP + FN): its interval follows from the exact one of J.

    Args:
        scores: image scores.
        labels: 0 normal, 1 anomalous; images with other labels do not count.
        threshold: a number on the scale of the scores.
        defects: the kind of defect of each image; empty if unknown.
    """
    above, normal, anomalous = scores > threshold, labels == 0, labels == 1
    tp, fp = int((above & anomalous).sum()), int((above & normal).sum())
    jaccard = binomial_rate(tp, int(anomalous.sum()) + fp)
    value, low, high = (2 * share / (1 + share) for share in jaccard[:3])
    kinds = np.asarray(defects, str) if len(defects) else np.zeros(len(scores), str)
    by_defect = {}
    for kind in dict.fromkeys(kinds[anomalous].tolist()):
        if kind:
            of_kind = anomalous & (kinds == kind)
            by_defect[kind] = binomial_rate(int((above & of_kind).sum()), int(of_kind.sum()))
    return Decisions(
        binomial_rate(fp, int(normal.sum())),
        binomial_rate(tp, int(anomalous.sum())),
        binomial_rate(tp, tp + fp),
        Rate(value, low, high, jaccard.n),
        by_defect,
    )


def rate_to_json(rate: Rate) -> dict[str, Any]:
    """The fields; NaN is null."""
    return rate._asdict() | {"value": None if math.isnan(rate.value) else rate.value}


def rate_from_json(fields: Mapping[str, Any]) -> Rate:
    """The inverse of `rate_to_json`, of a `RATE`."""
    return Rate(math.nan if fields["value"] is None else fields["value"], fields["low"], fields["high"], fields["n"])


def to_json(decisions: Decisions) -> dict[str, Any]:
    """The fields, ready for `json.dump`."""
    by_defect = {kind: rate_to_json(rate) for kind, rate in decisions.recall_by_defect.items()}
    rates = {name: rate_to_json(getattr(decisions, name)) for name in RATES}
    return rates | {"recall_by_defect": by_defect}
