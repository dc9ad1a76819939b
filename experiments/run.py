"""Runs recipes and writes experiments/results/<recipe>.json; nothing else writes there but the benchmarks.

    python experiments/run.py patchcore_mtd --data MTD_FOLDER --weights resnet50.caffe_in1k.safetensors

Every recipe runs in a process of its own, so that its peak memory is its own, and the seconds are those of its first
seed: the others find the features cached. With `--checkpoints` a run that was killed goes on when it is called again,
and the seconds are those of the first seed that was not cut off. `--smoke` runs a recipe in seconds, on a few small
images of the demo data with random weights, and is what the tests do; give it another `--results`.
"""

import importlib
import pkgutil
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

import jaxad
import jaxad.backbones
import recipes
from command import origin, start
from jaxad.runs import directory as rundir
from jaxad.files import read_json, write_json
from jaxad.data import Dataset, open_data
from jaxad.detector import peak_bytes
from jaxad.driver.embedding import EmbeddingCache
from jaxad.metrics import evaluate
from jaxad.driver.program import compile_seconds


@dataclass
class Options:
    """Run recipes."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Recipes by name; see experiments/recipes/."""
    data: str = "demo"
    """The data set: a folder, or whatever `jaxad fit` takes."""
    weights: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """The backbone's weights, once a backbone; none: those of `jaxad weights fetch`, or the embedded ones."""
    auxiliary: Path | None = None
    """A folder of photographs of other things, for recipes that say so."""
    results: Path = field(default_factory=lambda: Path(__file__).parent / "results")
    checkpoints: Path | None = None
    """Where progress is kept until the recipe is done; None: nowhere."""
    smoke: bool = False
    """A few small demo images and random weights."""


def all_recipes() -> dict[str, recipes.Recipe]:
    """Every recipe of every file in experiments/recipes."""
    found: dict[str, recipes.Recipe] = {}
    for module in pkgutil.iter_modules(recipes.__path__):
        found |= importlib.import_module(f"recipes.{module.name}").RECIPES
    return found


def run(name: str, recipe: recipes.Recipe, options: Options) -> None:
    """Runs one recipe on all categories and seeds, and writes its result."""
    cache = EmbeddingCache()
    kept = options.checkpoints and options.checkpoints / name
    frozen: Any = None
    preprocess = dict(image_size=recipe.image_size, center_crop=recipe.center_crop)
    if options.smoke:
        preprocess = dict(image_size=64, center_crop=None)
    entries: dict[str, Any] = {}
    for seed in recipe.seeds:
        detector = jaxad.Detector(
            recipe.method,
            backbone=recipe.smoke_backbone if options.smoke else recipe.backbone,
            weights=() if options.smoke else options.weights,
            auxiliary=None if options.smoke else options.auxiliary,
            holdout=0,
            seed=seed,
            **preprocess,
            **recipe.hyperparameters,
        )
        if frozen is None:
            source = "demo" if options.smoke else options.data
            splits = open_data(source, preprocess=detector.preprocess, mask_threshold=recipe.mask_threshold)
            few = slice(None, None, 4 if options.smoke else 1)
            opened = {c: [part and part.subset(few) for part in split] for c, split in splits.items()}
            frozen = random_weights(recipe, splits) if options.smoke else detector.load_frozen(learning=True)
        detector.frozen = frozen
        for category, (train, test) in opened.items():
            assert train is not None
            if test is None:
                raise ValueError(f"a recipe needs a test split, got none in {options.data} ({category})")
            part = measure(detector, train, test, cache, kept and kept / f"{category}_{seed}")
            entries.setdefault(category, []).append(part)
            print(name, category, f"seed {seed}", {k: round(v, 4) for k, v in part["metrics"].items()}, flush=True)
    categories = {category: summary(parts) for category, parts in entries.items()}
    means = {k: float(np.mean([c["metrics"][k]["mean"] for c in categories.values()])) for k in evaluated(categories)}
    stds = {k: float(np.mean([c["metrics"][k]["std"] for c in categories.values()])) for k in means}
    whole = [next((part["seconds"] for part in parts if part["seconds"]), None) for parts in entries.values()]
    timed = [seconds for seconds in whole if seconds]
    record = {
        "recipe": name,
        "method": recipe.method,
        "dataset": recipe.dataset,
        "category": next(iter(categories)) if len(categories) == 1 else None,
        "backbone": recipe.backbone,
        "weights": sha256_of_weights(recipe, options),
        "hyperparameters": dict(recipe.hyperparameters),
        "image_size": preprocess["image_size"],
        "center_crop": preprocess["center_crop"],
        "seeds": list(recipe.seeds),
        "metrics": {k: {"mean": means[k], "std": stds[k]} for k in means},
        "categories": categories if len(categories) > 1 else {},
        "published": dict(recipe.published),
        "n_train": sum(p[0]["n_train"] for p in entries.values()),
        "n_test": sum(p[0]["n_test"] for p in entries.values()),
        "seconds": {k: float(np.mean([seconds[k] for seconds in timed])) for k in (timed[0] if timed else ())},
        "peak_bytes": max(part["peak_bytes"] for parts in entries.values() for part in parts),
        **origin(),
        "notes": recipe.notes,
    }
    write_json(options.results / f"{name}.json", record)
    if kept:
        shutil.rmtree(kept)


def sha256_of_weights(recipe: recipes.Recipe, options: Options) -> str | list[str | None] | None:
    """Of the backbone's, of each one's if there are several; None where there are none."""
    if recipe.backbone is None or options.smoke:
        return None
    names = (recipe.backbone,) if isinstance(recipe.backbone, str) else recipe.backbone
    files = options.weights or (None,) * len(names)
    found = [jaxad.backbones.source(name, file).get("sha256") for name, file in zip(names, files, strict=True)]
    return found[0] if len(found) == 1 else found


def random_weights(recipe: recipes.Recipe, splits: dict[str, Any]) -> Any:
    """A small backbone's, and a few images as auxiliary ones."""
    images = next(iter(splits.values())).train.images(range(4))
    return jaxad.backbones.backbone(recipe.smoke_backbone).init(jax.random.key(0)) | {"auxiliary": images}


def measure(
    detector: jaxad.Detector, train: Dataset, test: Dataset, cache: EmbeddingCache, kept: Path | None = None
) -> dict[str, Any]:
    """Fits on one category, scores its test set and evaluates; goes on from where it was cut off."""
    if kept:
        rundir.resume(kept, rundir.fingerprint([detector, detector], [train, test]))
        if (kept / "measured.json").exists():
            return read_json(kept / "measured.json")
    resumed = kept is not None and rundir.saved(kept)
    detector.fit(train, cache=cache, checkpoint_dir=kept and kept / "state", progress=progress())
    started, compiled = time.perf_counter(), compile_seconds()
    parts = [scores for _, scores in detector.score(test, cache=cache, progress=progress())]
    compiled = compile_seconds() - compiled
    per_image = (time.perf_counter() - started - compiled) / len(test)
    maps = [s.pixel for s in parts if s.pixel is not None]
    pixel = np.concatenate(maps) if maps else None
    masks = test.masks(range(len(test))) if pixel is not None else None
    report = evaluate(np.concatenate([s.image for s in parts]), test.labels, pixel, masks)
    seconds = {k: detector.seconds[k] for k in ("compile", "fit")} | {"score_per_image": per_image}
    measured = {
        "metrics": report.values,
        "reasons": report.reasons,
        "n_train": len(train),
        "n_test": len(test),
        "seconds": None if resumed else seconds,
        "peak_bytes": peak_bytes(),
    }
    if kept:
        write_json(kept / "measured.json", measured)
    return measured


def summary(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds."""
    metrics = {k: np.array([p["metrics"][k] for p in parts], float) for k in parts[0]["metrics"]}
    values = {k: {"mean": float(v.mean()), "std": float(v.std())} for k, v in metrics.items() if not np.isnan(v).any()}
    return {"metrics": values, "reasons": parts[0]["reasons"]}


def evaluated(categories: dict[str, Any]) -> list[str]:
    """The metrics that every category has."""
    first = next(iter(categories.values()))["metrics"]
    return [k for k in first if all(k in c["metrics"] for c in categories.values())]


def progress(unit: str = "images") -> Callable[[str, int, int], None]:
    """Shows one line, rewritten, with the rate and the time left of the part under way."""
    part, started = "", 0.0

    def show(what: str, done: int, total: int) -> None:
        nonlocal part, started
        if what != part:
            part, started = what, time.perf_counter()
        rate = done / (time.perf_counter() - started)
        left = f", {rate:.0f}/s, {(total - done) / rate:.0f} s left  " if done else ""
        end = "\n" if done == total else ""
        print(f"\r{what} {done}/{total} {unit}{left}", end=end, file=sys.stderr, flush=True)

    return show


def main(options: Options) -> None:
    """Runs every recipe asked for."""
    known = all_recipes()
    unknown = [name for name in options.names if name not in known]
    if unknown or not options.names:
        raise ValueError(f"recipes are {', '.join(sorted(known))}; got {', '.join(unknown) or 'none'}")
    if len(options.names) == 1:
        run(options.names[0], known[options.names[0]], options)
        return
    others = [word for word in sys.argv[1:] if word not in options.names]
    for name in options.names:
        subprocess.run([sys.executable, sys.argv[0], name, *others], check=True)


if __name__ == "__main__":
    start(main, Options)
