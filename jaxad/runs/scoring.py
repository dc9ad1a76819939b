"""Scoring images with a fitted detector: tables of scores, and pictures on request."""

import contextlib
import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxad import files
from jaxad.data import Dataset, Split, open_data, to_original
from jaxad.data.images import MaskThreshold, in_threads
from jaxad.detector import Detector
from jaxad.driver.execution import Execution
from jaxad.metrics import Threshold
from jaxad.progress import Bars
from jaxad.report.pictures import hatch, overlay, save_png, save_tiff
from jaxad.runs.fitting import title
from jaxad.text import to_cell


class Scored(NamedTuple):
    """What `score_run` has done."""

    anomalous: int
    """Images above the threshold; 0 without one."""
    errors: Sequence[str]
    """Of the images that cannot be read."""


def score_run(
    detector: Detector,
    data: Dataset,
    output: Path,
    *,
    root: Path | None,
    labeled: bool,
    overlays: bool = False,
    maps: bool = False,
) -> Scored:
    """Scores images batch by batch; memory does not grow with their number.

    Args:
        detector: Fitted.
        data: The images. Where it keeps errors, images that cannot be read are listed with theirs.
        output: A folder of `directory.scoring`. Receives scores.csv and scores.jsonl; overlays/ and maps/ where asked
            for, in the images' own folders.
        root: The folder that these folders are relative to; None where the images are no files.
        labeled: Whether the labels of `data` are real; else they are left empty.
        overlays: Write PNGs of the images with the heat map over them, in colors that mean the same in every image.
        maps: Write the raw heat maps at the original resolution as float32 TIFFs.

    Raises:
        ValueError: The method gives no heat maps, or there is nothing to take the colors from.
    """
    limits = detector.color_limits()
    names = picture_names(data, root)

    def draw(job: tuple[int, np.ndarray]) -> None:
        i, heat_map = job
        heat_map = to_original(heat_map, data.original_size(i), data.preprocess)
        if maps:
            save_tiff(output / "maps" / f"{names[i]}.tiff", heat_map)
        if overlays and limits is not None:
            image = hatch(data.original(i), data.original_ignored(i))
            save_png(output / "overlays" / f"{names[i]}.png", overlay(image, heat_map, *limits))

    anomalous, errors = 0, {} if data.errors is None else data.errors
    with (
        score_files(output, detector.image_threshold) as write,
        Bars(title(detector.settings, [data])) as bars,
    ):
        for rows, scores in detector.score(data, Execution(progress=bars)):
            if overlays or maps:
                if scores.pixel is None:
                    raise ValueError(
                        f"overlays and maps need a method with heat maps, got {detector.settings.method}: omit them"
                    )
                if overlays and limits is None:
                    raise ValueError(
                        "overlays take their colors from held-out images, got a model without: fit with holdout > 0"
                    )
                in_threads(draw, [job for job in zip(rows.tolist(), scores.pixel, strict=True) if job[0] not in errors])
            for i, value in zip(rows.tolist(), scores.image.tolist(), strict=True):
                label, defect = (int(data.labels[i]), data.defects[i]) if labeled else (-1, "")
                outcome = (None, errors[i]) if i in errors else (value, None)
                anomalous += bool(write(data.paths[i], label, defect, *outcome))
    return Scored(anomalous, [errors[i] for i in sorted(errors)])


def picture_names(data: Dataset, root: Path | None) -> list[str]:
    """Where each image's pictures go: its path from `root`, without the extension where that is still unique.

    An image outside of `root` keeps its whole path.
    """
    names = []
    for path in data.paths:
        if root is not None:
            inside = os.path.relpath(path, root)
            path = os.path.abspath(path) if inside.startswith(os.pardir) else inside
        names.append(os.path.normpath(path).lstrip(os.sep))
    bare = [os.path.splitext(name)[0] for name in names]
    return bare if len(set(bare)) == len(set(names)) else names


@contextlib.contextmanager
def score_files(folder: Path, threshold: Threshold | None) -> Iterator[Callable[..., bool | None]]:
    """Writes scores.csv and scores.jsonl row by row; they appear when the block ends well.

    Yields:
        write(path, label, defect, score, error=None) -> the prediction: whether the score is above the threshold, None
        without one. An unknown label is -1, and empty (null) in the files; so is the score of an image with an error.
        In the CSV an apostrophe keeps spreadsheets from running a name as a formula.
    """
    encoding: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape"}
    with (
        files.replacing(folder / "scores.csv") as csv_path,
        files.replacing(folder / "scores.jsonl") as jsonl_path,
        csv_path.open("w", newline="", **encoding) as csv_file,
        jsonl_path.open("w", **encoding) as jsonl_file,
    ):
        fields = ("path", "label", "defect", "score", "prediction", "error")
        table = csv.writer(csv_file)
        table.writerow(fields)

        def write(path: str, label: int, defect: str, score: float | None, error: str | None = None) -> bool | None:
            prediction = None if threshold is None or score is None else score > threshold.value
            flag = None if prediction is None else int(prediction)
            row = (path, None if label < 0 else label, defect or None, score, flag, error)
            table.writerow([to_cell(cell) if isinstance(cell, str) else cell for cell in row])
            jsonl_file.write(json.dumps(dict(zip(fields, row, strict=True))) + "\n")
            return prediction

        yield write


def open_split(
    source: str,
    detector: Detector,
    *,
    asked: str | None,
    fitted: str | None,
    mask_threshold: MaskThreshold = None,
    group_by: str | None = None,
    any_folder: bool = False,
    **options: Any,
) -> Split:
    """One category of a source: the one asked for, or the only one, or the one that the run was fitted on.

    Args:
        source: As for `open_data`.
        detector: Says how images are preprocessed.
        asked: A category, or None.
        fitted: The category of the run, or None.
        mask_threshold: As for `open_data`.
        group_by: As for `open_data`.
        any_folder: A folder in no known layout may hold normal and anomalous images.
        options: `pages` and `broken` of `open_data`.

    Raises:
        ValueError: There are several and none of the two names is among them; and all of `open_data`.
    """
    preprocess, layout = detector.settings.preprocess, "any" if any_folder else "auto"
    options |= {"mask_threshold": mask_threshold, "group_by": group_by, "layout": layout}
    opened = open_data(source, category=asked, preprocess=preprocess, **options)
    if len(opened) == 1:
        return next(iter(opened.values()))
    if fitted is None or fitted not in opened:
        raise ValueError(f"{source} has several categories: choose one with --category: {', '.join(opened)}")
    return opened[fitted]
