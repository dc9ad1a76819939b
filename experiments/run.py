"""Runs recipes and writes experiments/results/<recipe>.json; only benchmarks and studies write there besides.

    python -m experiments.run patchcore_mtd --data MTD_FOLDER --weights resnet50.caffe_in1k.safetensors

Several recipes run in one process each, so that the peak memory is that of one recipe. The seconds are those of the
first seed, since later seeds find the features in the cache; `cpu_` seconds are those of the CPU, which other processes
on the machine change little. No seconds but `compile` contain compilation. With `--checkpoints`, a run that was killed
resumes when it is started again, unless the code has changed; the seconds are then those of the first seed that ran
without a break. `--smoke` runs a recipe in seconds, on a few small images of the demo data with random weights, as the
tests do; give it another `--results`.
"""

import contextlib
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

import jaxad
import jaxad.backbones
from experiments.command import RESULTS, ROOT, origin, progress, start
from experiments.opening import grouped, settings_of, smoke_photographs, split_by_part, weights_of
from experiments.provenance import code_hash
from experiments.recipes import Recipe, all_recipes
from jaxad.data import Dataset, Split, open_data
from jaxad.driver.embedding import EmbeddingCache
from jaxad.driver.execution import Checkpoint, Execution
from jaxad.driver.memory import peak_bytes
from jaxad.driver.program import compile_seconds, cpu_seconds
from jaxad.driver.scoring import embed_all
from jaxad.files import read_json, write_json
from jaxad.metrics import evaluate
from jaxad.runs import directory


@dataclass
class Options:
    """Run recipes."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Names of recipes; see experiments/recipes/."""
    data: str = "demo"
    """The data set: a folder, or whatever `jaxad fit` takes."""
    weights: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """The weights, one file for each backbone; none: those of `jaxad weights fetch`, or the embedded ones."""
    auxiliary: Path | None = None
    """A folder of photographs of other things, for recipes that ask for one."""
    results: Path = RESULTS
    checkpoints: Path | None = None
    """Where progress is kept until the recipe is done; None: nowhere."""
    smoke: bool = False
    """A few small demo images, random weights and one epoch."""


def run(name: str, recipe: Recipe, options: Options) -> None:
    """Runs a recipe on all categories with all seeds, and writes its result.

    Raises:
        ValueError: A category has no test images.
    """
    checkpoints = options.checkpoints and options.checkpoints / name
    code = code_hash(recipe.method, recipe.backbone)
    with smoke_photographs(recipe.method) if options.smoke else contextlib.nullcontext(options.auxiliary) as auxiliary:
        measured = measure_all(name, recipe, options, auxiliary, checkpoints and checkpoints / code)
    categories = {category: summary(parts) for category, parts in measured.items()}
    means = {k: float(np.mean([c["metrics"][k]["mean"] for c in categories.values()])) for k in shared(categories)}
    stds = {k: float(np.mean([c["metrics"][k]["std"] for c in categories.values()])) for k in means}
    unbroken = [next((part["seconds"] for part in parts if part["seconds"]), None) for parts in measured.values()]
    seconds = [entry for entry in unbroken if entry]
    record = {
        "recipe": name,
        "method": recipe.method,
        "code": code,
        "dataset": recipe.dataset,
        "category": next(iter(categories)) if len(categories) == 1 else None,
        "backbone": recipe.backbone,
        "weights": sha256_of_weights(recipe, options),
        "hyperparameters": dict(recipe.hyperparameters),
        "image_size": 64 if options.smoke else recipe.image_size,
        "center_crop": None if options.smoke else recipe.center_crop,
        "seeds": list(recipe.seeds),
        "metrics": {k: {"mean": means[k], "std": stds[k]} for k in means},
        "categories": categories if len(categories) > 1 else {},
        "published": dict(recipe.published),
        "n_train": sum(parts[0]["n_train"] for parts in measured.values()),
        "n_test": sum(parts[0]["n_test"] for parts in measured.values()),
        "seconds": {k: float(np.mean([entry[k] for entry in seconds])) for k in (seconds[0] if seconds else ())},
        "peak_bytes": max(part["peak_bytes"] for parts in measured.values() for part in parts),
        **origin(),
        "notes": recipe.notes,
    }
    write_json(options.results / f"{name}.json", record)
    if checkpoints:
        shutil.rmtree(checkpoints)


def measure_all(
    name: str, recipe: Recipe, options: Options, auxiliary: Path | None, checkpoints: Path | None
) -> dict[str, list[dict[str, Any]]]:
    """What `measure` returns for every seed, by category."""
    cache, by_part = EmbeddingCache(), recipe.parts is not None and not options.smoke
    frozen, splits, wholes = None, {}, {}
    measured: dict[str, list[dict[str, Any]]] = {}
    for seed in recipe.seeds:
        settings = settings_of(recipe, weights=options.weights, auxiliary=auxiliary, seed=seed, smoke=options.smoke)
        if not splits:
            source, every = ("demo", 4) if options.smoke else (options.data, 1)
            opened = open_data(source, preprocess=settings.preprocess, mask_threshold=recipe.mask_threshold)
            some = slice(None, None, every)
            splits = {c: Split(train.subset(some), test and test.subset(some)) for c, (train, test) in opened.items()}
            frozen = weights_of(settings, options.smoke)
            if by_part:
                wholes = {
                    category: grouped(split, ROOT / "data" / str(recipe.parts)) for category, split in splits.items()
                }
                embed = settings.build(settings.usual_size()).embed
                embed_all(embed, frozen, list(wholes.values()), Execution(batch_size=settings.batch_size, cache=cache))
        detector = jaxad.Detector.from_settings(settings, frozen=frozen)
        for category, split in splits.items():
            if by_part:
                split = split_by_part(wholes[category], seed)
                if not all(embedding.caches for embedding in cache.values()):
                    cache.clear()  # too large for all images, whose parts would add up
            train, test = split
            if test is None:
                raise ValueError(f"a recipe needs a test split, got none in {options.data} ({category})")
            checkpoint = checkpoints and checkpoints / f"{category}_{seed}"
            part = measure(detector, train, test, cache, checkpoint)
            measured.setdefault(category, []).append(part)
            print(name, category, f"seed {seed}", {k: round(v, 4) for k, v in part["metrics"].items()}, flush=True)
    return measured


def measure(
    detector: jaxad.Detector, train: Dataset, test: Dataset, cache: EmbeddingCache, checkpoint: Path | None = None
) -> dict[str, Any]:
    """Fits on one category, scores its test images and evaluates the scores.

    Args:
        detector: Not fitted yet.
        train: Training images of the category.
        test: Its test images.
        cache: Embedded images, shared between seeds.
        checkpoint: A folder from which a run that was killed resumes; None: it does not.
    """
    if checkpoint:
        settings = [detector.settings] * 2
        directory.resume(checkpoint, directory.fingerprint(settings, [train, test]))
        if (checkpoint / "measured.json").exists():
            return read_json(checkpoint / "measured.json")
    resumed = checkpoint is not None and directory.has_state(checkpoint)
    execution = Execution(cache=cache, progress=progress())
    kept = checkpoint and Checkpoint(checkpoint / "state")
    cpu = [cpu_seconds()]
    model = detector.fit(train, execution=execution._replace(checkpoint=kept)).model
    assert model is not None
    cpu.append(cpu_seconds())
    started, compiled = time.perf_counter(), compile_seconds()
    scores = [batch for _, batch in detector.score(test, execution)]
    compiled = compile_seconds() - compiled
    per_image = (time.perf_counter() - started - compiled) / len(test)
    cpu.append(cpu_seconds())
    maps = [batch.pixel for batch in scores if batch.pixel is not None]
    pixel = np.concatenate(maps) if maps else None
    masks = test.masks(range(len(test))) if pixel is not None else None
    report = evaluate(np.concatenate([batch.image for batch in scores]), test.labels, pixel, masks)
    seconds = {k: model.seconds[k] for k in ("compile", "fit")} | {"score_per_image": per_image}
    seconds |= {"cpu_fit": cpu[1] - cpu[0], "cpu_score_per_image": (cpu[2] - cpu[1]) / len(test)}
    measured = {
        "metrics": report.values,
        "reasons": report.reasons,
        "n_train": len(train),
        "n_test": len(test),
        "seconds": None if resumed else seconds,
        "peak_bytes": peak_bytes(),
    }
    if checkpoint:
        write_json(checkpoint / "measured.json", measured)
    return measured


def sha256_of_weights(recipe: Recipe, options: Options) -> str | list[str | None] | None:
    """The sha256 of the backbone's weights, or of each one's if there are several; None where there are none."""
    if recipe.backbone is None or options.smoke:
        return None
    names = (recipe.backbone,) if isinstance(recipe.backbone, str) else recipe.backbone
    files = options.weights or (None,) * len(names)
    digests = [jaxad.backbones.source(name, file).get("sha256") for name, file in zip(names, files, strict=True)]
    return digests[0] if len(digests) == 1 else digests


def summary(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of every metric over the seeds."""
    metrics = {k: np.array([p["metrics"][k] for p in parts], float) for k in parts[0]["metrics"]}
    values = {k: {"mean": float(v.mean()), "std": float(v.std())} for k, v in metrics.items() if not np.isnan(v).any()}
    return {"metrics": values, "reasons": parts[0]["reasons"]}


def shared(categories: dict[str, Any]) -> list[str]:
    """The metrics that every category has."""
    first = next(iter(categories.values()))["metrics"]
    return [k for k in first if all(k in c["metrics"] for c in categories.values())]


def main(options: Options) -> None:
    """Runs the recipes; several of them in one process each."""
    recipes = all_recipes()
    unknown = [name for name in options.names if name not in recipes]
    if unknown or not options.names:
        raise ValueError(f"recipes are {', '.join(sorted(recipes))}; got {', '.join(unknown) or 'none'}")
    if len(options.names) == 1:
        run(options.names[0], recipes[options.names[0]], options)
        return
    arguments = [word for word in sys.argv[1:] if word not in options.names]
    for name in options.names:
        subprocess.run([sys.executable, "-m", "experiments.run", name, *arguments], check=True)


if __name__ == "__main__":
    start(main, Options)
