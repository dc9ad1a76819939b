"""Signs that several images show one part, such as one tile under six exposures."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath

import numpy as np
from jaxtyping import Int, UInt8

SIDE = 16
"""Height and width of the thumbnails that are compared."""
SAMPLE, RUN = 500, 50
"""Of a large data set, so many images are compared: runs of neighbors, as shots of a part often follow each other."""
NEIGHBORS = 24
"""Shots of a part, at most; fewer in small data sets, so that parts outnumber shots."""
GAP = 1.5
"""A near duplicate is closer than the next image by this factor."""
LEAST = 30
"""Of fewer images the distances tell nothing."""
_ROUNDING = 0.01
"""Distances of normalized thumbnails below come from 8-bit rounding."""
_SHOTS = (re.compile(r"(.+)[-_ .(]([^-_ .()]+)\)?"), re.compile(r"(.*\d)([A-Za-z])"))
"""The part and the shot in the stem of a file's name: part12_3, part12 (3), part12c."""
_CLOCK = re.compile(r"(19|20)\d\d([-_.]?)(0[1-9]|1[0-2])\2([0-2]\d|3[01])|[0-2]\d([-_.])[0-5]\d\5[0-5]\d")
"""A date or a time: what follows it counts seconds or images, and not shots of a part."""


def alike_names(paths: Sequence[str]) -> tuple[str, str] | None:
    """Two names that differ in the shot only, if half of all names or more come in such families, else None.

    There must be more families than shots: img_001, img_002 ... is one family, and numbers that start anew every day
    are more than the days.
    """
    for pattern in _SHOTS:
        families: dict[tuple[PurePath, str], list[tuple[str, str]]] = {}
        for path in map(PurePath, paths):
            match = pattern.fullmatch(path.stem)
            if match and not _CLOCK.search(path.stem):
                families.setdefault((path.parent, match[1]), []).append((match[2], path.name))
        several = [family for family in families.values() if len(family) > 1]
        shots = Counter(shot for family in several for shot, _ in family)
        if len(several) > max(2, len(shots)) and 2 * shots.total() >= len(paths):
            return several[0][0][1], several[0][1][1]
    return None


def sample(n: int) -> Int[np.ndarray, "m"]:
    """The positions of the images to compare, of n."""
    if n <= SAMPLE:
        return np.arange(n)
    starts = np.linspace(0, n - RUN, SAMPLE // RUN).astype(int)
    return np.unique(starts[:, None] + np.arange(RUN))


def near_duplicates(thumbnails: UInt8[np.ndarray, "n h w 3"]) -> float:
    """The share of images that have near duplicates: neighbors after which the next one is farther by `GAP`.

    Parts in one pose are alike, too, but their distances grow smoothly: there is a gap only after the shots of a part.
    Distances are those of gray thumbnails, normalized to mean 0 and norm 1.
    """
    n = len(thumbnails)
    if n < LEAST:
        return 0.0
    gray = thumbnails.mean(-1).reshape(n, -1)
    gray -= gray.mean(1, keepdims=True)
    gray /= np.maximum(np.linalg.norm(gray, axis=1, keepdims=True), 1.0)
    square = (gray**2).sum(1)
    distance = np.sqrt(np.maximum(square[:, None] + square - 2 * gray @ gray.T, 0))
    np.fill_diagonal(distance, np.inf)
    nearest = np.maximum(np.sort(distance, axis=1)[:, : min(NEIGHBORS, n // 8) + 1], _ROUNDING)
    return float(((nearest[:, 1:] / nearest[:, :-1]).max(1) > GAP).mean())
