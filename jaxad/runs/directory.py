"""Where runs lie, and what they say about themselves; one fit at a time in each."""

import contextlib
import hashlib
import json
import os
import platform
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import jaxad
from jaxad import artifact, files
from jaxad.data import Dataset
from jaxad.data.images import Page
from jaxad.driver.memory import peak_bytes
from jaxad.interruption import undoing
from jaxad.learning import Model
from jaxad.metrics.threshold import Thresholds, manual_threshold, pair_from_json, pair_to_json
from jaxad.progress import say
from jaxad.settings import Settings

RESULTS = ("examples.npz", "scores.jsonl", "scores.csv", "metrics.json")
"""What an evaluation writes, in this order; it belongs to an older model as soon as a new one is there."""
SCORES = ("overlays", "maps", "scores.jsonl", "scores.csv")
"""What a scoring writes, in this order."""
ORIGIN = "scores.json"
"""Says what the scores in a folder are of."""
UNIFIED = "unified"
"""The category of a model for all categories."""
RESERVED = {
    UNIFIED,
    "checkpoint",
    "scores",
    "model.safetensors",
    "model.json",
    "threshold.json",
    "recipe.json",
    *RESULTS,
}
"""What may lie beside the folders of categories."""


def segment(name: str) -> str:
    """A name as one part of a path: no two names have the same one, and none has a name in `RESERVED`.

    Characters that no path or not every file system has are percent-encoded: `M8/zinc` is `M8%2Fzinc`.

    Raises:
        ValueError: The name is too long for a folder.
    """
    unsafe = r'[%/\\:*?"<>|\x00-\x1f\x7f]|^[. ]|[. ]$' + ("|^." if name.casefold() in RESERVED else "")
    part = re.sub(unsafe, lambda match: f"%{ord(match[0]):02X}", name) or "%"
    if len(os.fsencode(part)) > 255:
        raise ValueError(f"a name must have 255 bytes at most to be that of a folder, got {name[:20]}...: rename it")
    return part


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
        hits = [hit.parent for hit in sorted(path.rglob(file)) if not _in_checkpoint(hit)]
        outermost = [
            hit for hit in hits if not any(hit in other.parents for other in hits)
        ]  # no parts of unified models
        if not outermost:
            raise FileNotFoundError(f"no run in {path}: give a directory that `jaxad fit` wrote")
        runs |= dict.fromkeys(outermost)
    return list(runs)


def _in_checkpoint(path: Path) -> bool:
    return any(parent.name == "checkpoint" and (parent / "fingerprint").is_file() for parent in path.parents)


def set_thresholds(run_dir: Path, image: float | None, pixel: float | None) -> Thresholds:
    """Replaces the thresholds of a saved model by those of a person; None keeps one as it is.

    Raises:
        FileNotFoundError: There is no model.
        ValueError: Nothing is replaced, a value is no finite number, the model is damaged, threshold.json is not that
            of the model and not replaced as a whole, or a process is fitting into the directory.
    """
    if image is None and pixel is None:
        raise ValueError("give the new thresholds: --image VALUE, --pixel VALUE or both")
    new = Thresholds(*(None if value is None else manual_threshold(value) for value in (image, pixel)))
    with locked(run_dir):
        if None in new:
            artifact.read_description(run_dir, verify=("threshold.json",))
            path = run_dir / "threshold.json"
            old = pair_from_json(files.read_json(path), path)
            new = Thresholds(new.image or old.image, new.pixel or old.pixel)
        artifact.save_thresholds(run_dir, pair_to_json(new))
    return new


def check_owner(folder: Path, names: Iterable[str], said_in: str, owner: Mapping[str, str | None]) -> None:
    """Refuses to replace what was made of something else, or of what nobody knows.

    Args:
        folder: Where it lies.
        names: Its files and folders.
        said_in: The JSON file in `folder` that says what it was made of.
        owner: What would replace it is made of; paths are the same where links lead to the same file.

    Raises:
        ValueError: It was made of something else.
    """
    if not any(os.path.lexists(folder / name) for name in names):
        return
    earlier: dict[str, Any] = {}
    with contextlib.suppress(ValueError, OSError):
        earlier = files.read_json(folder / said_in)
    for key, value in owner.items():
        there = earlier.get(key)
        if there != value and (not there or not value or os.path.realpath(str(there)) != os.path.realpath(value)):
            of = f"of another {key}, {there}" if there else "of unknown origin"
            raise ValueError(
                f"{folder} holds results {of}: replace them with --overwrite, or give another folder with --output"
            )


def locked(run_dir: Path) -> contextlib.AbstractContextManager[None]:
    """Keeps other processes from fitting into the same directory, and from evaluating what is in it."""
    return files.locked(
        run_dir,
        f"another process is fitting into {run_dir}: wait for it, or for its evaluation, or give another output",
    )


@contextlib.contextmanager
def scoring(
    output: Path, run_dir: Path, model: tuple[int, int] | None, images: Mapping[str, str], overwrite: bool
) -> Iterator[Path]:
    """Yields a folder for scores, which replace the earlier ones in `output` as a whole if the block succeeds.

    Args:
        output: Created where missing.
        run_dir: Where the model is.
        model: Its `version`.
        images: Their "source" and "category".
        overwrite: Replace the scores of another model, or of other images, too.

    Raises:
        ValueError: There are such scores, another process writes to `output`, or the model was replaced meanwhile.
    """
    inside = output.absolute().is_relative_to(run_dir.absolute())  # then both may be moved
    origin = {"run": os.path.relpath(run_dir, output) if inside else str(run_dir.absolute()), **images}
    created = files.missing_folders(output)
    output.mkdir(parents=True, exist_ok=True)
    busy = f"another process is scoring into {output}: wait for it, or give another folder with --output"
    with files.locked(output, busy), undoing(lambda: files.remove_empty(created)):
        if not overwrite:
            check_owner(output, SCORES, ORIGIN, origin)
        with files.staging(output, SCORES) as stage:
            yield stage
            files.write_json(stage / ORIGIN, origin)
            if version(run_dir) != model:
                raise ValueError(f"the model in {run_dir} was replaced while it scored: score again")


def scores_folder(run_dir: Path, source: str) -> Path:
    """Where the scores of a source go if nothing else is said; a link there gives way to a folder."""
    folder = run_dir / "scores" / segment(source)
    if folder.is_symlink():
        folder.unlink()
    return folder


def version(run_dir: Path) -> tuple[int, int] | None:
    """What changes when another model replaces the one in a run directory; None where there is none."""
    try:
        status = os.stat(run_dir / "model.json")
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def forget_results(run_dir: Path) -> None:
    """Deletes what came of the model in a run directory: evaluations, also of single categories, and scores."""
    for name in RESULTS:
        files.remove(run_dir / name)
    forget_parts(run_dir)
    for path in run_dir.glob("scores/*/scores.csv"):
        _forget(path.parent, (*SCORES, ORIGIN))
    files.remove_empty([run_dir / "scores"])


def forget_parts(run_dir: Path, kept: Container[Path] = (), source: str | None = None) -> None:
    """Deletes the evaluations of a unified model on single categories, but for some folders and those of a source."""
    for path in run_dir.glob("*/recipe.json"):
        if path.parent not in kept and version(path.parent) is None:
            with contextlib.suppress(ValueError, OSError):
                evaluated = files.read_json(path.with_name("metrics.json")).get("source")
                if source and os.path.realpath(str(evaluated)) == os.path.realpath(source):
                    continue
            _forget(path.parent, (*RESULTS, "recipe.json"))


def _forget(folder: Path, names: Iterable[str]) -> None:
    if not folder.is_symlink():
        for name in names:
            files.remove(folder / name)
        files.remove_empty([folder])


def has_state(checkpoint: Path) -> bool:
    """Whether a checkpoint holds any state."""
    state = checkpoint / "state"
    return any(entry.name.isdigit() for entry in state.glob("classes_*/*"))


def resume(checkpoint: Path, fingerprint: str, source: str | None = None, overwrite: bool = False) -> None:
    """Keeps the checkpoint of the very same fit; deletes one of other settings, and with `overwrite` of other images.

    Raises:
        ValueError: A fit of another source can be resumed from it.
    """
    mark = checkpoint / "fingerprint"
    if not checkpoint.is_symlink() and mark.is_file() and mark.read_bytes() == fingerprint.encode():
        if has_state(checkpoint):
            say(f"resuming from {checkpoint}")
        return
    if has_state(checkpoint) and not overwrite:
        check_owner(checkpoint, ("state",), "origin.json", {"source": source})
    if checkpoint.exists():
        say(f"{checkpoint} belongs to other settings or data: deleted")
    files.remove(checkpoint)
    files.write_json(checkpoint / "origin.json", {"source": source})
    files.write_atomically(mark, fingerprint)


def fingerprint(members: Sequence[Settings], datasets: Sequence[Dataset]) -> str:
    """A hash of all that decides what a fit computes: settings, weights, images."""
    decisive: list[Any] = [jaxad.__version__]
    for settings, data in zip(members, datasets, strict=True):
        sources = (record.image for record in data.records)
        paths = [source.file if isinstance(source, Page) else source for source in sources]
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
