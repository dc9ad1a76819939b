"""A run directory (`runs/<method>/<dataset>/<category>/`) as the report reads it."""

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxad.files import read_json
from jaxad.metrics.threshold import ORACLE, Threshold, pair_from_json
from jaxad.report.examples import Examples, load_examples


class Run(NamedTuple):
    """One method fitted to one category. Only `recipe` is sure to be there: scoring may be yet to come."""

    recipe: Mapping[str, Any]
    metrics: Mapping[str, float]
    """Fractions; NaN where a metric is undefined, then `reasons` says why."""
    reasons: Mapping[str, str]
    oracle: bool
    """A threshold in use was chosen on the test set."""
    threshold: Threshold | None
    """Of the image scores."""
    pixel_threshold: Threshold | None
    scores: Float[np.ndarray, "n"]
    labels: Int[np.ndarray, "n"]
    """0 normal, 1 anomalous, -1 unknown."""
    examples: Examples | None


def load_run(run_dir: Path) -> Run:
    """Read a run directory.

    Raises:
        FileNotFoundError: it has no recipe.json.
        ValueError: one of its files is damaged; the message names it.
    """
    if not (run_dir / "recipe.json").is_file():
        raise FileNotFoundError(f"{run_dir} has no recipe.json: give a run directory that `jaxad fit` has written")
    metrics = _read_metrics(run_dir / "metrics.json")
    edited = run_dir / "threshold.json"
    threshold, pixel_threshold = pair_from_json(metrics.get("thresholds") or _read_json(edited), edited)
    scores, labels = _read_scores(run_dir / "scores.csv")
    return Run(
        recipe=_read_json(run_dir / "recipe.json"),
        metrics=metrics.get("metrics", {}),
        reasons=metrics.get("reasons", {}),
        oracle=metrics.get("oracle", False) or ORACLE in {one.source for one in (threshold, pixel_threshold) if one},
        threshold=threshold,
        pixel_threshold=pixel_threshold,
        scores=scores,
        labels=labels,
        examples=load_examples(run_dir),
    )


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _read_metrics(path: Path) -> dict[str, Any]:
    found = _read_json(path)
    try:
        values = {name: math.nan if value is None else float(value) for name, value in found.get("metrics", {}).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must hold numbers by metric, got {found['metrics']!r}: evaluate again") from error
    return found | {"metrics": values}


def _read_scores(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not path.exists():
        return np.empty(0), np.empty(0, np.int32)
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    try:
        scores = np.array([float(row["score"]) for row in rows])
        labels = np.array([int(row.get("label") or -1) for row in rows], np.int32)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} needs the columns score and label, all numbers ({error!r}): score again") from error
    if not np.isfinite(scores).all():
        raise ValueError(f"{path}: the score of {rows[int(np.argmin(np.isfinite(scores)))]['path']} is not finite")
    return scores, labels
