"""Atomic writes of files and folders, strict JSON, and hashes by which damaged and edited files are noticed."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxad import schema
from jaxad.interruption import undoing, whole

STAGES = (".jaxad-new", ".jaxad-old")
"""Hidden folders in which results are complete before they replace older ones, and the latter meanwhile."""


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
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")  # as in `remove_abandoned`
    with undoing(lambda: temporary.unlink(missing_ok=True)):
        try:
            yield temporary
            os.replace(temporary, path)
        except OSError as error:
            if error.errno and error.filename in (None, str(temporary)):
                error.filename = str(path)
            raise


@contextlib.contextmanager
def staging(folder: Path, results: Sequence[str]) -> Iterator[Path]:
    """Yields a hidden folder in `folder`; if the block succeeds, what it holds replaces the results of an earlier one.

    Old results go before the first new one appears, so that no moment shows a mixture. If anything fails, they are
    back, the hidden folder is deleted, and so is `folder` if it is new and empty. What a killed process left behind is
    deleted the next time. No other process may do the same: the caller has `locked` the folder.

    Args:
        folder: Created where missing.
        results: The names of files and folders that belong together, in the order in which they appear; those that are
            not written anew vanish. Any other file replaces the one of its name.
    """
    new_folders = missing_folders(folder)
    stage, old = (folder / name for name in STAGES)

    def undo() -> None:
        for path in (stage, old):
            remove(path)
        remove_empty(new_folders)

    with undoing(undo):
        for path in (stage, old):
            remove(path)
            path.mkdir(parents=True)
        try:
            yield stage
            with whole():
                _publish(stage, folder, results, old)
        except OSError as error:
            if error.errno and error.filename is None:
                error.filename = str(folder)
            raise
        undo()


def _publish(stage: Path, folder: Path, results: Sequence[str], old: Path) -> None:
    """Moves what is in `stage` into `folder`, and the results that are there to `old`; back, if this fails."""
    new = sorted((path.name for path in stage.iterdir()), key=lambda name: name in results and 1 + results.index(name))
    moved = []
    try:
        for name in reversed(results):
            if os.path.lexists(folder / name):
                os.rename(folder / name, old / name)
        for name in new:
            os.replace(stage / name, folder / name)
            moved.append(name)
    except BaseException:
        for name in {*moved} & {*results}:
            remove(folder / name)
        for path in old.iterdir():
            os.rename(path, folder / path.name)
        raise


def remove_abandoned(folder: Path) -> None:
    """Deletes what killed processes have left in a folder that is `locked`."""
    temporary = [path for path in folder.glob(".*.tmp") if re.fullmatch(r"\.[0-9a-f]{32}\.tmp", path.name)]
    for path in (*temporary, *map(folder.joinpath, STAGES)):
        remove(path)


def missing_folders(folder: Path) -> list[Path]:
    """A folder and those above that do not exist, from the inside out."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


@contextlib.contextmanager
def locked(folder: Path, advice: str) -> Iterator[None]:
    """Keeps a folder for this process. A process that ends, in whatever way, has no locks.

    Raises:
        ValueError: Another process has it; `advice` is the message.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(advice) from None
        yield
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Deletes a file, a folder and all that it holds, or a link but not its target; nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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


def is_there(path: Path) -> bool:
    """Whether there is a file to read. Raises ValueError if there is something else, such as a folder or a pipe."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} must be a file, but is something else: move it away and write it again")
    return path.is_file()


def read_json(path: Path) -> dict[str, Any]:
    """Reads a strict JSON file that holds an object. Raises ValueError with the name of the file if it does not."""
    is_there(path)
    try:
        value = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_unique_names, parse_constant=_no_constant
        )
        schema.shallow(value, "JSON")
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} must be JSON, but cannot be parsed ({error}): write it again") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid ({error}): write it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {json.dumps(value)[:40]}: write it again")
    return value


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a name occurs twice in one object")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def write_sealed(path: Path, value: Mapping[str, Any], sha256: Mapping[str, str]) -> None:
    """Writes JSON with the hashes of other files, and a checksum of itself by which `read_sealed` notices every edit.

    Args:
        path: The file.
        value: Its content.
        sha256: Of files in the same folder, by their names, as from `digests`.
    """
    write_json(path, seal({**value, "sha256": dict(sha256)}))


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """JSON with the checksum by which `read_sealed` knows it."""
    content = _to_json(value)
    return content | {"checksum": _checksum(content)}


def read_sealed(path: Path, check: schema.Check, remedy: str) -> dict[str, Any]:
    """Reads what `write_sealed` wrote, without the checksum.

    Args:
        path: The file.
        check: What it must hold.
        remedy: What to do about a damaged file.

    Raises:
        ValueError: The file is damaged or edited.
    """
    value = read_json(path)
    try:
        check(value, path.stem)
    except ValueError as error:
        raise ValueError(f"{path}: {error}: {remedy}") from None
    if "checksum" not in value:
        raise ValueError(f"{path} has no checksum, as those of an older version of jaxad: {remedy}")
    if value.pop("checksum") != _checksum(value):
        raise ValueError(f"{path} was edited or damaged after it was written: {remedy}")
    schema.mapping(schema.text())(value.get("sha256"), f"sha256 in {path}")
    return value


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The sha256 of files in a folder by their names; none for those that are not there."""
    return {name: digest(folder / name) for name in names if (folder / name).is_file()}


def digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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
