"""Reads a run directory (`runs/<method>/<dataset>/<category>/`) for the report."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxad.files import read_json
from jaxad.metrics.decisions import Rate
from jaxad.metrics.threshold import ORACLE, Threshold, pair_from_json
from jaxad.report.examples import Examples, load_examples


class Run(NamedTuple):
    """One method fitted to one category. Everything but `recipe` is empty until the run is evaluated."""

    recipe: Mapping[str, Any]
    metrics: Mapping[str, float]
    """Fractions, or NaN with an entry in `reasons` if a metric is undefined."""
    reasons: Mapping[str, str]
    oracle: bool
    """Whether a threshold was chosen on the test set."""
    threshold: Threshold | None
    """Threshold on image scores."""
    pixel_threshold: Threshold | None
    """Threshold on pixel scores."""
    scores: Float[np.ndarray, "n"]
    labels: Int[np.ndarray, "n"]
    """0 normal, 1 anomalous, -1 unknown."""
    defects: Sequence[str]
    """The kind of defect of each image; empty where it is unknown."""
    pixel_fpr: Rate | None
    """The normal images with any pixel above the pixel threshold; None if that was edited since."""
    examples: Examples | None


def load_run(run_dir: Path) -> Run:
    """Reads a run directory.

    Raises:
        FileNotFoundError: it has no recipe.json.
        ValueError: a file is damaged; the message names it.
    """
    if not (run_dir / "recipe.json").is_file():
        raise FileNotFoundError(f"{run_dir} has no recipe.json: pass a run directory that `jaxad fit` wrote")
    metrics = _read_metrics(run_dir / "metrics.json")
    threshold_path = run_dir / "threshold.json"
    stored = metrics.get("thresholds") or _read_json(threshold_path)
    threshold, pixel_threshold = pair_from_json(stored, threshold_path)
    scores, labels, defects = _read_scores(run_dir / "scores.csv")
    pixel = (metrics.get("at_threshold") or {}).get("pixel") or {}
    is_current = pixel_threshold is not None and pixel.get("threshold") == pixel_threshold.value
    return Run(
        recipe=_read_json(run_dir / "recipe.json"),
        metrics=metrics.get("metrics", {}),
        reasons=metrics.get("reasons", {}),
        oracle=metrics.get("oracle", False) or ORACLE in {t.source for t in (threshold, pixel_threshold) if t},
        threshold=threshold,
        pixel_threshold=pixel_threshold,
        scores=scores,
        labels=labels,
        defects=defects,
        pixel_fpr=Rate(**pixel["FPR"]) if is_current else None,
        examples=load_examples(run_dir),
    )


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _read_metrics(path: Path) -> dict[str, Any]:
    content = _read_json(path)
    try:
        metrics = {name: math.nan if v is None else float(v) for name, v in content.get("metrics", {}).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must hold numbers by metric, got {content['metrics']!r}: evaluate again") from error
    return content | {"metrics": metrics}


def _read_scores(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    if not path.exists():
        return np.empty(0), np.empty(0, np.int32), []
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    try:
        scores = np.array([float(row["score"]) for row in rows])
        labels = np.array([int(row.get("label") or -1) for row in rows], np.int32)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} needs the columns score and label, all numbers ({error!r}): score again") from error
    if not np.isfinite(scores).all():
        raise ValueError(f"{path}: the score of {rows[int(np.argmin(np.isfinite(scores)))]['path']} is not finite")
    return scores, labels, [row.get("defect") or "" for row in rows]
