"""The files in a folder: links are followed, hidden files left out, and what is no image is given a reason."""

import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

from jaxad.data.images import EXTENSIONS

OUTPUT_FILES = ("model.safetensors", "scores.jsonl")
"""A subfolder that holds one of these files is output of jaxad (a model, scores, heat maps), not training data."""
CLUTTER = frozenset(
    {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "thumbs.db", "desktop.ini"}
)
"""What systems leave in folders, in lower case; hidden like names that begin with a dot."""
HIDDEN, DANGLING, LINKED_TWICE, MISPLACED = (
    "hidden",
    "behind dangling links",
    "behind links to folders that are read already",
    "not used by the layout",
)
"""Reasons why a file is not read; the others are its type."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name holds no data."""
    return name.startswith(".") or name.lower() in CLUTTER


def is_image(path: Path) -> bool:
    """Whether the suffix is one that Pillow reads, be it by a plug-in (HEIC)."""
    suffix = path.suffix.lower()
    return suffix in EXTENSIONS or (suffix in (".heic", ".heif") and suffix in Image.EXTENSION)


def folders(folder: Path) -> list[Path]:
    """The visible subfolders, sorted."""
    with os.scandir(folder) as scan:
        return sorted(folder / entry.name for entry in scan if not is_hidden(entry.name) and _target(entry).is_dir())


def images(folder: Path) -> list[Path]:
    """The visible images in a folder itself, sorted."""
    paths = (path for path in folder.iterdir() if is_image(path) and not is_hidden(path.name))
    return sorted(path for path in paths if path.is_file())


def images_below(folder: Path) -> list[Path]:
    """The visible images in a folder and its subfolders, sorted, without those that jaxad wrote."""
    return sorted(path for path, reason in walk(folder) if not reason)


def walk(folder: Path, seen: set[tuple[int, int]] | None = None) -> Iterator[tuple[Path, str]]:
    """Yields every file below a folder with the reason why it is not read; an image has none.

    Hidden folders and output of jaxad are not entered; a folder with several links to it is entered once.
    """
    seen, status = set() if seen is None else seen, folder.stat()
    if (status.st_dev, status.st_ino) in seen:
        yield folder, LINKED_TWICE
        return
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda entry: (entry.is_symlink(), entry.name))  # no link before what it leads to
    for entry in entries:
        path = folder / entry.name
        target = _target(entry)
        is_folder, is_file = target.is_dir(), target.is_file()
        if is_hidden(entry.name):
            if is_folder or is_image(path):
                yield path, HIDDEN
        elif is_folder:
            if not any((path / name).exists() for name in OUTPUT_FILES):
                yield from walk(path, seen)
        elif not is_file:
            yield path, DANGLING
        else:
            yield path, "" if is_image(path) else f"of no known image format {path.suffix.lower()}".rstrip()


def _target(entry: os.DirEntry[str]) -> os.DirEntry[str] | Path:
    """What tells whether an entry is a folder: where links form a loop, the entry of a link raises an error."""
    return Path(entry.path) if entry.is_symlink() else entry


def unread(root: Path, used: Iterable[Path], inside: Iterable[Path]) -> str:
    """One line on what was not read of a folder, and why; empty if everything was.

    Args:
        root: The folder.
        used: Images and masks that were read.
        inside: The folders where every file should be an image; elsewhere only images count.
    """
    used, inside = set(used), tuple(inside)
    left = [
        (reason or MISPLACED, path)
        for path, reason in walk(root)
        if path not in used and (not reason or any(path.is_relative_to(folder) for folder in inside))
    ]
    if any(reason == MISPLACED for reason, _ in left):  # unless a link led to it
        real = {os.path.realpath(path) for path in used}
        left = [(reason, path) for reason, path in left if reason != MISPLACED or os.path.realpath(path) not in real]
    parts = []
    for reason, group in itertools.groupby(sorted(left), lambda pair: pair[0]):
        paths = [path.relative_to(root).as_posix() for _, path in group]
        parts.append(f"{len(paths)} {reason} ({paths[0]}{' ...' * (len(paths) > 1)})")
    return f"{len(left)} file{'s' * (len(left) > 1)} not read in {root}: {', '.join(parts)}" if parts else ""
