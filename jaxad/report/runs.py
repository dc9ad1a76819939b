"""Reads a run directory (`runs/<method>/<dataset>/<category>/`) for the report."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxad import artifact, files
from jaxad.metrics.decisions import RATE, Rate, rate_from_json
from jaxad.metrics.threshold import ORACLE, Threshold, Thresholds, pair_from_json
from jaxad.report.examples import FILE, Examples, load_examples
from jaxad.schema import count, flag, items, mapping, number, optional, record, shallow, text
from jaxad.text import from_cell

RECIPE = record(
    {
        "dataset": text(),
        "category": text(),
        "seconds": mapping(optional(number(0))),
        "peak_bytes": count(),
    },
    {
        "method": text(),
        "hyperparameters": mapping(shallow),
        "backbone": text(),
        "weights": record({"path": text(), "sha256": text()}),
        "versions": mapping(text()),
        "device": text(),
        "images_per_second": optional(number(0)),
        "n_train": count(),
        "n_heldout": count(),
        "loss": items(number()),
        "seed": number(whole=True),
        "source": text(),
        "group_by": optional(text()),
        "unified": flag,
        "command": text(),
    },
    closed=False,
)
"""What recipe.json must hold."""
METRICS = record(
    {"metrics": mapping(optional(number()))},
    {
        "reasons": mapping(text()),
        "oracle": flag,
        "thresholds": optional(mapping(shallow)),
        "at_threshold": record({"image": shallow, "pixel": optional(record({"threshold": number(), "FPR": RATE}))}),
    },
    closed=False,
)
"""What metrics.json must hold."""
RESULTS = ("scores.csv", "scores.jsonl", FILE)
"""The files whose hashes metrics.json has."""


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
        ValueError: a file is damaged or edited; the message names it.
    """
    recipe = read_recipe(run_dir)
    if not recipe:
        raise FileNotFoundError(f"{run_dir} has no recipe.json: pass a run directory that `jaxad fit` wrote")
    metrics = _read_metrics(run_dir)
    threshold, pixel_threshold = _read_thresholds(run_dir, metrics)
    scores, labels, defects = _read_scores(run_dir / "scores.csv")
    pixel = metrics.get("at_threshold", {}).get("pixel")
    is_current = pixel and pixel_threshold is not None and pixel["threshold"] == pixel_threshold.value
    return Run(
        recipe=recipe,
        metrics={name: math.nan if v is None else float(v) for name, v in metrics.get("metrics", {}).items()},
        reasons=metrics.get("reasons", {}),
        oracle=metrics.get("oracle", False) or ORACLE in {t.source for t in (threshold, pixel_threshold) if t},
        threshold=threshold,
        pixel_threshold=pixel_threshold,
        scores=scores,
        labels=labels,
        defects=defects,
        pixel_fpr=rate_from_json(pixel["FPR"]) if pixel and is_current else None,
        examples=load_examples(run_dir),
    )


def read_recipe(run_dir: Path) -> dict[str, Any]:
    """recipe.json; empty where `Detector.save` wrote the model without one.

    Raises:
        ValueError: The file is damaged or edited, or belongs to another model than the one in the folder.
    """
    path = run_dir / "recipe.json"
    if not files.is_there(path):
        return {}
    recipe = files.read_sealed(path, RECIPE, "restore a copy or fit again")
    of_model = recipe.pop("sha256").get("model.safetensors")
    if not (run_dir / "model.json").exists():
        return recipe
    if of_model != artifact.read_description(run_dir, verify=())["sha256"]["model.safetensors"]:
        raise ValueError(f"{path} belongs to another model: restore a copy or fit again")
    return recipe


def write_recipe(folder: Path, recipe: Mapping[str, Any], run_dir: Path | None = None) -> None:
    """Writes recipe.json, which names the model in the run directory, if there is one; None: in the folder itself."""
    files.write_sealed(folder / "recipe.json", recipe, files.digests(run_dir or folder, ("model.safetensors",)))


def write_metrics(run_dir: Path, metrics: Mapping[str, Any]) -> None:
    """Writes metrics.json with the hashes of the other results in the folder."""
    files.write_sealed(run_dir / "metrics.json", metrics, files.digests(run_dir, RESULTS))


def _read_metrics(run_dir: Path) -> dict[str, Any]:
    """metrics.json; empty where there is none."""
    path = run_dir / "metrics.json"
    if not files.is_there(path):
        return {}
    metrics = files.read_sealed(path, METRICS, "evaluate again")
    for name, digest in metrics["sha256"].items():
        if not (run_dir / name).is_file() or files.digest(run_dir / name) != digest:
            raise ValueError(f"{run_dir / name} is not what metrics.json names: evaluate again")
    return metrics


def _read_thresholds(run_dir: Path, metrics: Mapping[str, Any]) -> Thresholds:
    """Those of the evaluation if it had its own, or else those of the model."""
    path = run_dir / "threshold.json"
    if metrics.get("thresholds"):
        return pair_from_json(metrics["thresholds"], run_dir / "metrics.json")
    if (run_dir / "model.json").exists():
        artifact.read_description(run_dir, verify=("threshold.json",))
    return pair_from_json(files.read_json(path), path) if files.is_there(path) else Thresholds(None, None)


SCORE, LABEL = number(), number(-1, 1, whole=True)


def _read_scores(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The scores, labels and defects; rows of images that could not be read have none."""
    if not files.is_there(path):
        return np.empty(0), np.empty(0, np.int32), []
    scores, labels, defects = [], [], []
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        reader = csv.DictReader(file, restval="", strict=True)
        try:
            for row in reader:
                if None in row or not {"score", "label"} <= row.keys():
                    raise ValueError("its columns are not those of the first line")
                if row.get("error") and not row["score"]:
                    continue
                score, label = float(row["score"]), int(row["label"] or -1)
                SCORE(score, "score")
                LABEL(label, "label")
                scores.append(score)
                labels.append(label)
                defects.append(from_cell(row.get("defect", "")))
        except (csv.Error, ValueError) as error:
            place = f"line {reader.line_num} of {path}"
            raise ValueError(f"{place} must have a score and a label, all numbers ({error}): score again") from None
    return np.array(scores), np.array(labels, np.int32), defects
