"""Runs: fit one category, evaluate it or score other images with it, and write what came out.

`runs/<method>/<dataset>/<category>/` holds model.safetensors and model.json, threshold.json, recipe.json and, once
evaluated, metrics.json, scores.csv, scores.jsonl and examples.npz. Every file appears whole or not at all; model.json
comes last of a fit and metrics.json last of an evaluation.
"""

import contextlib
import copy
import csv
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxad import files
from jaxad.data import Dataset, Split, open_data, to_original
from jaxad.data.dataset import unite
from jaxad.data.folders import recognize
from jaxad.data.images import in_threads
from jaxad.detector import Detector, Sweep, Together, fit_together, peak_bytes, plan_together
from jaxad.driver.embedding import EmbeddingCache
from jaxad.driver.fit import score_classes
from jaxad.driver.mesh import fetch, is_first, make_mesh, mesh_shape, wait_for_all
from jaxad.driver.plan import Plan
from jaxad.driver.program import compile_seconds
from jaxad.metrics import Threshold, evaluate, oracle_threshold
from jaxad.metrics.threshold import Thresholds, pair_to_json
from jaxad.progress import Bars, say
from jaxad.report.examples import Examples, choose_examples, save_examples
from jaxad.report.pictures import overlay, save_png, save_tiff
from jaxad.report.tables import Row
from jaxad.runs import directory as rundir

RESULTS = ("metrics.json", "scores.csv", "scores.jsonl", "examples.npz")
"""What belongs to an older model as soon as a new one is there."""

UNEVEN = 2
"""The largest category of one program has at most so many times the images of the smallest: it pads the others."""

UNIFIED = "unified"
"""The category of a model for all categories."""


class FittedRuns(NamedTuple):
    """Detectors that were fitted together, with where they are."""

    detectors: Sequence[Detector]
    categories: Sequence[str]
    """Of each; "unified" for a model of all categories."""
    run_dirs: Sequence[Path]
    learned: Together
    mesh: Mesh | None


def fit_all(
    detector: Detector,
    trains: Mapping[str, Dataset],
    *,
    output: Path,
    recipe: dict[str, Any],
    seeds: int = 1,
    unified: bool = False,
    devices: int | None = 1,
    classes_per_step: int | None = None,
    checkpoint_seconds: float = 60.0,
    cache: EmbeddingCache | None = None,
    sweep: Sweep | None = None,
) -> list[FittedRuns]:
    """Fits a method to every category with every seed; all of about as many images, of one size, together.

    Args:
        detector: Says what to fit; its seed is the first.
        trains: The normal images by category.
        output: Folder of the runs; of several seeds, each has one of its own in it.
        recipe: As for `fit_runs`.
        seeds: Repetitions.
        unified: One model for all categories instead of one for each.
        devices: How many share the work; None: all of all processes.
        classes_per_step: As for `fit_runs`.
        checkpoint_seconds: As for `fit_runs`.
        cache: Embedded images shared between detectors.
        sweep: A hyper-parameter and its values; each has a folder of its own in `output`.

    Raises:
        ValueError: There are not as many devices, or the hyper-parameter cannot be swept.
    """
    if unified and len(trains) > 1:
        recipe = recipe | {"dataset": f"{next(iter(trains.values())).name} (unified)", "unified": True}
    done = []
    for own, categories, chosen, mesh in _groups(detector, trains, seeds, unified, devices, sweep):
        below = [output / (f"seed{one.seed}" if seeds > 1 else "") / one.variant for one in own]
        run_dirs = tuple(map(rundir.directory, below, own, chosen))
        options: dict[str, Any] = dict(cache=cache, checkpoint_seconds=checkpoint_seconds, sweep=sweep)
        learned = fit_runs(own, chosen, run_dirs, recipe, mesh=mesh, classes_per_step=classes_per_step, **options)
        done.append(FittedRuns(own, categories, run_dirs, learned, mesh))
    return done


def plan_all(
    detector: Detector,
    trains: Mapping[str, Dataset],
    *,
    unified: bool = False,
    devices: int | None = 1,
    classes_per_step: int | None = None,
) -> list[Plan]:
    """The memory of what `fit_all` will fit, with the same arguments; one plan for every program.

    Raises:
        ValueError: As for `fit_all`.
    """
    return [
        plan_together(own, chosen, mesh=mesh, classes_per_step=classes_per_step)
        for own, _, chosen, mesh in _groups(detector, trains, 1, unified, devices, None)
    ]


def _groups(
    detector: Detector,
    trains: Mapping[str, Dataset],
    seeds: int,
    unified: bool,
    devices: int | None,
    sweep: Sweep | None,
) -> Iterator[tuple[tuple[Detector, ...], tuple[str, ...], tuple[Dataset, ...], Mesh | None]]:
    """What is fitted in one program: detectors, their categories and images, and on which devices."""
    if devices is not None and not 1 <= devices <= jax.device_count():
        raise ValueError(f"devices must be within 1..{jax.device_count()} (those that JAX sees here), got {devices}")
    if unified and len(trains) > 1:
        trains = {UNIFIED: unite(list(trains.values()), UNIFIED)}
    fits = []
    variants = [detector.varied(sweep.name, value) for value in sweep.values] if sweep else [detector]
    for seed, (category, train), variant in itertools.product(range(seeds), trains.items(), variants):
        own = copy.copy(variant)
        own.seed = detector.seed + seed
        fits.append((own, category, train))
    leaders: dict[str, str] = {}
    leader = ""
    for category, train in sorted(trains.items(), key=lambda item: (item[1].image_size, len(item[1]))):
        first = trains.get(leader, train)
        if not leader or train.image_size != first.image_size or len(train) > UNEVEN * len(first):
            leader = category
        leaders[category] = leader
    for leader in dict.fromkeys(leaders[category] for category in trains):
        own, categories, chosen = zip(*(fit for fit in fits if leaders[fit[1]] == leader), strict=True)
        mesh = None
        if devices != 1:
            mesh = make_mesh(shape=mesh_shape(devices or jax.device_count(), len(own)))
        yield own, categories, chosen, mesh


def evaluate_fitted(
    fitted: FittedRuns, opened: Mapping[str, Split], *, source: str, cache: EmbeddingCache | None = None
) -> dict[Path, Row]:
    """Evaluates what `fit_all` fitted on the test images of each category; arguments as for `evaluate_runs`."""
    options: dict[str, Any] = dict(source=source, mesh=fitted.mesh, cache=cache)
    if UNIFIED in fitted.categories and UNIFIED not in opened:
        each = zip(fitted.detectors, fitted.run_dirs, strict=True)
        parts = [evaluate_unified(detector, opened, run_dir, **options) for detector, run_dir in each]
        return {run_dir: row for part in parts for run_dir, row in part.items()}
    tests = [opened[category].test for category in fitted.categories]
    options |= dict(learned=fitted.learned)
    rows = evaluate_runs(fitted.detectors, [test for test in tests if test], fitted.run_dirs, **options)
    return dict(zip(fitted.run_dirs, rows, strict=False))  # no rows but in the first process


def evaluate_unified(detector: Detector, opened: Mapping[str, Split], run_dir: Path, **options: Any) -> dict[Path, Row]:
    """Evaluates one model for all categories on each of them, in a folder of its own; options of `evaluate_runs`."""
    rows = {}
    for category, split in opened.items():
        assert split.test is not None
        below = run_dir / rundir.segment(category)
        if is_first():
            files.write_json(below / "recipe.json", rundir.read_recipe(run_dir) | {"category": category})
        for row in evaluate_runs([detector], [split.test], [below], **options):
            rows[below] = row
    return rows


def fit_runs(
    detectors: Sequence[Detector],
    trains: Sequence[Dataset],
    run_dirs: Sequence[Path],
    recipe: dict[str, Any],
    *,
    mesh: Mesh | None = None,
    classes_per_step: int | None = None,
    checkpoint_seconds: float = 60.0,
    cache: EmbeddingCache | None = None,
    sweep: Sweep | None = None,
) -> Together:
    """Fits detectors to a category each, all in one program, and writes their run directories.

    A run that was killed leaves `checkpoint/` behind, in the folder that the run directories have in common: the same
    settings on the same data resume it, others delete it. Of several processes, the first one writes.

    Args:
        detectors: Fitted in place; they differ in their seeds at most.
        trains: The normal images for each.
        run_dirs: Created where missing; an older run in one is replaced.
        recipe: What the caller knows of the runs: source, mask_threshold, command.
        mesh: As for `jaxad.fit.fit_classes`.
        classes_per_step: As for `jaxad.fit.fit_classes`.
        checkpoint_seconds: Least time between two checkpoints.
        cache: Embedded images shared between detectors.
        sweep: As for `jaxad.detector.fit_together`.

    Returns:
        What `jaxad.detector.fit_together` returns.
    """
    together = run_dirs[0] if len(run_dirs) == 1 else Path(os.path.commonpath(run_dirs))
    folders = dict.fromkeys(folder for run_dir in (*run_dirs, together) for folder in (run_dir, *run_dir.parents))
    made = sorted((folder for folder in folders if not folder.exists()), key=lambda path: -len(path.parts))
    checkpoint, title = together / "checkpoint", _title(detectors[0], trains)
    with contextlib.ExitStack() as stack:
        if is_first():
            for run_dir in run_dirs:
                run_dir.mkdir(parents=True, exist_ok=True)
            for folder in dict.fromkeys((together, *run_dirs)):
                stack.enter_context(rundir.alone(folder))
                for abandoned in folder.glob(".*.tmp"):
                    abandoned.unlink()
        try:
            if is_first():
                rundir.resume(checkpoint, rundir.fingerprint(detectors, trains))
            wait_for_all("resume")
            with Bars(title) as bars:
                learned = fit_together(
                    detectors,
                    trains,
                    mesh=mesh,
                    classes_per_step=classes_per_step,
                    cache=cache,
                    checkpoint_dir=checkpoint / "state",
                    checkpoint_seconds=checkpoint_seconds,
                    progress=bars,
                    sweep=sweep,
                )
            shared = {
                "shared_features": cache is not None,  # then the seconds leave out what another method paid for
                "fitted_together": len(detectors),
                "devices": mesh.size if mesh else 1,
            }
            for i, (detector, train) in enumerate(zip(detectors, trains, strict=True)):
                model = fetch(detector.state)
                if is_first():
                    detector.save(checkpoint / f"model{i}", model)
                    written = rundir.recipe(detector, train) | shared | recipe
                    files.write_json(checkpoint / f"model{i}" / "recipe.json", written)
        except BaseException:
            if is_first() and not rundir.saved(checkpoint):
                shutil.rmtree(checkpoint, ignore_errors=True)
                files.remove_empty(made)
            raise
        if is_first():
            for i, run_dir in enumerate(run_dirs):
                for name in ("model.json", *RESULTS):
                    (run_dir / name).unlink(missing_ok=True)
                for name in ("recipe.json", "threshold.json", "model.safetensors", "model.json"):
                    os.replace(checkpoint / f"model{i}" / name, run_dir / name)
            shutil.rmtree(checkpoint)
    wait_for_all("fitted")
    first, n = detectors[0], sum(detector.n_train for detector in detectors)
    seconds = {name: sum(detector.seconds[name] for detector in detectors) for name in ("fit", "compile")}
    told = f"{n} images in {seconds['fit']:.1f} s + {seconds['compile']:.1f} s compiling"
    held, threshold = sum(d.n_heldout for d in detectors), first.image_threshold
    if threshold:
        told += f", {'threshold' if len(detectors) == 1 else 'thresholds'} from {held} others"
        guaranteed = max(d.image_threshold.guaranteed_fpr for d in detectors if d.image_threshold)
        told += f": at most {guaranteed:.0%} false alarms"
    say(f"{title}: {told}")
    return learned


def evaluate_runs(
    detectors: Sequence[Detector],
    tests: Sequence[Dataset],
    run_dirs: Sequence[Path],
    *,
    source: str,
    learned: Together | None = None,
    oracle: bool = False,
    mesh: Mesh | None = None,
    cache: EmbeddingCache | None = None,
) -> list[Row]:
    """Scores labeled test images and writes metrics, scores and the report's examples into the run directories.

    Pixel metrics are those of the preprocessed images and masks. They are exact, so the heat maps of all test images
    are in memory at once (0.2 MB an image of 224 x 224).

    Args:
        detectors: Fitted.
        tests: Images with labels for each; those without count in no metric.
        run_dirs: Where the results go, beside the saved detectors.
        source: What `tests` were read from.
        learned: Of several detectors what `fit_runs` returned: one program scores them all.
        oracle: Choose the thresholds on these very images, for this evaluation alone, and mark them so.
        mesh: As for `jaxad.fit.score_classes`.
        cache: Embedded images shared between detectors.

    Raises:
        ValueError: A category has no image with a label.
    """
    for test in tests:
        if not (test.labels >= 0).any():
            raise ValueError(f"evaluation needs labels, got none in {source}: `jaxad score` scores without")
    first, started, compiled = detectors[0], time.perf_counter(), compile_seconds()
    scores = [np.empty(len(test)) for test in tests]
    maps: list[np.ndarray | None] = [None] * len(tests)
    with Bars(_title(first, tests)) as bars:
        if len(detectors) == 1:
            stream = ((0, *part) for part in first.score(tests[0], mesh=mesh, cache=cache, progress=bars))
        else:
            options: dict[str, Any] = dict(batch_size=first.batch_size, mesh=mesh, cache=cache, progress=bars)
            assert learned is not None
            options |= dict(classes_per_step=learned.classes_per_step)
            stream = score_classes(learned.method, learned.state, first.load_frozen(), tests, **options)
        for i, part, found in stream:
            scores[i][part] = found.image
            if found.pixel is not None:
                if (heat := maps[i]) is None:
                    heat = maps[i] = np.empty((len(tests[i]), *tests[i].image_size), np.float32)
                heat[part] = found.pixel
    compiled = compile_seconds() - compiled
    spent = time.perf_counter() - started - compiled
    seconds = {"score_compile": compiled / len(tests), "score_per_image": spent / sum(map(len, tests))}
    if not is_first():
        return []
    given = zip(detectors, tests, run_dirs, scores, maps, strict=True)
    return [_evaluate(*one, source=source, oracle=oracle, seconds=seconds) for one in given]


def _evaluate(
    detector: Detector,
    test: Dataset,
    run_dir: Path,
    scores: np.ndarray,
    maps: np.ndarray | None,
    *,
    source: str,
    oracle: bool,
    seconds: dict[str, float],
) -> Row:
    """Measures one category and writes what came out."""
    labels, known = test.labels, test.labels >= 0
    masks = None if maps is None else test.masks(range(len(test)))
    heat, truth = (None if pixel is None else pixel[known] for pixel in (maps, masks))
    measured = evaluate(scores[known], labels[known], heat, truth)

    (run_dir / "metrics.json").unlink(missing_ok=True)
    image_threshold, chosen_here = detector.image_threshold, None
    if oracle:
        image_threshold = oracle_threshold(scores[known], labels[known])
        pixel_threshold = None if heat is None or truth is None else oracle_threshold(heat, truth)
        chosen_here = pair_to_json(Thresholds(image_threshold, pixel_threshold))
    with score_files(run_dir, image_threshold) as write:
        for one in zip(test.paths, labels.tolist(), test.defects, scores.tolist(), strict=True):
            write(*one)
    chosen = choose_examples(scores, labels, image_threshold.value if image_threshold else None)
    limits = detector.color_limits()
    if limits is None and maps is not None:
        limits = float(np.median(maps)), float(maps.max())
    examples = Examples(
        image=test.images(chosen),
        path=[test.paths[i] for i in chosen],
        label=labels[chosen],
        score=scores[chosen],
        mask=None if masks is None else masks[chosen],
        map=None if maps is None else maps[chosen],
        limits=limits,
    )
    save_examples(run_dir, examples)
    recipe = rundir.read_recipe(run_dir) or rundir.recipe(detector, test) | {"source": source}
    recipe["seconds"] |= seconds
    recipe |= {
        "images_per_second": 1 / seconds["score_per_image"],
        "peak_bytes": max(recipe["peak_bytes"], peak_bytes()),
    }
    files.write_json(run_dir / "recipe.json", recipe)
    metrics = {
        "metrics": measured.values,
        "reasons": measured.reasons,
        "n_test": int(known.sum()),
        "n_anomalous": int((labels == 1).sum()),
        "oracle": oracle,
        "thresholds": chosen_here,
        "source": source,
    }
    files.write_json(run_dir / "metrics.json", metrics)
    name = f"{detector.method_name} {detector.variant}".rstrip()
    about = (name, recipe["dataset"], recipe["category"])
    return Row(*about, measured.values, measured.reasons, detector.seed)


def score_run(
    detector: Detector,
    data: Dataset,
    output: Path,
    *,
    root: Path | None,
    labeled: bool,
    overlays: bool = False,
    maps: bool = False,
) -> int:
    """Scores images one batch after the other; memory does not grow with their number.

    Args:
        detector: Fitted.
        data: The images.
        output: Receives scores.csv and scores.jsonl; overlays/ and maps/ where asked for, in the images' own tree.
        root: The folder that this tree is relative to; None where the images are no files.
        labeled: Whether the labels of `data` are real; else they are left empty.
        overlays: Write PNGs of the images with the heat map over them, in colors that mean the same in every image.
        maps: Write the raw heat maps at the original resolution as float32 TIFFs.

    Returns:
        The number of images above the threshold; 0 without one.

    Raises:
        ValueError: The method gives no heat maps, or there is nothing to take the colors from.
    """
    limits = detector.color_limits()
    names = tree(data, root)

    def draw(job: tuple[int, np.ndarray]) -> None:
        i, heat = job
        heat = to_original(heat, data.original_size(i), data.preprocess)
        if maps:
            save_tiff(stage / "maps" / f"{names[i]}.tiff", heat)
        if overlays and limits is not None:
            save_png(stage / "overlays" / f"{names[i]}.png", overlay(data.original(i), heat, *limits))

    anomalous = 0
    with (
        files.staging(output) as stage,
        score_files(stage, detector.image_threshold) as write,
        Bars(_title(detector, [data])) as bars,
    ):
        for part, found in detector.score(data, progress=bars):
            if overlays or maps:
                if found.pixel is None:
                    raise ValueError(
                        f"overlays and maps need a method with heat maps, got {detector.method_name}: leave them out"
                    )
                if overlays and limits is None:
                    raise ValueError(
                        "overlays take their colors from held-out images, got a model without: fit with holdout > 0"
                    )
                in_threads(draw, zip(part.tolist(), found.pixel, strict=True))
            for i, score in zip(part.tolist(), found.image.tolist(), strict=True):
                label, defect = (int(data.labels[i]), data.defects[i]) if labeled else (-1, "")
                anomalous += bool(write(data.paths[i], label, defect, score))
    return anomalous


def tree(data: Dataset, root: Path | None) -> list[str]:
    """Where each image's pictures go: its path from `root`, without the ending where that is still unique.

    An image outside of `root` takes its whole path.
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
def score_files(folder: Path, threshold: Threshold | None) -> Iterator[Callable[[str, int, str, float], bool | None]]:
    """Writes scores.csv and scores.jsonl row by row; they appear when the block ends well.

    Yields:
        write(path, label, defect, score) -> the prediction: whether the score is above the threshold, None without one.
        An unknown label is -1, and empty (null) in the files.
    """
    encoding: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape"}
    with (
        files.replacing(folder / "scores.csv") as csv_path,
        files.replacing(folder / "scores.jsonl") as jsonl_path,
        csv_path.open("w", newline="", **encoding) as csv_file,
        jsonl_path.open("w", **encoding) as jsonl_file,
    ):
        fields = ("path", "label", "defect", "score", "prediction")
        table = csv.writer(csv_file)
        table.writerow(fields)

        def write(path: str, label: int, defect: str, score: float) -> bool | None:
            prediction = None if threshold is None else score > threshold.value
            flag = None if prediction is None else int(prediction)
            row = (path, None if label < 0 else label, defect or None, score, flag)
            table.writerow(row)
            jsonl_file.write(json.dumps(dict(zip(fields, row, strict=True))) + "\n")
            return prediction

        yield write


def shared_caches(detectors: Sequence[Detector]) -> list[EmbeddingCache | None]:
    """For each detector: the cache of all whose frozen part is the same function, None for a loner."""
    embeds = [detector.method.embed for detector in detectors]
    storage = detectors[0].storage
    caches = {embed: EmbeddingCache(storage) for embed in embeds if embeds.count(embed) > 1}
    return [caches.get(embed) for embed in embeds]


def open_split(
    source: str,
    detector: Detector,
    *,
    asked: str | None,
    fitted: str | None,
    mask_threshold: int = 0,
    any_folder: bool = False,
) -> Split:
    """One category of a source: the one asked for, or the only one, or the one that the run was fitted on.

    Args:
        source: As for `open_data`.
        detector: Says how images are preprocessed.
        asked: A category, or None.
        fitted: The category of the run, or None.
        mask_threshold: A mask pixel counts where it is above.
        any_folder: A folder in no known layout may hold normal and anomalous images.

    Raises:
        ValueError: There are several and none of the two names is among them; and all of `open_data`.
    """
    folder = any_folder and Path(source).is_dir()
    layout = recognize(Path(source)) if folder else "auto"
    options: dict[str, Any] = {"preprocess": detector.preprocess, "mask_threshold": mask_threshold, "layout": layout}
    opened = open_data(source, category=asked, **options)
    if len(opened) == 1:
        return next(iter(opened.values()))
    if fitted is None or fitted not in opened:
        raise ValueError(f"{source} has several categories: choose one with --category: {', '.join(opened)}")
    return opened[fitted]


def _title(detector: Detector, datasets: Sequence[Dataset]) -> str:
    categories = dict.fromkeys(data.category for data in datasets)
    which = next(iter(categories)) if len(categories) == 1 else f"{len(categories)} categories"
    return f"{detector.method_name} {datasets[0].name}/{which}"
