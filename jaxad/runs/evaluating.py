"""Evaluating fitted runs on labeled test images."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxad import files
from jaxad.base import Scores
from jaxad.data import Dataset, Split
from jaxad.detector import Detector
from jaxad.driver.embedding import EmbeddingCache
from jaxad.driver.execution import Execution
from jaxad.driver.memory import peak_bytes
from jaxad.driver.mesh import is_first
from jaxad.driver.program import compile_seconds
from jaxad.driver.scoring import score_classes
from jaxad.learning import Learned, configured
from jaxad.metrics import decisions, evaluate, oracle_threshold
from jaxad.metrics.threshold import Thresholds, pair_to_json
from jaxad.progress import Bars, say
from jaxad.report.examples import Examples, choose_examples, save_examples
from jaxad.report.runs import read_recipe, write_metrics, write_recipe
from jaxad.report.tables import Row
from jaxad.runs import directory
from jaxad.runs.fitting import FittedGroup, Run, title
from jaxad.runs.scoring import score_files


def evaluate_group(
    group: FittedGroup, opened: Mapping[str, Split], *, source: str, cache: EmbeddingCache | None = None
) -> dict[Path, Row]:
    """Evaluates what `fit_all` fitted on the test images of each category; arguments as for `evaluate_runs`."""
    execution = group.execution._replace(cache=cache)
    if group.runs[0].unified:
        parts = [evaluate_unified(run, opened, source=source, execution=execution) for run in group.runs]
        return {path: row for part in parts for path, row in part.items()}
    tests = [test for run in group.runs if (test := opened[run.category].test)]
    rows = evaluate_runs(group.runs, tests, source=source, learned=group.learned, execution=execution)
    return dict(zip((run.directory for run in group.runs), rows, strict=False))  # no rows but in the first process


def evaluate_unified(
    run: Run, opened: Mapping[str, Split], *, source: str, whole: bool = True, **options: Any
) -> dict[Path, Row]:
    """Evaluates one model for all categories on each of them, in a folder of its own; options of `evaluate_runs`.

    Earlier evaluations on other categories are deleted: the report would show them side by side. Those of the same
    source stay unless these are the `whole` of it.
    """
    rows = {}
    for category, splits in opened.items():
        assert splits.test is not None
        folder = run.directory / directory.segment(category)
        part = run._replace(category=category, directory=folder, model=run.directory)
        for row in evaluate_runs([part], [splits.test], source=source, **options):
            rows[folder] = row
    if is_first():
        directory.forget_parts(run.directory, rows, None if whole else source)
    return rows


def evaluate_runs(
    runs: Sequence[Run],
    tests: Sequence[Dataset],
    *,
    source: str,
    learned: Learned | None = None,
    oracle: bool = False,
    execution: Execution = Execution(),
) -> list[Row]:
    """Scores labeled test images and writes metrics, scores and the report's examples into the run directories.

    Pixel metrics are those of the preprocessed images and masks. They are exact, so the heat maps of all test images
    are in memory at once (0.2 MB an image of 224 x 224).

    Args:
        runs: Fitted.
        tests: Images with labels for each; those without count in no metric.
        source: What `tests` were read from.
        learned: Of several runs what `fit_runs` returned: one program scores them all.
        oracle: Choose the thresholds on these very images, for this evaluation only, and mark them so.
        execution: Devices and cache.

    Raises:
        ValueError: A category has no image with a label, or for an oracle not both kinds; or another process fits into
            a run directory, or evaluates it.
    """
    for test in tests:
        if not (test.labels >= 0).any():
            raise ValueError(f"evaluation needs labels, got none in {source}: `jaxad score` scores without")
        if oracle:
            oracle_threshold(np.zeros(len(test))[test.labels >= 0], test.labels[test.labels >= 0])
    with contextlib.ExitStack() as stack:
        for run in runs if is_first() else ():
            model = run.model or run.directory
            stack.enter_context(directory.locked(model))
            if run.version not in (None, directory.version(model)):
                raise ValueError(f"the model in {model} was replaced meanwhile: evaluate again")
        return _evaluate_all(runs, tests, source, learned, oracle, execution)


def _evaluate_all(
    runs: Sequence[Run],
    tests: Sequence[Dataset],
    source: str,
    learned: Learned | None,
    oracle: bool,
    execution: Execution,
) -> list[Row]:
    started, compiled = time.perf_counter(), compile_seconds()
    image_scores = [np.empty(len(test)) for test in tests]
    heat_maps: list[np.ndarray | None] = [None] * len(tests)
    with Bars(title(runs[0].detector.settings, tests)) as bars:
        for i, rows, scores in _scores(runs, tests, learned, execution._replace(progress=bars)):
            image_scores[i][rows] = scores.image
            if scores.pixel is not None:
                if (maps := heat_maps[i]) is None:
                    maps = heat_maps[i] = np.empty((len(tests[i]), *tests[i].image_size), np.float32)
                maps[rows] = scores.pixel
    compiled = compile_seconds() - compiled
    spent = time.perf_counter() - started - compiled
    seconds = {"score_compile": compiled / len(tests), "score_per_image": spent / sum(map(len, tests))}
    if not is_first():
        return []
    options: dict[str, Any] = dict(source=source, oracle=oracle, seconds=seconds)
    return [_evaluate(*part, **options) for part in zip(runs, tests, image_scores, heat_maps, strict=True)]


def _scores(
    runs: Sequence[Run], tests: Sequence[Dataset], learned: Learned | None, execution: Execution
) -> Iterator[tuple[int, np.ndarray, Scores]]:
    detector = runs[0].detector
    if len(runs) == 1:
        yield from ((0, *part) for part in detector.score(tests[0], execution))
        return
    assert learned is not None
    execution = configured(execution, detector.settings)._replace(classes_per_step=learned.classes_per_step)
    yield from score_classes(
        learned.method, learned.state, detector.load_frozen(), tests, execution, whole_batches=True
    )


def _evaluate(
    run: Run,
    test: Dataset,
    scores: np.ndarray,
    maps: np.ndarray | None,
    *,
    source: str,
    oracle: bool,
    seconds: dict[str, float],
) -> Row:
    """Measures one category and writes the results."""
    detector: Detector = run.detector
    labels, labeled = test.labels, test.labels >= 0
    masks, ignored = None if maps is None else test.masks(range(len(test))), test.ignored(range(len(test)))
    labeled_maps, truth, left_out = (None if pixel is None else pixel[labeled] for pixel in (maps, masks, ignored))
    report = evaluate(scores[labeled], labels[labeled], labeled_maps, truth, ignored=left_out)
    if masks is not None and ignored is not None:
        hidden = masks.any((1, 2)) & ~(masks & ~ignored).any((1, 2))
        if hidden.any():
            say(f"{test.category}: {hidden.sum()} defects lie where pixels are ignored; their images stay anomalous")

    image_threshold, pixel_threshold = detector.image_threshold, detector.pixel_threshold
    oracle_thresholds = None
    if oracle:
        image_threshold = oracle_threshold(scores[labeled], labels[labeled])
        pixel_threshold = None
        if labeled_maps is not None and truth is not None:
            counted = ... if left_out is None else ~left_out
            pixel_threshold = oracle_threshold(labeled_maps[counted], truth[counted])
        oracle_thresholds = pair_to_json(Thresholds(image_threshold, pixel_threshold))
    decided = image_threshold and decisions.decide(scores, labels, image_threshold.value, test.defects)
    at_threshold: dict[str, Any] = {"image": None, "pixel": None}
    if image_threshold and decided:
        at_threshold["image"] = {"threshold": image_threshold.value} | decisions.to_json(decided)
    if pixel_threshold and maps is not None:
        largest = maps[labels == 0].max((1, 2))
        rate = decisions.binomial_rate(int((largest > pixel_threshold.value).sum()), len(largest))
        at_threshold["pixel"] = {"threshold": pixel_threshold.value, "FPR": decisions.rate_to_json(rate)}
    recipe: dict[str, Any] = read_recipe(run.model or run.directory)
    if run.model:
        recipe["category"] = run.category
    if not recipe and detector.model is not None:
        recipe = directory.recipe(detector.settings, detector.model, test) | {"source": source}
    recipe["seconds"] |= seconds
    recipe |= {
        "images_per_second": 1 / seconds["score_per_image"],
        "peak_bytes": max(recipe["peak_bytes"], peak_bytes()),
    }
    metrics = {
        "metrics": report.values,
        "reasons": report.reasons,
        "n_test": int(labeled.sum()),
        "n_anomalous": int((labels == 1).sum()),
        "ignored": 0.0 if ignored is None else float(ignored.mean()),
        "oracle": oracle,
        "thresholds": oracle_thresholds,
        "at_threshold": at_threshold,
        "source": source,
    }
    with files.staging(run.directory, directory.RESULTS) as stage:
        with score_files(stage, image_threshold) as write:
            for row in zip(test.paths, labels.tolist(), test.defects, scores.tolist(), strict=True):
                write(*row)
        limit = image_threshold.value if image_threshold else None
        save_examples(stage, _examples(run, test, scores, maps, masks, ignored, limit))
        write_recipe(stage, recipe, run.directory)
        write_metrics(stage, metrics)
    name = f"{detector.settings.method} {run.variant}".rstrip()
    row = Row(name, recipe["dataset"], recipe["category"], report.values, report.reasons, detector.settings.seed)
    return row._replace(threshold=image_threshold, decisions=decided)


def _examples(
    run: Run,
    test: Dataset,
    scores: np.ndarray,
    maps: np.ndarray | None,
    masks: np.ndarray | None,
    ignored: np.ndarray | None,
    threshold: float | None,
) -> Examples:
    """The images that the report shows."""
    chosen = choose_examples(scores, test.labels, threshold)
    limits = run.detector.color_limits()
    if limits is None and maps is not None:
        limits = float(np.median(maps)), float(maps.max())
    return Examples(
        image=test.images(chosen),
        path=[test.paths[i] for i in chosen],
        label=test.labels[chosen],
        score=scores[chosen],
        mask=None if masks is None else masks[chosen],
        map=None if maps is None else maps[chosen],
        ignored=None if ignored is None else ignored[chosen],
        limits=limits,
    )
