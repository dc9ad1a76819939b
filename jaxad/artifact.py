"""A fitted model on disk: `model.safetensors` (the state) and `model.json` (how to rebuild what it belongs to)."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxad.base import State
from jaxad.files import read_json, replacing, write_json

FORMAT = 1


def save_state(directory: str | Path, state: State) -> None:
    """Writes a fitted state; it is no model before `save_description`, so that a killed run leaves none half-written.

    Args:
        directory: Created where missing; a model in it is replaced.
        state: Any pytree of arrays.

    Raises:
        OSError: The disk is full, or the directory cannot be written.
    """
    path = Path(directory) / "model.safetensors"
    with replacing(path) as temporary:
        temporary.touch()
        permissions = temporary.stat().st_mode  # as the user's umask has them; safetensors makes private files
        try:
            save_file(_named(state), temporary)
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error
        temporary.chmod(permissions)
        path.with_name("model.json").unlink(missing_ok=True)


def save_description(directory: str | Path, description: dict[str, Any]) -> None:
    """Writes what belongs to the state beside it: JSON values, enough to build the state's structure again."""
    write_json(Path(directory) / "model.json", {"format": FORMAT, **description})


def read_description(directory: str | Path, fields: Iterable[str] = ()) -> dict[str, Any]:
    """The description of a saved model, with at least those fields.

    Raises:
        FileNotFoundError: There is no model.
        ValueError: It is damaged, or of a later format.
    """
    path = Path(directory) / "model.json"
    if not path.is_file():
        raise FileNotFoundError(f"no fitted model in {directory}: give a directory that `jaxad fit` wrote")
    description = read_json(path)
    if description.get("format") != FORMAT:
        raise ValueError(f"{path} must have format {FORMAT}, got {description.get('format')}: update or fit again")
    missing = [field for field in fields if field not in description]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: fit again or restore a copy")
    return description


def load_state(directory: str | Path, structure: State) -> State:
    """Reads a state back into the structure of `structure`; shapes and types are those of the file.

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
    paths, tree = jax.tree_util.tree_flatten_with_path(structure)
    names = [_name(path) for path, _ in paths]
    if set(names) != set(tensors):
        raise ValueError(f"{path} must hold the arrays {', '.join(sorted(names))}; got {', '.join(sorted(tensors))}")
    return jax.tree.unflatten(tree, [jax.numpy.asarray(tensors[name]) for name in names])


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".") or "state"


def _named(state: State) -> dict[str, np.ndarray]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {_name(path): np.asarray(leaf, order="C") for path, leaf in leaves}
