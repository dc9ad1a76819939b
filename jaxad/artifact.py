"""A fitted model on disk: `model.safetensors` holds the state, `model.json` the settings that it belongs to."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxad.base import State
from jaxad.files import read_json, replacing, write_json

FORMAT = 4
"""Version of the files; 2 renamed the arrays of the states, 3 has the networks and scores of the published code, 4 the
regions to ignore."""


def save_state(directory: str | Path, state: State) -> None:
    """Writes a fitted state. `save_description` completes the model, so a killed run leaves no half-written model.

    Args:
        directory: Created if it is missing; a model in it is replaced.
        state: Any pytree of arrays.

    Raises:
        OSError: The disk is full, or the directory cannot be written.
    """
    path = Path(directory) / "model.safetensors"
    with replacing(path) as temporary:
        temporary.touch()
        permissions = temporary.stat().st_mode  # follow the umask; safetensors writes private files
        try:
            save_file(_named_arrays(state), temporary)
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error
        temporary.chmod(permissions)
        path.with_name("model.json").unlink(missing_ok=True)


def save_description(directory: str | Path, description: dict[str, Any]) -> None:
    """Writes the description of the model as JSON, which must suffice to rebuild the structure of the state."""
    write_json(Path(directory) / "model.json", {"format": FORMAT, **description})


def read_description(directory: str | Path, fields: Iterable[str] = ()) -> dict[str, Any]:
    """Reads the description of a saved model, which must have at least these fields.

    Raises:
        FileNotFoundError: There is no model.
        ValueError: The description is damaged, or has another format.
    """
    path = Path(directory) / "model.json"
    if not path.is_file():
        raise FileNotFoundError(f"no fitted model in {directory}: pass a directory that `jaxad fit` wrote")
    description = read_json(path)
    version = description.get("format")
    if version != FORMAT:
        raise ValueError(f"{path} has format {version}, but this version of jaxad reads format {FORMAT}: fit again")
    missing = [field for field in fields if field not in description]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: fit again or restore a copy")
    return description


def load_state(directory: str | Path, structure: State) -> State:
    """Reads a state into the tree structure of `structure`. Shapes and types are those of the file.

    Raises:
        FileNotFoundError: There is no model.
        ValueError: The file is damaged or holds other arrays.
    """
    path = Path(directory) / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no fitted model in {directory}: model.safetensors is missing")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): fit again or restore a copy") from error
    paths, treedef = jax.tree_util.tree_flatten_with_path(structure)
    names = [_name(path) for path, _ in paths]
    if set(names) != set(tensors):
        raise ValueError(f"{path} must hold the arrays {', '.join(sorted(names))}; got {', '.join(sorted(tensors))}")
    return jax.tree.unflatten(treedef, [jax.numpy.asarray(tensors[name]) for name in names])


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".") or "state"


def _named_arrays(state: State) -> dict[str, np.ndarray]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {_name(path): np.asarray(leaf, order="C") for path, leaf in leaves}
