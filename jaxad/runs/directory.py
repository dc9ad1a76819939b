"""Where runs lie, and what they say about themselves; one fit at a time in each."""

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
from jaxad.data.images import Page
from jaxad.driver.memory import peak_bytes
from jaxad.learning import Model
from jaxad.progress import say
from jaxad.settings import Settings


def directory(output: Path, settings: Settings, data: Dataset) -> Path:
    """Where the run of a method on a category lies."""
    return output / settings.method / segment(data.name) / segment(data.category)


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
    runs: dict[Path, None] = {}
    for path in paths:
        hits = [hit.parent for hit in sorted(path.rglob(file)) if "checkpoint" not in hit.relative_to(path).parts]
        outermost = [
            hit for hit in hits if not any(hit in other.parents for other in hits)
        ]  # no parts of unified models
        if not outermost:
            raise FileNotFoundError(f"no run in {path}: give a directory that `jaxad fit` wrote")
        runs |= dict.fromkeys(outermost)
    return list(runs)


def read_recipe(run_dir: Path) -> dict[str, Any]:
    """recipe.json; empty where `Detector.save` wrote the model without one."""
    path = run_dir / "recipe.json"
    recipe = files.read_json(path) if path.is_file() else {}
    missing = {"dataset", "category", "seconds", "peak_bytes"} - recipe.keys() if recipe else ()
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}: fit again or restore a copy")
    return recipe


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
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


def has_state(checkpoint: Path) -> bool:
    """Whether a checkpoint holds any state."""
    state = checkpoint / "state"
    return any(entry.name.isdigit() for entry in state.glob("classes_*/*"))


def resume(checkpoint: Path, fingerprint: str) -> None:
    """Keeps the checkpoint of the very same fit, and deletes any other."""
    mark = checkpoint / "fingerprint"
    if mark.is_file() and mark.read_text() == fingerprint:
        if has_state(checkpoint):
            say(f"resuming from {checkpoint}")
        return
    if checkpoint.exists():
        say(f"{checkpoint} belongs to other settings or data: deleted")
        shutil.rmtree(checkpoint)
    files.write_atomically(mark, fingerprint)


def fingerprint(members: Sequence[Settings], datasets: Sequence[Dataset]) -> str:
    """A hash of all that decides what a fit computes: settings, weights, images."""
    decisive: list[Any] = [jaxad.__version__]
    for settings, data in zip(members, datasets, strict=True):
        sources = (record.image for record in data.records)
        paths = [source.path if isinstance(source, Page) else source for source in sources]
        stats = [os.stat(path) if isinstance(path, Path) else None for path in paths]
        marks = [stat and (stat.st_size, stat.st_mtime_ns) for stat in stats]
        weights = [(source["name"], source["sha256"]) for source in settings.sources()]
        images = list(zip(data.paths, marks, strict=True))
        decisive.append([settings.to_json(), weights, data.mask_threshold, images, data.groups])
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def recipe(settings: Settings, model: Model, data: Dataset) -> dict[str, Any]:
    """What recipe.json says of a fitted model."""
    sources = settings.sources()
    device = jax.devices()[0]
    description = (
        f"CPU, {os.cpu_count()} cores" if device.platform == "cpu" else f"{jax.device_count()} x {device.device_kind}"
    )
    return settings.to_json() | {
        "backbone": ", ".join(source["name"] for source in sources),
        "weights": {key: ", ".join(source[key] for source in sources) for key in ("path", "sha256")},
        "dataset": data.name,
        "category": data.category,
        "versions": {"jaxad": jaxad.__version__, "jax": jax.__version__, "python": platform.python_version()},
        "device": description,
        "seconds": {"compile": None, "fit": None} | dict(model.seconds),
        "images_per_second": model.n_train / model.seconds["fit"] if model.seconds else None,
        "peak_bytes": peak_bytes(),
        "n_train": model.n_train,
        "n_heldout": model.n_heldout,
        "left_out": list(data.left_out),
        "loss": list(model.loss),
    }
