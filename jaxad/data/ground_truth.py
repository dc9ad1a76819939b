"""Which mask belongs to which image: the names and folders that public data sets and annotation tools use."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from jaxad.data.listing import HIDDEN, walk
from jaxad.data.records import GOOD, Record, defect_of

_WORD = r"(?:masks?|gt|ground[-_ ]?truth|label|seg|segmentation)"
_SUFFIX = re.compile(rf"(.+?)[-_ .]{_WORD}", re.IGNORECASE)
_PREFIX = re.compile(rf"{_WORD}[-_ .](.+)", re.IGNORECASE)


def is_mask_folder(name: str) -> bool:
    """Whether a folder of that name holds masks: ground_truth, GT, masks ..."""
    return bool(re.fullmatch(r"gts?|masks?|ground[-_ ]?truths?(?:[-_ ]?masks?)?", name, re.IGNORECASE))


def among(paths: Sequence[Path], root: Path) -> Path | None:
    """The first of the images below a folder that lies in a subfolder of masks.

    A subfolder named label, labels or annotations is one if an image outside has the same name.
    """
    names: dict[str, set[Path]] = {}
    for path in paths:
        names.setdefault(path.stem.lower(), set()).add(path.parent)
    for path in paths:
        for folder in path.relative_to(root).parts[:-1]:
            is_label = re.fullmatch(r"labels?|annotations?", folder, re.IGNORECASE)
            if is_mask_folder(folder) or (is_label and len(names[path.stem.lower()]) > 1):
                return path
    return None


def stems(name: str) -> list[str]:
    """What the image of a mask may be called, without its suffix and in lower case; the most literal comes first."""
    names = [Path(name).stem]
    for pattern in (_SUFFIX, _PREFIX):
        names += [match[1] for each in names if (match := pattern.fullmatch(each))]
    return [each.lower() for each in names]


def beside(paths: Sequence[Path]) -> dict[Path, Path]:
    """The masks that lie among their images (000_mask.png or 000_GT.png beside 000.png), with these."""
    known = {(path.parent, path.stem.lower()): path for path in reversed(paths)}
    matches = ((path, _SUFFIX.fullmatch(path.stem)) for path in paths)
    pairs = {path: known.get((path.parent, match[1].lower())) for path, match in matches if match}
    return {mask: image for mask, image in pairs.items() if image and image not in pairs}


def assign(records: Sequence[Record], roots: Iterable[Path], pairs: dict[Path, Path]) -> list[Record]:
    """Gives the anomalous images of one category their masks. Case does not count.

    A mask is root/<defect>/<group>/<name> or root/<name>; its name is that of the image, with or without a word such as
    _mask or _GT behind or before it. Of a folder root/<defect>/<group>/<name of the image>, all masks count together.
    A test image comes before a training image of the same name.

    Args:
        records: The images of the category.
        roots: Folders of masks.
        pairs: Masks that lie beside their images.

    Raises:
        ValueError: A mask fits several images, an image has several masks, or there are images without a mask and masks
            that fit no image.
    """
    anomalous = sorted((record for record in records if record.defect != GOOD), key=lambda record: record.split)
    by_place: dict[tuple[str, str, str], list[Record]] = {}
    by_name: dict[str, list[Record]] = {}
    for record in anomalous:
        path = Path(record.path)
        for name in dict.fromkeys((path.stem.lower(), path.name.lower())):
            by_place.setdefault((record.defect.lower(), record.group.lower(), name), []).append(record)
            for alias in (name, *(f"{record.defect}{separator}{name}".lower() for separator in "-_ .")):
                by_name.setdefault(alias, []).append(record)

    def owners(mask: Path, root: Path) -> tuple[list[Record], bool]:
        """The images that a mask fits, and whether it is one of several."""
        *parts, name = (part.lower() for part in mask.relative_to(root).parts)
        if not parts:
            return next((by_name[stem] for stem in stems(name) if stem in by_name), []), False
        defect, *groups = parts
        places = [(defect, "/".join(groups), stem) for stem in stems(name)]
        if fitting := next((by_place[place] for place in places if place in by_place), []):
            return fitting, False
        return (by_place.get((defect, "/".join(groups[:-1]), groups[-1]), []) if groups else []), True

    taken: dict[str, list[Path]] = {}
    stray = []

    def take(mask: Path, image: str, is_part: bool = False) -> None:
        others = taken.setdefault(image, [])
        if others and not (is_part and others[0].parent == mask.parent):
            raise ValueError(f"{image} has two masks, {others[0]} and {mask}: remove one of them")
        others.append(mask)

    for mask, image in pairs.items():
        take(mask, str(image))
    for root in roots:
        for mask, reason in sorted(walk(root)):
            fitting, is_part = ([], False) if reason else owners(mask, root)
            tested = [record for record in fitting if record.split == "test"] or fitting
            if not fitting:
                of_normal = defect_of(mask.relative_to(root).parts[0]) == GOOD
                stray += [] if of_normal or reason == HIDDEN else [mask]
            elif len(tested) > 1:
                raise ValueError(
                    f"the mask {mask} fits several images, {tested[0].path} and {tested[1].path}: name it "
                    "ground_truth/<defect>/<name of the image with its suffix>.png"
                )
            else:
                take(mask, tested[0].path, is_part)
    lacking = [record.path for record in anomalous if record.split == "test" and record.path not in taken]
    if stray and lacking:
        raise ValueError(
            f"{len(stray)} masks fit no image, the first is {stray[0]}, and {len(lacking)} test images have no mask, "
            f"the first is {lacking[0]}: name a mask ground_truth/<defect>/<name of the image>_mask.png"
        )
    masks = {path: tuple(parts) if len(parts) > 1 else parts[0] for path, parts in taken.items()}
    return [record if record.defect == GOOD else record._replace(mask=masks.get(record.path)) for record in records]
