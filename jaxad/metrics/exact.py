"""Exact metrics of raw scores, in float64 on the host. Ties are handled as in scikit-learn.

Lowering the threshold past a normal sample only adds a false positive. So all four metrics follow from the operating
points at the distinct scores of the anomalous samples (`Curve`). These take one sort of the normal scores (values
only), one sort of the few anomalous scores, and a binary search.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from numpy.typing import ArrayLike
from scipy import ndimage

METRICS = (
    "image_AUROC",
    "image_AP",
    "image_F1max",
    "pixel_AUROC",
    "pixel_AP",
    "pixel_F1max",
    "pixel_AUPRO",
)
"""The names of all metrics, in the order of the tables."""


class Report(NamedTuple):
    """The result of `evaluate`."""

    values: dict[str, float]
    """A value for every name in `METRICS`: a fraction in [0, 1], or NaN if the metric is undefined."""
    reasons: dict[str, str]
    """Why a metric is NaN; only for undefined metrics."""


class Curve(NamedTuple):
    """The k operating points of a detector at the scores of the anomalous samples, from the highest score down."""

    score: Shaped[np.ndarray, "k"]
    """The thresholds: distinct scores of anomalous samples, descending. A sample is detected if score >= threshold."""
    above: Int[np.ndarray, "k"]
    """Number of normal samples with a higher score."""
    normal: Int[np.ndarray, "k"]
    """Number of normal samples with this score or a higher one: the false positives."""
    anomalous: Int[np.ndarray, "k"]
    """Number of anomalous samples with this score or a higher one: the true positives."""
    overlap: Float[np.ndarray, "k"]
    """Per-region overlap: the detected fraction of each region, averaged over all regions."""
    n_normal: int
    n_anomalous: int


def as_finite(scores: ArrayLike, name: str) -> Shaped[np.ndarray, "..."]:
    """Returns float32 scores as they are and others as float64. Raises ValueError if one is NaN or infinite."""
    array = np.asarray(scores)
    array = array if array.dtype == np.float32 else array.astype(np.float64)
    non_finite = array.size - np.count_nonzero(np.isfinite(array))
    if non_finite:
        raise ValueError(f"{name} must be finite, got {non_finite} of {array.size} that are NaN or infinite")
    return array


def _binary(labels: ArrayLike, name: str, shape: tuple[int, ...]) -> Bool[np.ndarray, "..."]:
    """Returns `labels` as booleans. Raises ValueError for another shape or values other than 0 and 1."""
    array = np.asarray(labels)
    if array.shape != shape:
        raise ValueError(f"{name} must have the shape of their scores, got {array.shape} for scores of {shape}")
    if array.dtype == np.bool_:
        return array
    valid = (array == 0) | (array == 1)
    if not valid.all():
        raise ValueError(f"{name} must be 0 (normal) or 1 (anomalous), got {array[~valid].flat[0]}: remove the others")
    return array.astype(np.bool_)


def curve(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> Curve:
    """The operating points of a detector, for ROC, precision-recall and per-region-overlap curves.

    Args:
        scores: any shape, higher is more anomalous.
        labels: of the same shape; 0 normal, 1 anomalous.
        weights: of the same shape; the share of its region that each anomalous sample covers (`region_weights`). None
            treats all anomalous samples as one region, whose overlap is the true-positive rate.

    Returns:
        The curve; without anomalous samples it has no points.

    Raises:
        ValueError: non-finite scores, labels other than 0 and 1, or shapes that differ.
    """
    scores = as_finite(scores, "scores")
    labels = _binary(labels, "labels", scores.shape)
    normal = np.sort(scores[~labels])
    anomalous = scores[labels]
    order = np.argsort(anomalous)[::-1]
    ranked = anomalous[order]
    last = np.flatnonzero(ranked != np.append(ranked[1:], ranked.dtype.type(-np.inf)))  # of each group of ties
    if weights is None:
        overlap = (last + 1) / max(ranked.size, 1)
    else:
        covered = np.cumsum(np.asarray(weights)[labels][order], dtype=np.float64)
        overlap = covered[last] / covered[-1:]  # covered[-1] is the number of regions
    score = ranked[last]
    return Curve(
        score,
        normal.size - np.searchsorted(normal, score, "right"),
        normal.size - np.searchsorted(normal, score, "left"),
        last + 1,
        overlap,
        normal.size,
        ranked.size,
    )


def _auroc(points: Curve) -> float:
    new = np.diff(points.anomalous, prepend=0)
    outscored = points.n_normal - (points.above + points.normal) / 2
    return float(new @ outscored / points.n_normal / points.n_anomalous)


def _average_precision(points: Curve) -> float:
    new = np.diff(points.anomalous, prepend=0)
    return float(new @ (points.anomalous / (points.anomalous + points.normal)) / points.n_anomalous)


def f1(points: Curve) -> Float[np.ndarray, "k"]:
    """The F1 score at every operating point."""
    return 2 * points.anomalous / (points.anomalous + points.normal + points.n_anomalous)


def _aupro(points: Curve, fpr_limit: float) -> float:
    previous = np.append(0.0, points.overlap[:-1])
    fpr = np.append(np.stack([points.above, points.normal], 1).ravel() / points.n_normal, 1.0)
    pro = np.append(np.stack([previous, points.overlap], 1).ravel(), points.overlap[-1])
    count = np.searchsorted(fpr, fpr_limit, "right")
    x = np.concatenate([[0.0], fpr[:count], [fpr_limit]])
    y = np.concatenate([[0.0], pro[:count], [np.interp(fpr_limit, fpr, pro, left=0.0)]])
    return float(np.trapezoid(y, x) / fpr_limit)


def undefined_reason(points: Curve, sample: str) -> str | None:
    """Why the metrics of these points are undefined, or None if they are defined. `sample` names one sample."""
    if points.n_anomalous == 0:
        return f"none of the {points.n_normal} {sample}s is anomalous"
    if points.n_normal == 0:
        return f"none of the {points.n_anomalous} {sample}s is normal"
    return None


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve: the probability that an anomalous sample outscores a normal one; ties count half.

    Args:
        scores: any shape, higher is more anomalous.
        labels: of the same shape; 0 normal, 1 anomalous.

    Returns:
        A fraction in [0, 1]; NaN unless both classes are present.

    Raises:
        ValueError: non-finite scores, labels other than 0 and 1, or shapes that differ.
    """
    points = curve(scores, labels)
    return math.nan if undefined_reason(points, "sample") else _auroc(points)


def average_precision(scores: ArrayLike, labels: ArrayLike) -> float:
    """Average precision: precision averaged over recall as a step function, without interpolation.

    Samples with equal scores are detected at the same threshold. Arguments, result and errors are those of `auroc`.
    """
    points = curve(scores, labels)
    return math.nan if undefined_reason(points, "sample") else _average_precision(points)


def f1_max(scores: ArrayLike, labels: ArrayLike) -> float:
    """The best F1 over all thresholds: an oracle value, since the test labels choose the threshold.

    Arguments, result and errors are those of `auroc`.
    """
    points = curve(scores, labels)
    return math.nan if undefined_reason(points, "sample") else float(f1(points).max())


def region_weights(masks: ArrayLike, ignored: Bool[np.ndarray, "n h w"] | None = None) -> Float[np.ndarray, "n h w"]:
    """The share of its region that each pixel covers: 1 / area inside a region, 0 outside.

    Regions are the 8-connected components of a mask, as in the official MVTec AD evaluation.

    Args:
        masks: (n, h, w), 0 normal, 1 anomalous.
        ignored: pixels that do not count; they are no part of the area of their region.

    Returns:
        Weights in float64, which sum to one over each region.

    Raises:
        ValueError: masks of another shape or with other values.
    """
    masks = np.asarray(masks)
    if masks.ndim != 3:
        raise ValueError(f"masks must be (n, h, w), got {masks.shape}")
    masks = _binary(masks, "masks", masks.shape)
    weights = np.zeros(masks.shape)
    anomalous = np.flatnonzero(masks.any((1, 2)))
    within_image = np.zeros((3, 3, 3), int)
    within_image[1] = 1
    regions = np.empty((len(anomalous), *masks.shape[1:]), np.int32)
    ndimage.label(masks[anomalous], within_image, regions)
    if ignored is not None:
        regions[ignored[anomalous]] = 0
    area = np.bincount(regions.ravel()).astype(np.float64)
    area[area == 0] = area[:1] = np.inf
    weights[anomalous] = (1 / area)[regions]
    return weights


def aupro(
    scores: ArrayLike, masks: ArrayLike, fpr_limit: float = 0.3, ignored: Bool[np.ndarray, "n h w"] | None = None
) -> float:
    """Area under the per-region-overlap curve up to a false-positive rate, divided by that rate.

    The overlap is the detected fraction of a region, averaged over the regions of all images. The false-positive rate
    is taken over the normal pixels of all images, normal images included. The curve is exact at every threshold and
    linear in between.

    Source: Bergmann et al., MVTec AD, CVPR 2019 and IJCV 2021 (per-region overlap).

    Args:
        scores: (n, h, w), higher is more anomalous.
        masks: (n, h, w), 0 normal, 1 anomalous.
        fpr_limit: in (0, 1].
        ignored: pixels that do not count.

    Returns:
        A fraction in [0, 1]; NaN without anomalous or without normal pixels.

    Raises:
        ValueError: non-finite scores, shapes that differ, or a limit outside (0, 1].
    """
    check_limit(fpr_limit)
    points = _pixel_curve(scores, masks, ignored)
    return math.nan if undefined_reason(points, "pixel") else _aupro(points, fpr_limit)


def _pixel_curve(scores: ArrayLike, masks: ArrayLike, ignored: Bool[np.ndarray, "n h w"] | None) -> Curve:
    weights = region_weights(masks, ignored)
    if ignored is None:
        return curve(scores, masks, weights)
    return curve(np.asarray(scores)[~ignored], np.asarray(masks)[~ignored], weights[~ignored])


def check_limit(fpr_limit: float) -> None:
    """Raises ValueError if the integration limit lies outside (0, 1]."""
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"fpr_limit must be in (0, 1], got {fpr_limit}")


def summarize(points: Curve, prefix: str, fpr_limit: float) -> Report:
    """The metrics of one curve: all names in `METRICS` that start with the prefix, "image" or "pixel"."""
    names = [name for name in METRICS if name.startswith(prefix)]
    reason = undefined_reason(points, prefix)
    if reason:
        return Report(dict.fromkeys(names, math.nan), dict.fromkeys(names, reason))
    values = {
        f"{prefix}_AUROC": _auroc(points),
        f"{prefix}_AP": _average_precision(points),
        f"{prefix}_F1max": float(f1(points).max()),
        f"{prefix}_AUPRO": _aupro(points, fpr_limit),
    }
    return Report({name: values[name] for name in names}, {})


def evaluate(
    image_scores: ArrayLike,
    labels: ArrayLike,
    pixel_scores: ArrayLike | None = None,
    masks: ArrayLike | None = None,
    fpr_limit: float = 0.3,
    ignored: Bool[np.ndarray, "n h w"] | None = None,
) -> Report:
    """Computes all metrics of a test set.

    Args:
        image_scores: (n,), raw scores, higher is more anomalous.
        labels: (n,), 0 normal, 1 anomalous.
        pixel_scores: (n, h, w), or None if the method gives no maps.
        masks: (n, h, w), 0 normal, 1 anomalous, including the empty masks of normal images. None if the data set has no
            masks.
        fpr_limit: integration limit of pixel_AUPRO, in (0, 1].
        ignored: pixels that do not count.

    Returns:
        A value for every name in `METRICS`; NaN with a reason if it is undefined.

    Raises:
        ValueError: non-finite scores (with their number), labels other than 0 and 1, shapes that differ.
    """
    check_limit(fpr_limit)
    if np.ndim(image_scores) != 1:
        raise ValueError(f"image_scores must be (n,), got {np.shape(image_scores)}")
    image = summarize(curve(image_scores, labels), "image", fpr_limit)
    if pixel_scores is None or masks is None:
        reason = "the method gives no anomaly maps" if pixel_scores is None else "the data set has no masks"
        names = [name for name in METRICS if name.startswith("pixel")]
        pixel = Report(dict.fromkeys(names, math.nan), dict.fromkeys(names, reason))
    else:
        if np.shape(pixel_scores)[:1] != np.shape(image_scores):
            raise ValueError(
                f"pixel_scores must be (n, h, w) for {np.size(image_scores)} images, got {np.shape(pixel_scores)}"
            )
        points = _pixel_curve(pixel_scores, masks, ignored)
        pixel = summarize(points, "pixel", fpr_limit)
    return Report(image.values | pixel.values, image.reasons | pixel.reasons)
