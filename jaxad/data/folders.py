"""Readers of folders and CSV files; each yields one `Record` per image."""

import csv
import difflib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxad.data import ground_truth, listing, real_iad
from jaxad.data.images import MaskThreshold, read_mask
from jaxad.data.listing import folders, images, images_below
from jaxad.data.records import GOOD, Record, defect_of

SPLITS = {
    "train": r"train(ing)?",
    "test": r"test(s|ing|[-_ ]?public)?",
    "validation": r"val(id|idation)?",
}
"""What folders of a split are called, as regular expressions; case does not count."""
DEFECTIVE = re.compile(
    r"(defect|anomal|abnormal|reject|fault|damage|un-?good|not?[-_ ]?(good|ok)|(bad|ng|nok|broken)[-_ ]).*|bad|ng|nok"
    r"|ko|broken|scratch(es|ed)?|crack(s|ed)?|dent(s|ed)?|stain(s|ed)?|holes?|contaminat(ion|ions|ed)"
    r"|test(s|ing|set|[-_ ]?(data|images|public))?",
    re.IGNORECASE,
)
"""What folders of images that are not all normal are called."""


class Layout(NamedTuple):
    """How a data set is arranged in a folder."""

    matches: Callable[[Path], bool]
    read: Callable[[Path, MaskThreshold], Iterator[Record]]
    """Takes the folder, and the threshold for masks that decide whether an image is normal."""
    expected: str


def read(source: Path, layout: str = "auto", mask_threshold: MaskThreshold = None) -> tuple[str, Iterator[Record]]:
    """Reads a folder, a CSV file or one image.

    Args:
        source: the path.
        layout: a key of `LAYOUTS`; "auto" for the first that matches; or "any", which is the same, but a folder in no
            layout may hold normal and anomalous images, as for scoring.
        mask_threshold: as for `open_data`.

    Returns:
        The name of the data set and its records.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: there is no such layout, or the path does not fit it.
    """
    if layout not in ("auto", "any", *LAYOUTS):
        raise ValueError(f"no layout {layout!r}: choose auto or one of {', '.join(LAYOUTS)}")
    if not source.exists():
        raise FileNotFoundError(f"no such file or folder: {source}")
    if source.is_file():
        return source.stem, table(source, mask_threshold) if source.suffix.lower() in (".csv", ".tsv") else files(
            [source]
        )
    recognized = recognize(source, layout)
    if recognized == "flat" != layout:
        _check_flat(source, mixed=layout == "any")
    return _name(source), LAYOUTS[recognized].read(source, mask_threshold)


def recognize(folder: Path, layout: str = "auto") -> str:
    """The layout itself, or of "auto" and "any" the first of `LAYOUTS` that matches; "flat" matches any folder."""
    return layout if layout in LAYOUTS else next(key for key, each in LAYOUTS.items() if each.matches(folder))


def unread(source: Path, layout: str, records: Iterable[Record]) -> str:
    """One line on the files of a folder in the MVTec layout or none that are in no record, and why; or empty."""
    layout = recognize(source, layout) if source.is_dir() else ""
    if layout not in ("mvtec", "flat"):
        return ""
    used = [path for record in records for path in (record.image, *record.masks) if isinstance(path, Path)]
    inside = [source] if layout == "flat" else [part for folder in _categories(source) for part in _parts(folder)]
    return listing.unread(source, used, inside)


def files(paths: Iterable[Path], category: str = "files") -> Iterator[Record]:
    """Image files as normal training images."""
    return (Record(str(path), path, category, "train") for path in paths)


def flat(root: Path) -> Iterator[Record]:
    """All images in a folder and its subfolders as normal training images, except those that jaxad wrote."""
    return files(images_below(root), _name(root))


def mvtec(root: Path) -> Iterator[Record]:
    """MVTec AD: train/good, test/<defect>, ground_truth/<defect>/<stem>_mask.png, for one category or several.

    Case does not count. The folders may be named training and testing, normal images may lie in folders named ok or
    normal, or directly in train; images directly in test have no label. Without a test folder, validation is the test
    set. A folder in train/good, test/<defect> and ground_truth/<defect> is a group: train/good/<group>/<stem>.png.
    Masks are optional; `ground_truth.assign` says how they may be named.
    """
    for folder in _categories(root):
        records = _category(folder)
        if not records:
            raise ValueError(f"a category needs images, got none in {folder}: add them or remove the folder")
        yield from records


def _category(folder: Path) -> list[Record]:
    train, test = _split(folder, "train"), _split(folder, "test") or _split(folder, "validation")
    name, records, mask_roots, pairs = _name(folder), [], [], {}
    for path in folders(folder):
        mask_roots += [path] if ground_truth.is_mask_folder(path.name) or _holds_labels(path) else []
    for split, part in (("train", train), ("test", test)):
        places = [(part, images(part), GOOD if split == "train" else "")] if part else []
        for defect_folder in folders(part) if part else ():
            if ground_truth.is_mask_folder(defect_folder.name):
                mask_roots.append(defect_folder)
                continue
            paths = images_below(defect_folder)
            if mask := ground_truth.among(paths, defect_folder):
                raise ValueError(
                    f"masks must lie in ground_truth/<defect>, got {mask} among the images of {defect_folder.name}: "
                    "move or remove its folder"
                )
            is_container = re.fullmatch(r"images?|imgs?", defect_folder.name, re.IGNORECASE)
            defect = (GOOD if split == "train" else "") if is_container else defect_of(defect_folder.name)
            places.append((defect_folder, paths, defect))
        for place, paths, defect in places:
            masks = ground_truth.beside(paths)
            pairs |= masks
            for path in paths:
                if path not in masks:
                    records.append(Record(str(path), path, name, split, defect, group=_group(path, place)))
    unlabeled = [record.path for record in records if not record.defect]
    masks = [*pairs, *(mask for path in mask_roots for mask in images_below(path))]
    if unlabeled and masks:
        raise ValueError(
            f"a test image with a mask needs a label, got {unlabeled[0]} and the mask {masks[0]}: move the test images "
            "to test/good and test/<defect>"
        )
    return ground_truth.assign(records, mask_roots, pairs)


def visa(root: Path) -> Iterator[Record]:
    """VisA: a folder with split_csv/1cls.csv (columns object, split, label, image and mask)."""
    columns = {"category": "object", "split": "split", "label": "label", "image_path": "image", "mask_path": "mask"}
    return _rows(root / "split_csv" / "1cls.csv", root, columns)


def table(path: Path, mask_threshold: MaskThreshold = None) -> Iterator[Record]:
    """A CSV file with the column image_path, and optionally label, split, mask_path, ignore_path, category and group.

    Paths are relative to the file. The separator is a comma, a semicolon or a tab. The label is good, ok, normal or 0
    for a normal image, empty if unknown (test images only), and the kind of defect otherwise. Without the column split
    all are test images. Images of one group show one part. ignore_path is a mask of what to ignore in the image.
    """
    columns = {key: key for key in ("category", "split", "label", "image_path", "mask_path", "group", "ignore_path")}
    return _rows(path, path.parent, columns, mask_threshold)


def ksdd2(root: Path, mask_threshold: MaskThreshold = None) -> Iterator[Record]:
    """KolektorSDD2: train and test hold <id>.png and <id>_GT.png. An image is anomalous if its mask is not empty."""
    for split in ("train", "test"):
        folder = _split(root, split)
        paths = images(folder) if folder else []
        masks = {image: mask for mask, image in ground_truth.beside(paths).items()}
        for path in paths:
            if path in masks:
                mask = masks[path]
                is_anomalous = read_mask(mask, str(mask), threshold=mask_threshold).any()
                defect = "defect" if is_anomalous else GOOD
                yield Record(str(path), path, "ksdd2", split, defect, mask if is_anomalous else None)
            elif path not in masks.values():
                raise FileNotFoundError(f"every image of KolektorSDD2 needs a mask <id>_GT, but {path} has none")


def mtd(root: Path) -> Iterator[Record]:
    """Magnetic tile defects as published: MT_<class>/Imgs/<id>.jpg and .png, and DifferNet's mtd_train_filenames.txt.

    The 761 defect-free images of that list are the training set, all others the test set. The masks are noisy.
    """
    names = root / "mtd_train_filenames.txt"
    if not names.is_file():
        raise FileNotFoundError(f"MTD needs the list of its training images: put mtd_train_filenames.txt into {root}")
    train = {Path(line.strip()).name for line in names.read_text().splitlines()}
    for folder in sorted(root.glob("MT_*")):
        kind = folder.name.removeprefix("MT_").lower()
        for path in images(folder / "Imgs"):
            if path.suffix.lower() == ".jpg":
                if kind == "free":
                    yield Record(str(path), path, "mtd", "train" if path.name in train else "test")
                else:
                    yield Record(str(path), path, "mtd", "test", kind, path.with_suffix(".png"))


LAYOUTS = {
    "visa": Layout(
        lambda root: (root / "split_csv" / "1cls.csv").is_file(), lambda root, _: visa(root), "split_csv/1cls.csv"
    ),
    "mtd": Layout(
        lambda root: (root / "MT_Free").is_dir(), lambda root, _: mtd(root), "MT_<class>/Imgs, mtd_train_filenames.txt"
    ),
    "real_iad": Layout(
        real_iad.matches,
        lambda root, _: real_iad.read(root),
        "realiad_<size>/<category> and realiad_jsons/realiad_jsons/<category>.json",
    ),
    "ksdd2": Layout(lambda root: _is_ksdd2(root), ksdd2, "train and test with <id>.png and <id>_GT.png"),
    "mvtec": Layout(
        lambda root: bool(_categories(root)),
        lambda root, _: mvtec(root),
        "train/good, test/good, test/<defect> and ground_truth/<defect>/<name>_mask.png",
    ),
    "flat": Layout(lambda root: True, lambda root, _: flat(root), "normal images only"),
}
"""All folder layouts, in the order in which "auto" tries them."""


def _name(folder: Path) -> str:
    """The name of a folder, or of the link to it."""
    return Path(os.path.abspath(folder)).name


def _split(folder: Path, split: str) -> Path | None:
    """The subfolder of a split."""
    found = [path for path in folders(folder) if re.fullmatch(SPLITS[split], path.name, re.IGNORECASE)]
    if len(found) > 1:
        raise ValueError(f"one folder of {split} images is expected, got {found[0]} and {found[1]}: merge them")
    return found[0] if found else None


def _holds_labels(folder: Path) -> bool:
    """Whether a folder beside train and test holds masks under another name; labels may also be boxes, in text."""
    is_named_so = re.fullmatch(r"labels?|annotations?|seg(ment(ation)?s?)?", folder.name, re.IGNORECASE)
    return bool(is_named_so and images_below(folder))


def _parts(folder: Path) -> list[Path]:
    """The folders of a category in which every file should be an image."""
    known = [_split(folder, "train"), _split(folder, "test"), _split(folder, "validation")]
    masks = [path for path in folders(folder) if ground_truth.is_mask_folder(path.name)]
    return [*filter(None, known), *masks]


def _categories(root: Path) -> list[Path]:
    """The folders of the categories: the folder itself, or its subfolders."""
    return [root] if _is_category(root) else [path for path in folders(root) if _is_category(path)]


def _is_category(folder: Path) -> bool:
    if _split(folder, "train"):
        return True
    test = _split(folder, "test") or _split(folder, "validation")
    if test is None:
        return False
    inner = [path.name for path in folders(test)]
    with_masks = any(ground_truth.is_mask_folder(name) for name in (*inner, *(path.name for path in folders(folder))))
    return with_masks or any(defect_of(name) == GOOD for name in inner)


def _is_ksdd2(root: Path) -> bool:
    parts = [_split(root, split) for split in ("train", "test")]
    return any(re.search(r"_gt$", path.stem, re.IGNORECASE) for part in parts if part for path in images(part))


def _group(path: Path, folder: Path) -> str:
    """The subfolder of `folder` that an image lies in, which is its group; empty if it lies in `folder` itself."""
    return path.parent.relative_to(folder).as_posix().removeprefix(".")


def _check_flat(root: Path, mixed: bool) -> None:
    """Raises ValueError if a folder in no layout holds masks or, unless `mixed`, anomalous images."""
    paths = images_below(root)
    parents = {path.parent for path in paths}
    below = sorted({part for folder in parents for part in (folder, *folder.parents) if part.is_relative_to(root)})
    if mask := ground_truth.among(paths, root):
        raise _in_no_layout(root, mask.parent, below)
    children: dict[Path, dict[str, Path]] = {}
    for path in below:
        children.setdefault(path.parent, {})[path.name] = path
    for folder in below:
        names = children.get(folder, {})
        normal = [name for name in names if defect_of(name) == GOOD]
        defective = [name for name in names if DEFECTIVE.fullmatch(name) and name not in normal]
        if normal and len(names) > len(normal) and not mixed:
            others = ", ".join(name for name in names if name not in normal)
            raise ValueError(
                f"a folder must hold normal images only, got {normal[0]} next to {others} in {folder}: "
                f"pass {names[normal[0]]}, or move them to train/good and test/<defect>"
            )
        if defective and not mixed:
            raise _in_no_layout(root, names[defective[0]], below)
    if pairs := ground_truth.beside(paths):
        mask, image = next(iter(pairs.items()))
        raise ValueError(
            f"a folder must hold images only, got {mask} that looks like the mask of {image.name}: move masks to "
            "ground_truth/<defect>"
        )


def _in_no_layout(root: Path, subfolder: Path, below: Iterable[Path]) -> ValueError:
    """What is wrong with a folder that holds such a subfolder, and the layout that comes nearest."""
    nested = next((path for path in below if path != root and recognize(path) != "flat"), None)
    if nested is not None:
        advice = f"{nested} has the layout {recognize(nested)}: pass it"
    else:
        names = {path.name.lower() for path in below}
        nearest = "visa" if {"data", "images", "masks"} <= names else "mvtec"
        advice = f"the nearest layout is {nearest}, {LAYOUTS[nearest].expected}: arrange it so"
    return ValueError(
        f"{root} is in no known layout, but has the subfolder {subfolder.relative_to(root)}: {advice}, or pass a "
        "folder of normal images alone"
    )


def _rows(path: Path, root: Path, *options: Any) -> Iterator[Record]:
    try:
        yield from _records(path, root, *options)
    except csv.Error as error:
        raise ValueError(f"{path} is no valid CSV ({error}): save it again") from None


def _records(path: Path, root: Path, columns: dict[str, str], mask_threshold: MaskThreshold = None) -> Iterator[Record]:
    """Reads the records of a CSV file; `columns` maps each field to the name of its column."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text, but {error}: save it again as CSV UTF-8") from None
    with io.StringIO(text, newline="") as file:
        separator = max(",;\t", key=text.partition("\n")[0].count)
        reader = csv.DictReader(file, skipinitialspace=True, delimiter=separator, strict=True)
        header = reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or []]
        if len(named := [name for name in header if name]) > len(set(named)):
            raise ValueError(f"{path} has two columns of one name: its first line is {','.join(header)!r}")
        if columns["image_path"] not in header:
            raise ValueError(f"{path} lacks the column {columns['image_path']}: its first line is {','.join(header)!r}")
        for column in columns.values():
            others = sorted(set(header) - set(columns.values()))
            alike = difflib.get_close_matches(column, others, 1, 0.8)
            alike += [name for name in others if re.split(r"[-_ ]", name)[0].rstrip("s") == column.partition("_")[0]]
            if column not in header and alike:
                raise ValueError(f"{path} has the column {alike[0]} but not {column}: is it meant? Rename or remove it")
        for row in reader:
            fields = ("image_path", "label", "split", "mask_path", "category", "group", "ignore_path")
            cells = ((row.get(columns.get(field, "")) or "").strip() for field in fields)
            image, label, split, mask, category, group, ignore = cells
            defect = defect_of(label)
            line = f"line {reader.line_num} of {path}"
            if any(row.get(None) or ()):
                raise ValueError(f"a line must have no more cells than the first one, in {line}: correct it")
            if not image:
                raise ValueError(f"image_path must not be empty, in {line}: complete or remove the line")
            split = split if columns["split"] in header else "test"
            if split not in ("train", "test"):
                raise ValueError(f"split must be train or test, got {split!r} in {line}: correct it")
            if split == "train" and not defect:
                raise ValueError(f"a training image needs a label, got none in {line}: write good or the defect")
            if re.fullmatch(r"none|null|nan|n/?a|unknown|\?|-1", label, re.IGNORECASE):
                raise ValueError(
                    f"label must be good, a defect, or empty if unknown, got {label!r} in {line}: correct it"
                )
            mask_path = root / mask if mask else None
            if mask_path and defect == GOOD:
                if mask_path.is_file() and read_mask(mask_path, str(mask_path), threshold=mask_threshold).any():
                    raise ValueError(
                        f"a normal image must have an empty mask, got {mask_path} in {line}: correct either"
                    )
                mask_path = None
            record = Record(str(root / image), root / image, category or path.stem, split, defect, mask_path, group)
            yield record._replace(ignore=(root / ignore,) if ignore else ())
