"""The photographs that experiments learn from or compare with."""

from pathlib import Path


def photographs(folder: Path) -> list[Path]:
    """Those of a folder and of the folders below it, in order.

    Raises:
        ValueError: There are none.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not paths:
        raise ValueError(f"{folder} has no images: give a folder of .jpg, .jpeg or .png files")
    return paths
