"""A fitted model on disk: `model.safetensors` holds the state, `model.json` the settings that it belongs to.

model.json also holds the sha256 of model.safetensors and threshold.json, and a checksum of itself.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxad import files
from jaxad.base import State
from jaxad.schema import count, items, mapping, number, optional, record, shallow, text

FORMAT = 4
"""Version of the files; 2 renamed the arrays of the states, 3 has the networks and scores of the published code, 4 has
the hashes of the other files in model.json, and the regions to ignore."""
HASHED = ("model.safetensors", "threshold.json")
DERIVED = ("recipe.json", "metrics.json", "scores.csv", "scores.jsonl", "examples.npz")
"""What came of a model, in its directory; another one does not keep it."""
SIZE = items(number(1, 65535, whole=True), 2, 2)
DESCRIPTION = record(
    {
        "method": text(),
        "hyperparameters": mapping(shallow),
        "preprocess": record(
            {"resize": optional(SIZE), "center_crop": optional(SIZE)}, {"bits": optional(count(8))}, closed=False
        ),
        "ignore": items(text()),
        "ignore_margin": number(0, 1),
        "holdout": number(0, 1),
        "fpr": number(0, 1),
        "precision": text("float32", "bfloat16"),
        "seed": number(-(1 << 63), 1 << 63, whole=True),
        "batch_size": count(1),
        "backbones": items(record({"name": text(), "path": text(), "sha256": text()})),
        "image_size": SIZE,
        "n_train": count(),
        "normal_level": optional(number()),
        "sha256": record(dict.fromkeys(HASHED, text())),
    },
    closed=False,
)
"""What model.json must hold."""
REMEDY = "restore a copy or fit again"


def save_state(directory: str | Path, state: State) -> None:
    """Writes a fitted state. `save_description` completes the model, so a killed run leaves no half-written model.

    Args:
        directory: Created if it is missing; another model in it is replaced, with its recipe and evaluation.
        state: Any pytree of arrays.

    Raises:
        OSError: The disk is full, or the directory cannot be written.
    """
    path = Path(directory) / "model.safetensors"
    before = files.digests(path.parent, [path.name])
    with files.replacing(path) as temporary:
        temporary.touch()
        permissions = temporary.stat().st_mode  # follow the umask; safetensors writes private files
        try:
            save_file(_named_arrays(state), temporary)
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error
        temporary.chmod(permissions)
        path.with_name("model.json").unlink(missing_ok=True)
    if before and before != files.digests(path.parent, [path.name]):
        for name in DERIVED:
            files.remove(path.with_name(name))


def save_description(directory: str | Path, description: Mapping[str, Any]) -> None:
    """Writes the description of the model, which must suffice to rebuild the structure of the state.

    Args:
        directory: Holds model.safetensors and threshold.json, whose hashes it gets.
        description: As JSON.
    """
    path = Path(directory) / "model.json"
    files.write_sealed(path, {"format": FORMAT, **description}, files.digests(path.parent, HASHED))


def save_thresholds(directory: str | Path, thresholds: Mapping[str, Any]) -> None:
    """Replaces threshold.json of a saved model, and its hash.

    Raises:
        FileNotFoundError: There is no model.
        ValueError: model.json is damaged or edited.
    """
    path = Path(directory) / "model.json"
    description = read_description(directory, verify=())
    files.write_json(path.with_name("threshold.json"), thresholds)
    files.write_sealed(path, description, description["sha256"] | files.digests(path.parent, ("threshold.json",)))


def read_description(directory: str | Path, verify: Sequence[str] = HASHED) -> dict[str, Any]:
    """Reads the description of a saved model.

    Args:
        directory: Of the model.
        verify: The files whose hashes are compared with those in the description.

    Raises:
        FileNotFoundError: There is no model, or it lacks one of the files.
        ValueError: The description has another format, or it or one of the files is damaged or edited.
    """
    path = Path(directory) / "model.json"
    if not path.is_file():
        raise FileNotFoundError(f"no fitted model in {directory}: pass a directory that `jaxad fit` wrote")
    version = files.read_json(path).get("format")
    if version != FORMAT:
        raise ValueError(
            f"{path} has format {str(version)[:20]}, but this version of jaxad reads format {FORMAT}: fit again with "
            "it, or use the version that wrote the model"
        )
    description = files.read_sealed(path, DESCRIPTION, REMEDY)
    remedy = {"threshold.json": "restore a copy, or set both thresholds with `jaxad threshold`"}
    for name in verify:
        if not path.with_name(name).is_file():
            raise FileNotFoundError(f"{name} is missing in {directory}: {remedy.get(name, REMEDY)}")
        if files.digest(path.with_name(name)) != description["sha256"][name]:
            raise ValueError(f"{path.with_name(name)} is not what model.json names: {remedy.get(name, REMEDY)}")
    return description


def load_state(directory: str | Path, structure: State) -> State:
    """Reads a state, as numpy arrays, into the tree structure of `structure`. Shapes and types are those of the file.

    Raises:
        ValueError: The file is damaged or holds other arrays.
    """
    path = Path(directory) / "model.safetensors"
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): fit again or restore a copy") from error
    paths, treedef = jax.tree_util.tree_flatten_with_path(structure)
    names = [_name(path) for path, _ in paths]
    if set(names) != set(tensors):
        raise ValueError(f"{path} must hold the arrays {', '.join(sorted(names))}; got {', '.join(sorted(tensors))}")
    return jax.tree.unflatten(treedef, [tensors[name] for name in names])


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".") or "state"


def _named_arrays(state: State) -> dict[str, np.ndarray]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {_name(path): np.asarray(leaf, order="C") for path, leaf in leaves}
