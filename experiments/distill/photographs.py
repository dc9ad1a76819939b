"""Folders of photographs."""

from pathlib import Path


def photographs(folder: Path) -> list[Path]:
    """The image files of a folder and of the folders below it, sorted.

    Raises:
        ValueError: There are none.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not paths:
        raise ValueError(f"{folder} has no images: give a folder of .jpg, .jpeg or .png files")
    return paths
