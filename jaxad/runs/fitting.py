"""Runs: models of all categories and seeds, fitted in few programs and written into their directories.

`runs/<method>/<dataset>/<category>/` holds model.safetensors and model.json, threshold.json, recipe.json and, once
evaluated, metrics.json, scores.csv, scores.jsonl and examples.npz. Every file appears whole or not at all; model.json
comes last of a fit and metrics.json last of an evaluation.
"""

import contextlib
import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxad import files
from jaxad.base import Frozen
from jaxad.data import Dataset
from jaxad.data.dataset import unite
from jaxad.detector import Detector
from jaxad.driver.embedding import EmbeddingCache
from jaxad.driver.execution import Checkpoint, Execution
from jaxad.driver.mesh import fetch, is_first, make_mesh, mesh_shape, wait_for_all
from jaxad.driver.plan import Plan
from jaxad.interruption import undoing, whole
from jaxad.learning import Learned, Model, Sweep, leakage, learn, load_photographs, plan
from jaxad.metrics.guarantees import shortfall, statement
from jaxad.progress import Bars, say
from jaxad.report.runs import write_recipe
from jaxad.runs import directory
from jaxad.settings import Settings

MAX_SIZE_RATIO = 2
"""The largest category of a program has at most so many times the images of the smallest, which is padded to it."""


class Job(NamedTuple):
    """One model to fit."""

    settings: Settings
    category: str
    data: Dataset
    """Its normal images."""
    variant: str = ""
    """In a sweep NAME=VALUE."""
    unified: bool = False
    """Whether it is one for all categories."""


class Assignment(NamedTuple):
    """Jobs that share a program, and where their models go."""

    jobs: Sequence[Job]
    run_dirs: Sequence[Path]


class Run(NamedTuple):
    """A fitted detector, and where it is."""

    detector: Detector
    category: str
    directory: Path
    """Where evaluations go."""
    variant: str = ""
    unified: bool = False
    model: Path | None = None
    """Where the detector is, if not in `directory`."""
    version: tuple[int, int] | None = None
    """Of the files that it was loaded from (`directory.version`)."""


class FittedGroup(NamedTuple):
    """Runs that were fitted in one program."""

    runs: Sequence[Run]
    learned: Learned
    execution: Execution


def assign(
    settings: Settings,
    trains: Mapping[str, Dataset],
    *,
    output: Path,
    source: str | None = None,
    seeds: int = 1,
    unified: bool = False,
    sweep: Sweep | None = None,
    overwrite: bool = False,
) -> list[Assignment]:
    """What `fit_all` fits, before any work begins.

    Args:
        settings: What to fit; their seed is the first.
        trains: The normal images by category; those of similar numbers of images share a program.
        output: Folder of the runs; of several seeds, each has one of its own in it.
        source: What they were read from.
        seeds: Repetitions.
        unified: One model for all categories instead of one for each.
        sweep: A hyperparameter and its values; each has a folder of its own in `output`.
        overwrite: As for `fit_runs`.

    Raises:
        ValueError: A run directory holds a model of other images.
    """
    assignments = []
    for jobs in job_groups(settings, trains, seeds, unified, sweep):
        run_dirs = []
        for job in jobs:
            seed, category = f"seed{job.settings.seed}" if seeds > 1 else "", directory.segment(job.category)
            name = directory.UNIFIED if job.unified else category
            run_dirs.append(output / seed / job.variant / settings.method / directory.segment(job.data.name) / name)
            if not overwrite:
                _check_owner(job, run_dirs[-1], source)
        assignments.append(Assignment(jobs, run_dirs))
    return assignments


def _check_owner(job: Job, run_dir: Path, source: str | None) -> None:
    owner = {"source": source, "category": job.data.category}
    directory.check_owner(run_dir, ("model.json",), "recipe.json", owner)


def fit_all(
    assignments: Sequence[Assignment],
    *,
    recipe: dict[str, Any],
    frozen: Frozen,
    devices: int | None = 1,
    execution: Execution = Execution(),
    sweep: Sweep | None = None,
    overwrite: bool = False,
) -> list[FittedGroup]:
    """Fits a method to every category with every seed.

    Args:
        assignments: Of `assign`.
        recipe: As for `fit_runs`.
        frozen: As for `fit_runs`.
        devices: How many share the work; None: all of all processes.
        execution: As for `fit_runs`; its mesh follows from `devices`.
        sweep: As for `assign`.
        overwrite: As for `fit_runs`.

    Raises:
        ValueError: There are not as many devices, or the hyperparameter cannot be swept; and all of `fit_runs`.
    """
    groups = []
    for jobs, run_dirs in assignments:
        grouped = execution._replace(mesh=_mesh(devices, len(jobs)))
        options: dict[str, Any] = dict(frozen=frozen, execution=grouped, sweep=sweep, overwrite=overwrite)
        union = {"dataset": f"{jobs[0].data.name} (unified)", "unified": True} if jobs[0].unified else {}
        learned = fit_runs(jobs, run_dirs, recipe | union, **options)
        runs = [
            Run(Detector.from_settings(job.settings, model, frozen), job.category, run_dir, job.variant, job.unified)
            for job, model, run_dir in zip(jobs, learned.models, run_dirs, strict=True)
        ]
        groups.append(FittedGroup(runs, learned, grouped))
    return groups


def plan_all(
    settings: Settings,
    trains: Mapping[str, Dataset],
    *,
    frozen: Frozen,
    unified: bool = False,
    devices: int | None = 1,
    execution: Execution = Execution(),
) -> list[Plan]:
    """The memory of what `fit_all` fits; one plan for every program. Arguments as for `assign` and `fit_all`.

    Raises:
        ValueError: As for `fit_all`.
    """
    plans = []
    for jobs in job_groups(settings, trains, 1, unified, None):
        grouped, size = execution._replace(mesh=_mesh(devices, len(jobs))), jobs[0].data.image_size
        photographs = load_photographs(settings, settings.build(size), size)
        job_settings, datasets = [job.settings for job in jobs], [job.data for job in jobs]
        plans.append(plan(job_settings, datasets, grouped, frozen=frozen, auxiliary=photographs))
    return plans


def _mesh(devices: int | None, jobs: int) -> Any:
    if devices is not None and not 1 <= devices <= jax.device_count():
        raise ValueError(f"devices must be within 1..{jax.device_count()} (those that JAX sees here), got {devices}")
    return None if devices == 1 else make_mesh(shape=mesh_shape(devices or jax.device_count(), jobs))


def job_groups(
    settings: Settings, trains: Mapping[str, Dataset], seeds: int, unified: bool, sweep: Sweep | None
) -> Iterator[list[Job]]:
    """The jobs that share a program: of categories with images of one size and of similar numbers."""
    unified = unified and len(trains) > 1
    if unified:
        trains = {directory.UNIFIED: unite(list(trains.values()), directory.UNIFIED)}
    variants = [(settings, "")]
    if sweep:
        variants = [(settings.varied(sweep.name, value), f"{sweep.name}={value}") for value in sweep.values]
    jobs = [
        Job(dataclasses.replace(varied, seed=settings.seed + seed), category, train, variant, unified)
        for seed, (category, train), (varied, variant) in itertools.product(range(seeds), trains.items(), variants)
    ]
    smallest: dict[str, str] = {}
    first = ""
    for category, train in sorted(trains.items(), key=lambda item: (item[1].image_size, len(item[1]))):
        leader = trains.get(first, train)
        if not first or train.image_size != leader.image_size or len(train) > MAX_SIZE_RATIO * len(leader):
            first = category
        smallest[category] = first
    for first in dict.fromkeys(smallest[category] for category in trains):
        yield [job for job in jobs if smallest[job.category] == first]


def fit_runs(
    jobs: Sequence[Job],
    run_dirs: Sequence[Path],
    recipe: dict[str, Any],
    *,
    frozen: Frozen,
    execution: Execution = Execution(),
    sweep: Sweep | None = None,
    overwrite: bool = False,
) -> Learned:
    """Fits models to a category each, all in one program, and writes their run directories.

    A run that was killed leaves `checkpoint/` behind, in the folder that the run directories have in common: the same
    settings on the same data resume it, others delete it. Of several processes, the first one writes.

    Args:
        jobs: What to fit; their settings differ in their seeds at most, or in the value that is swept.
        run_dirs: Created where missing; an older run of the same images in one is replaced, with all that came of it.
        recipe: What the caller knows of the runs: source, mask_threshold, group_by, command.
        frozen: Pretrained weights.
        execution: How; of its checkpoint only the seconds count.
        sweep: As for `jaxad.learning.learn`.
        overwrite: Replace runs of other images, too.

    Raises:
        ValueError: Another process is fitting into one of the directories, or one holds a model of other images; and
            all of `learn`.
    """
    settings, datasets = [job.settings for job in jobs], [job.data for job in jobs]
    common = run_dirs[0] if len(run_dirs) == 1 else Path(os.path.commonpath(run_dirs))
    checkpoint, name, size = common / "checkpoint", title(settings[0], datasets), datasets[0].image_size
    seconds = execution.checkpoint.seconds if execution.checkpoint else Checkpoint("").seconds
    signs: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        if is_first():
            stack.enter_context(_claimed(jobs, run_dirs, common, recipe.get("source"), overwrite))
        with undoing(lambda: _abandon(checkpoint)):
            if is_first():
                mark = directory.fingerprint(settings, datasets)
                directory.resume(checkpoint, mark, recipe.get("source"), overwrite)
                signs = {job.category: warning for job in jobs if (warning := leakage(job.settings, job.data))}
                if signs:
                    say(f"{name}: warning: {', '.join(signs)}: {next(iter(signs.values()))}")
                if any(data.ignores for data in datasets):
                    shares = [
                        0.0 if (pixels := data.ignored(range(len(data)))) is None else pixels.mean()
                        for data in datasets
                    ]
                    say(f"{name}: {sum(shares) / len(shares):.1%} of the pixels are ignored")
            wait_for_all("resume")
            with Bars(name) as bars:
                photographs = load_photographs(settings[0], settings[0].build(size), size)
                checkpointed = execution._replace(checkpoint=Checkpoint(checkpoint / "state", seconds), progress=bars)
                options: dict[str, Any] = dict(frozen=frozen, auxiliary=photographs, sweep=sweep)
                learned = learn(settings, datasets, checkpointed, **options)
            shared = {
                "shared_features": execution.cache is not None,  # then another method's seconds have them
                "fitted_together": len(jobs),
                "devices": execution.mesh.size if execution.mesh else 1,
            }
            for i, (job, model) in enumerate(zip(jobs, learned.models, strict=True)):
                state = fetch(model.state)
                if is_first():
                    Detector.from_settings(job.settings, model, frozen).save(checkpoint / f"model{i}", state)
                    written = directory.recipe(job.settings, model, job.data) | shared | recipe
                    written["warning"] = signs.get(job.category)
                    write_recipe(checkpoint / f"model{i}", written)
        if is_first():
            with whole():
                _publish(checkpoint, run_dirs)
    wait_for_all("fitted")
    for line in _summary(learned.models):
        say(f"{name}: {line}")
    return learned


@contextlib.contextmanager
def _claimed(
    jobs: Sequence[Job], run_dirs: Sequence[Path], common: Path, source: str | None, overwrite: bool
) -> Iterator[None]:
    """Makes the run directories, keeps them for this process, and deletes those that stay empty."""
    created = {folder for run_dir in (*run_dirs, common) for folder in files.missing_folders(run_dir)}
    for run_dir in run_dirs:
        run_dir.mkdir(parents=True, exist_ok=True)
    if len({(status.st_dev, status.st_ino) for status in map(os.stat, run_dirs)}) < len(run_dirs):
        names = ", ".join(dict.fromkeys(job.category for job in jobs))
        raise ValueError(
            f"each category needs a folder of its own, but two of {names} have the same one in {common}: fit them one "
            "by one (--category), each with another --output"
        )
    innermost = sorted(created, key=lambda path: -len(path.parts))
    with contextlib.ExitStack() as stack:
        for folder in dict.fromkeys((common, *run_dirs)):
            stack.enter_context(directory.locked(folder))
        stack.enter_context(undoing(lambda: files.remove_empty(innermost)))
        for folder in (common, *run_dirs):
            files.remove_abandoned(folder)
        for job, run_dir in zip(jobs, run_dirs, strict=True):
            if not overwrite:
                _check_owner(job, run_dir, source)
        yield


def _abandon(checkpoint: Path) -> None:
    """Deletes the checkpoint of a fit that ends early, unless it can be resumed."""
    if is_first() and not directory.has_state(checkpoint):
        shutil.rmtree(checkpoint, ignore_errors=True)


def _publish(checkpoint: Path, run_dirs: Sequence[Path]) -> None:
    """Moves the finished models into their run directories."""
    for i, run_dir in enumerate(run_dirs):
        (run_dir / "model.json").unlink(missing_ok=True)
        directory.forget_results(run_dir)
        for name in ("recipe.json", "threshold.json", "model.safetensors", "model.json"):
            os.replace(checkpoint / f"model{i}" / name, run_dir / name)
    shutil.rmtree(checkpoint)


def _summary(models: Sequence[Model]) -> Iterator[str]:
    """What was fitted, what is known of the thresholds, and what the weakest of them lacks: a line each."""
    n, held_out = sum(model.n_train for model in models), sum(model.n_heldout for model in models)
    fit, compile = (sum(model.seconds[part] for model in models) for part in ("fit", "compile"))
    yield f"{n} images in {fit:.1f} s + {compile:.1f} s compiling"
    thresholds = [model.image_threshold for model in models if model.image_threshold]
    if thresholds:
        weakest = max(thresholds, key=lambda threshold: (threshold.guaranteed_fpr, -threshold.n_groups))
        noun = "threshold" if len(models) == 1 else "thresholds"
        groups = sum(threshold.n_groups for threshold in thresholds)
        of_groups = f" of {groups} group{'s' * (groups > 1)}" if groups < held_out else ""
        yield f"{noun} from {held_out} held-out images{of_groups}: {statement(weakest)}"
        if lacking := shortfall(weakest):
            yield lacking


def shared_caches(members: Sequence[Settings]) -> list[EmbeddingCache | None]:
    """For every member the cache of all whose methods share `embed`; None for a method that shares it with no other."""
    embeds = [settings.build(settings.usual_size()).embed for settings in members]
    caches = {embed: EmbeddingCache(members[0].storage) for embed in embeds if embeds.count(embed) > 1}
    return [caches.get(embed) for embed in embeds]


def title(settings: Settings, datasets: Sequence[Dataset]) -> str:
    """What a progress bar is called."""
    categories = dict.fromkeys(data.category for data in datasets)
    label = next(iter(categories)) if len(categories) == 1 else f"{len(categories)} categories"
    return f"{settings.method} {datasets[0].name}/{label}"
