"""The few images a report shows: which ones, and how a run directory keeps them.

`examples.npz`, beside the run's `scores.csv`, holds for n images of one size:

    image   uint8   (n, h, w, 3)  RGB as the method saw it, before normalization
    mask    bool    (n, h, w)     defect pixels; left out where the data have no masks
    map     float32 (n, h, w)     raw pixel scores; left out where the method gives none
    limits  float32 (2,)          pixel scores at which the colors begin and end; left out: taken from the n maps
    path    str     (n,)
    label   int32   (n,)          0 normal, 1 anomalous, -1 unknown
    score   float64 (n,)          raw image scores

What an example is (a missed defect, a false alarm ...) follows from label, score and threshold and is not stored, so
that an edited threshold cannot leave a wrong caption behind.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from jaxad.files import replacing

FILE = "examples.npz"


class Examples(NamedTuple):
    """Images for the report's grid, best given in the order of `choose_examples`."""

    image: UInt8[np.ndarray, "n h w 3"]
    path: Sequence[str]
    label: Int[np.ndarray, "n"]
    score: Float[np.ndarray, "n"]
    mask: Bool[np.ndarray, "n h w"] | None = None
    map: Float[np.ndarray, "n h w"] | None = None
    limits: tuple[float, float] | None = None
    """Pixel scores at which the colors begin and end: best the median over normal maps and the maximum over all."""


def choose_examples(
    scores: Float[np.ndarray, "m"], labels: Int[np.ndarray, "m_labels"] | None, threshold: float | None, n: int = 8
) -> Int[np.ndarray, "k"]:
    """The images worth a look: the worst errors, then the hardest of the rest; the order is that of the report.

    Errors lie furthest on the wrong side of the threshold; missed defects and false alarms take turns while both last.
    Without a threshold the lowest defects and the highest good images take turns; without labels the highest scores
    come first.

    Args:
        scores: raw image scores.
        labels: 0 normal, 1 anomalous, -1 unknown (all alike then); None means all unknown.
        threshold: a score above it counts as anomalous; None where there is none.
        n: how many at most.

    Returns:
        Positions in `scores`, `min(n, m)` of them.

    Raises:
        ValueError: `n` below 1, or labels of another length.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1; got {n}")
    if labels is None:
        labels = np.full(len(scores), -1)
    if len(labels) != len(scores):
        raise ValueError(f"labels and scores must have one length; got {len(labels)} and {len(scores)}")
    defect = labels == 1
    correct = np.zeros(len(scores), np.bool_)
    wrongness = np.where(defect, -scores, scores)
    if threshold is not None:
        correct = (labels >= 0) & (flagged(scores, threshold) == defect)
        wrongness = wrongness + np.where(defect, threshold, -threshold)
    turn = np.empty(len(scores))
    for place, group in enumerate((defect, ~defect)):
        members = np.flatnonzero(group)
        turn[members[np.argsort(-wrongness[members], kind="stable")]] = 2 * np.arange(len(members)) + place
    turn = np.where(correct, -wrongness, turn)
    chosen = np.lexsort((turn, correct))[:n]
    return chosen[np.lexsort((turn[chosen], ~(defect | correct)[chosen], correct[chosen]))]


def flagged(scores: Float[np.ndarray, "*shape"], threshold: float) -> Bool[np.ndarray, "*shape"]:
    """What a threshold calls anomalous: the scores above it."""
    return scores > threshold


def save_examples(run_dir: Path, examples: Examples) -> Path:
    """Write `examples.npz` into a run directory, whole or not at all, without pickle.

    Raises:
        ValueError: an entry whose leading size is not that of `image`.
    """
    arrays = {
        "image": np.asarray(examples.image, np.uint8),
        "path": np.asarray(examples.path, np.str_),
        "label": np.asarray(examples.label, np.int32),
        "score": np.asarray(examples.score, np.float64),
    }
    if examples.mask is not None:
        arrays["mask"] = np.asarray(examples.mask, np.bool_)
    if examples.map is not None:
        arrays["map"] = np.asarray(examples.map, np.float32)
    for name, array in arrays.items():
        wanted = arrays["image"].shape[: 3 if name in ("mask", "map") else 1]
        if array.shape[:3] != wanted and name != "image":
            raise ValueError(f"{name} must have the shape {wanted} to fit the images; got {array.shape}")
    if examples.limits is not None:
        arrays["limits"] = np.asarray(examples.limits, np.float32)
    with replacing(run_dir / FILE) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    return run_dir / FILE


def load_examples(run_dir: Path) -> Examples | None:
    """Read `examples.npz` of a run directory; None where it has none."""
    if not (run_dir / FILE).exists():
        return None
    with np.load(run_dir / FILE, allow_pickle=False) as arrays:
        limits = arrays.get("limits")
        return Examples(
            image=arrays["image"],
            path=arrays["path"].tolist(),
            label=arrays["label"],
            score=arrays["score"],
            mask=arrays.get("mask"),
            map=arrays.get("map"),
            limits=None if limits is None else (float(limits[0]), float(limits[1])),
        )
