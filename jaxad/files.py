"""Atomic writes of files and folders, and strict JSON."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path next to `path`, which replaces `path` if the block succeeds and is deleted otherwise.

    Raises:
        OSError: `path` cannot be written, or exists and is not a file.
    """
    path = path.resolve()  # replace the target of a link, not the link
    if path.exists() and not path.is_file():
        raise FileExistsError(f"the output must be a file, but {path} is something else: give another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """Yields a hidden folder in `folder`, whose files move into `folder` if the block succeeds.

    If the block fails, the hidden folder is deleted, and so is `folder` if it is new and empty. Files that a killed
    process left behind are deleted the next time.
    """
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
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
    except BaseException as error:
        shutil.rmtree(stage, ignore_errors=True)
        remove_empty(new_folders)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(folder)
        raise


def remove_empty(folders: Iterable[Path]) -> None:
    """Removes folders, given from the inside out, up to the first that is not empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file under a temporary name and renames it, so that a killed run leaves no partial file."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes strict JSON atomically; NaN becomes null."""
    write_atomically(path, json.dumps(_to_json(value), indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object. Raises ValueError with the name of the file if it does not."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} must be JSON, but cannot be parsed ({error}): write it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {json.dumps(value)[:40]}: write it again")
    return value


def _to_json(value: Any) -> Any:
    """Converts to JSON types: NaN to null, paths to strings, numpy arrays to lists."""
    if isinstance(value, dict):
        return {str(k): _to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(v) for v in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _to_json(value.tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
