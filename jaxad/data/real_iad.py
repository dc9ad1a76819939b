"""Real-IAD: realiad_<size>/<category>/{OK,NG}/..., split by realiad_jsons/realiad_jsons/<category>.json."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from jaxad.data.listing import folders
from jaxad.data.records import GOOD, Record


def matches(root: Path) -> bool:
    """Whether a folder is the data set, or its images of one size."""
    return bool(_splits(root)) and bool(_sizes(root))


def read(root: Path) -> Iterator[Record]:
    """Reads the split of each category whose images are there; the shots of a part are a group.

    Raises:
        ValueError: There are images of several sizes, or a split is damaged.
    """
    sizes = _sizes(root)
    if len(sizes) != 1:
        raise ValueError(f"images of one size are expected, got {', '.join(map(str, sizes))}: pass one of them")
    for path in _splits(root):
        category = path.stem
        if not (sizes[0] / category).is_dir():
            continue
        try:
            splits = json.loads(path.read_text(encoding="utf-8"))
            for split in ("train", "test"):
                for entry in splits[split]:
                    image = sizes[0] / category / entry["image_path"]
                    mask = sizes[0] / category / entry["mask_path"] if entry["mask_path"] else None
                    defect = GOOD if entry["anomaly_class"] == "OK" else entry["anomaly_class"]
                    yield Record(str(image), image, category, split, defect, mask, str(image.parent))
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{path} is no split of Real-IAD ({error!r}): restore it") from None


def _sizes(root: Path) -> list[Path]:
    """The folders of the images."""
    pattern = r"realiad_(\d+|raw)"
    if re.fullmatch(pattern, root.absolute().name):
        return [root]
    return [path for path in folders(root) if re.fullmatch(pattern, path.name)]


def _splits(root: Path) -> list[Path]:
    """The files of the splits, beside the images; of several versions the base one."""
    for folder in (root, root.absolute().parent):
        for name in ("realiad_jsons/realiad_jsons", "realiad_jsons"):
            if paths := sorted((folder / name).glob("*.json")):
                return paths
    return []
