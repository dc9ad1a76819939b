"""The example images of a report: how they are chosen, and how a run directory stores them.

`examples.npz`, next to `scores.csv`, holds for n images of one size:

    image   uint8   (n, h, w, 3)  RGB after preprocessing, before normalization
    mask    bool    (n, h, w)     defect pixels; absent if the data set has no masks
    map     float32 (n, h, w)     raw pixel scores; absent if the method gives none
    ignored bool    (n, h, w)     pixels that do not count; absent if all do
    limits  float32 (2,)          pixel scores at both ends of the color scale; if absent, computed from the n maps
    path    str     (n,)
    label   int32   (n,)          0 normal, 1 anomalous, -1 unknown
    score   float64 (n,)          raw image scores

The caption of an example (missed defect, false alarm, ...) is not stored. It follows from label, score and threshold,
so it stays correct after an edit of the threshold.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from jaxad.files import is_there, replacing

FILE = "examples.npz"


class Examples(NamedTuple):
    """The images of the grid in the report, in the order of `choose_examples`."""

    image: UInt8[np.ndarray, "n h w 3"]
    path: Sequence[str]
    label: Int[np.ndarray, "n"]
    score: Float[np.ndarray, "n"]
    mask: Bool[np.ndarray, "n h w"] | None = None
    map: Float[np.ndarray, "n h w"] | None = None
    limits: tuple[float, float] | None = None
    """Pixel scores at both ends of the color scale. Recommended: median over normal maps, maximum over all."""
    ignored: Bool[np.ndarray, "n h w"] | None = None


def choose_examples(
    scores: Float[np.ndarray, "m"], labels: Int[np.ndarray, "m_labels"] | None, threshold: float | None, n: int = 8
) -> Int[np.ndarray, "k"]:
    """Chooses the images for the report, in its order: the worst errors, then the closest calls.

    The worst errors are the furthest on the wrong side of the threshold. Missed defects and false alarms are chosen
    alternately until one of them runs out. Without a threshold, the defects with the lowest and the good images with
    the highest scores are chosen alternately. Without labels, the images with the highest scores are chosen.

    Args:
        scores: raw image scores.
        labels: 0 normal, 1 anomalous; or -1 for all images if labels are unknown, as is None.
        threshold: scores above it count as anomalous; None if there is no threshold.
        n: maximum number of images.

    Returns:
        `min(n, m)` positions in `scores`.

    Raises:
        ValueError: `n` is below 1, or `labels` and `scores` differ in length.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1; got {n}")
    if labels is None:
        labels = np.full(len(scores), -1)
    if len(labels) != len(scores):
        raise ValueError(f"labels and scores must have the same length; got {len(labels)} and {len(scores)}")
    is_defect = labels == 1
    is_correct = np.zeros(len(scores), np.bool_)
    error = np.where(is_defect, -scores, scores)
    if threshold is not None:
        is_correct = (labels >= 0) & (is_anomalous(scores, threshold) == is_defect)
        error = error + np.where(is_defect, threshold, -threshold)
    rank = np.empty(len(scores))
    for offset, group in enumerate((is_defect, ~is_defect)):
        members = np.flatnonzero(group)
        rank[members[np.argsort(-error[members], kind="stable")]] = 2 * np.arange(len(members)) + offset
    rank = np.where(is_correct, -error, rank)
    positions = np.lexsort((rank, is_correct))[:n]
    is_alarm = ~(is_defect | is_correct)
    return positions[np.lexsort((rank[positions], is_alarm[positions], is_correct[positions]))]


def is_anomalous(scores: Float[np.ndarray, "*shape"], threshold: float) -> Bool[np.ndarray, "*shape"]:
    """Predictions: True for scores above the threshold."""
    return scores > threshold


def save_examples(run_dir: Path, examples: Examples) -> Path:
    """Writes `examples.npz` into a run directory, atomically and without pickle.

    Raises:
        ValueError: an entry has another shape than `image`.
    """
    arrays = {
        "image": np.asarray(examples.image, np.uint8),
        "path": np.asarray(examples.path, np.str_),
        "label": np.asarray(examples.label, np.int32),
        "score": np.asarray(examples.score, np.float64),
    }
    if examples.mask is not None:
        arrays["mask"] = np.asarray(examples.mask, np.bool_)
    if examples.ignored is not None:
        arrays["ignored"] = np.asarray(examples.ignored, np.bool_)
    if examples.map is not None:
        arrays["map"] = np.asarray(examples.map, np.float32)
    if examples.limits is not None:
        arrays["limits"] = np.asarray(examples.limits, np.float32)
    _check(arrays)
    with replacing(run_dir / FILE) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    return run_dir / FILE


def load_examples(run_dir: Path) -> Examples | None:
    """Reads `examples.npz` from a run directory; returns None if there is none.

    Raises:
        ValueError: the file is damaged.
    """
    path = run_dir / FILE
    if not is_there(path):
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        _check(arrays)
    except Exception as error:  # of zipfile, zlib and numpy, which have no common class
        raise ValueError(f"{path} is damaged ({error!r}): evaluate again") from error
    limits = arrays.pop("limits", None)
    paths = arrays.pop("path").tolist()
    return Examples(path=paths, limits=None if limits is None else (float(limits[0]), float(limits[1])), **arrays)


KINDS = {
    **{"image": "u1", "path": "U", "label": "i4", "score": "f8", "mask": "b1", "ignored": "b1"},
    **{"map": "f4", "limits": "f4"},
}


def _check(arrays: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError if an array is missing, unknown, or has another type, shape or range than the others need."""
    if not {"image", "path", "label", "score"} <= arrays.keys() <= KINDS.keys():
        raise ValueError(f"the arrays must be among {', '.join(KINDS)}; got {', '.join(arrays)}")
    image = arrays["image"]
    if image.ndim != 4 or image.shape[3] != 3 or 0 in image.shape[1:]:
        raise ValueError(f"image must have the shape (n, h, w, 3); got {image.shape}")
    for name, array in arrays.items():
        shape = {"image": image.shape, **dict.fromkeys(("mask", "map", "ignored"), image.shape[:3]), "limits": (2,)}
        wanted = shape.get(name, image.shape[:1])
        if array.shape != wanted:
            raise ValueError(f"{name} must have the shape {wanted} to match the images; got {array.shape}")
        if array.dtype.str[1:] != KINDS[name] and array.dtype.kind != KINDS[name]:
            raise ValueError(f"{name} must be of the type {KINDS[name]}; got {array.dtype}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite")
    if not np.isin(arrays["label"], (-1, 0, 1)).all():
        raise ValueError("label must be -1, 0 or 1")
