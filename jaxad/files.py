"""Files that appear whole or not at all."""

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
