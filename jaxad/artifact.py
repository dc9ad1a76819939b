"""A fitted model on disk: `model.safetensors` (the state) and `model.json` (how to rebuild what it belongs to)."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxad.base import State

FORMAT = 1


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well, and vanishes when it does not.

    Raises:
        OSError: `path` cannot be written, or is there already and no file.
    """
    path = path.resolve()  # what a link points to is written, not the link
    if path.exists() and not path.is_file():
        raise FileExistsError(f"the output must be a file, but {path} is something else: give another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.filename == str(temporary):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A hidden folder in `folder`, whose files move to the same places in it when the block ends well.

    When it does not, nothing is left of them, nor of `folder` where that is new. What a killed process left behind is
    removed by the next one.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    stage = folder / ".staging"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        yield stage
        for file in [path for path in stage.rglob("*") if path.is_file()]:
            target = folder / file.relative_to(stage)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
        shutil.rmtree(stage)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        remove_empty(made)
        raise


def remove_empty(folders: Iterable[Path]) -> None:
    """Removes folders, the innermost first, as far as nobody has written there meanwhile."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file under a temporary name, then renames it: a killed run leaves no half file behind."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes strict JSON (NaN becomes null) atomically."""
    write_atomically(path, json.dumps(_plain(value), indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object; a broken one is a ValueError that names it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} must be JSON, but reading it failed ({error}): write it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {json.dumps(value)[:40]}: write it again")
    return value


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


def _plain(value: Any) -> Any:
    """JSON has no NaN, no paths and no numpy: null, strings and numbers stand for them."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
