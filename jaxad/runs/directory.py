"""Where runs lie, and what they tell about themselves; one fit at a time in each."""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

import jaxad
from jaxad import files
from jaxad.data import Dataset
from jaxad.detector import Detector, peak_bytes
from jaxad.progress import say


def directory(output: Path, detector: Detector, train: Dataset) -> Path:
    """Where the run of a detector on a category lies."""
    return output / detector.method_name / segment(train.name) / segment(train.category)


def segment(name: str) -> str:
    """A name as one part of a path."""
    return re.sub(r"[/\\:]+", "_", name).strip(". ") or "_"


def find(paths: Sequence[Path], file: str) -> list[Path]:
    """The run directories among or below the paths: those with a file of that name.

    Raises:
        ValueError: No path is given.
        FileNotFoundError: A path has none.
    """
    if not paths:
        raise ValueError("give one or more run directories, such as runs/patchcore/demo")
    found: dict[Path, None] = {}
    for path in paths:
        hits = [hit.parent for hit in sorted(path.rglob(file)) if "checkpoint" not in hit.relative_to(path).parts]
        below = [hit for hit in hits if not any(hit in other.parents for other in hits)]  # the parts of a unified model
        if not below:
            raise FileNotFoundError(f"no run in {path}: give a directory that `jaxad fit` wrote")
        found |= dict.fromkeys(below)
    return list(found)


def read_recipe(run_dir: Path) -> dict[str, Any]:
    """recipe.json, empty where `Detector.save` wrote the model alone."""
    path = run_dir / "recipe.json"
    recipe = files.read_json(path) if path.is_file() else {}
    missing = {"dataset", "category", "seconds", "peak_bytes"} - recipe.keys() if recipe else ()
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}: fit again or restore a copy")
    return recipe


@contextlib.contextmanager
def alone(run_dir: Path) -> Iterator[None]:
    """Keeps other processes from fitting into the same directory."""
    handle = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is fitting into {run_dir}: wait for it, or give another output"
            ) from None
        yield
    finally:
        os.close(handle)


def saved(checkpoint: Path) -> bool:
    """Whether a checkpoint holds any state."""
    state = checkpoint / "state"
    return any(entry.name.isdigit() for entry in (*state.glob("*"), *state.glob("classes_*/*")))


def resume(checkpoint: Path, fingerprint: str) -> None:
    """Keeps the checkpoint of the very same fit, and deletes any other."""
    mark = checkpoint / "fingerprint"
    if mark.is_file() and mark.read_text() == fingerprint:
        if saved(checkpoint):
            say(f"resuming from {checkpoint}")
        return
    if checkpoint.exists():
        say(f"{checkpoint} is of other settings or data: deleted")
        shutil.rmtree(checkpoint)
    files.write_atomically(mark, fingerprint)


def fingerprint(detectors: Sequence[Detector], trains: Sequence[Dataset]) -> str:
    """Of all that decides what a fit computes: settings, weights, images."""
    decisive: list[Any] = [jaxad.__version__]
    for detector, train in zip(detectors, trains, strict=True):
        files = [record.image for record in train.records]
        stats = [os.stat(file) if isinstance(file, Path) else None for file in files]
        marks = [stat and (stat.st_size, stat.st_mtime_ns) for stat in stats]
        sources = [source["sha256"] for source in detector.sources()]
        images = list(zip(train.paths, marks, strict=True))
        decisive.append([detector.recipe(), detector.backbones, sources, train.mask_threshold, images])
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def recipe(detector: Detector, data: Dataset) -> dict[str, Any]:
    """What recipe.json says of a fitted detector."""
    sources = detector.sources()
    device = jax.devices()[0]
    kind = (
        f"CPU, {os.cpu_count()} cores" if device.platform == "cpu" else f"{jax.device_count()} x {device.device_kind}"
    )
    compile_and_fit = {"compile": None, "fit": None} | detector.seconds
    return detector.recipe() | {
        "backbone": ", ".join(source["name"] for source in sources),
        "weights": {key: ", ".join(source[key] for source in sources) for key in ("path", "sha256")},
        "dataset": data.name,
        "category": data.category,
        "versions": {"jaxad": jaxad.__version__, "jax": jax.__version__, "python": platform.python_version()},
        "device": kind,
        "seconds": compile_and_fit,
        "images_per_second": detector.n_train / detector.seconds["fit"] if detector.seconds else None,
        "peak_bytes": peak_bytes(),
        "n_train": detector.n_train,
        "n_heldout": detector.n_heldout,
        "loss": detector.loss,
    }
