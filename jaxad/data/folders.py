"""Readers of folders and CSV files; each yields one `Record` per image."""

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from jaxad.data.images import EXTENSIONS, read_mask
from jaxad.data.records import GOOD, Record, defect_of

OUTPUT_FILES = ("model.safetensors", "scores.jsonl")
"""A subfolder that holds one of these files is output of jaxad (a model, scores, heat maps), not training data."""


class Layout(NamedTuple):
    """How a data set is arranged in a folder."""

    matches: Callable[[Path], bool]
    read: Callable[[Path], Iterator[Record]]


def read(source: Path, layout: str = "auto") -> tuple[str, Iterator[Record]]:
    """Reads a folder, a CSV file or one image.

    Args:
        source: the path.
        layout: a key of `LAYOUTS`, or "auto" for the first that matches.

    Returns:
        The name of the data set and its records.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: there is no such layout, or the path does not fit it.
    """
    if layout != "auto" and layout not in LAYOUTS:
        raise ValueError(f"no layout {layout!r}: choose auto or one of {', '.join(LAYOUTS)}")
    if not source.exists():
        raise FileNotFoundError(f"no such file or folder: {source}")
    if source.is_file():
        return source.stem, table(source) if source.suffix.lower() == ".csv" else files([source])
    name = source.resolve().name
    if layout == "auto":
        layout = recognize(source)
        if layout == "flat":
            _check_normal_only(source)
    return name, LAYOUTS[layout].read(source)


def recognize(folder: Path) -> str:
    """The first layout of `LAYOUTS` that the folder matches; "flat" matches any folder."""
    return next(key for key, candidate in LAYOUTS.items() if candidate.matches(folder))


def files(paths: Iterable[Path], category: str = "files") -> Iterator[Record]:
    """Image files as normal training images."""
    return (Record(str(path), path, category, "train") for path in paths)


def flat(root: Path) -> Iterator[Record]:
    """All images in a folder and its subfolders as normal training images, except those that jaxad wrote."""
    return files(_images_below(root), root.resolve().name)


def mvtec(root: Path) -> Iterator[Record]:
    """MVTec AD: train/good, test/<defect>, ground_truth/<defect>/<stem>_mask.png, for one category or several.

    Normal images may also lie in folders named ok or normal, or directly in train. A folder in train/good,
    test/<defect> and ground_truth/<defect> is a group: train/good/<group>/<stem>.png. Masks are optional; they may lack
    the suffix _mask and be of any image type.
    """
    categories = [root] if _is_category(root) else [path for path in sorted(root.iterdir()) if _is_category(path)]
    for folder in categories:
        category = folder.resolve().name
        for path in _images(folder / "train", "*"):
            yield Record(str(path), path, category, "train")
        for split in ("train", "test"):
            for defect_folder in _folders(folder / split):
                defect = defect_of(defect_folder.name)
                masks = {}
                if defect != GOOD:
                    mask_folder = folder / "ground_truth" / defect_folder.name
                    mask_paths = _images_below(mask_folder)
                    masks = {(_group(path, mask_folder), path.stem.removesuffix("_mask")): path for path in mask_paths}
                for path in _images_below(defect_folder):
                    group = _group(path, defect_folder)
                    yield Record(str(path), path, category, split, defect, masks.get((group, path.stem)), group)


def visa(root: Path) -> Iterator[Record]:
    """VisA: a folder with split_csv/1cls.csv (columns object, split, label, image and mask)."""
    columns = {"category": "object", "split": "split", "label": "label", "image_path": "image", "mask_path": "mask"}
    return _rows(root / "split_csv" / "1cls.csv", root, columns)


def table(path: Path) -> Iterator[Record]:
    """A CSV file with the columns image_path, label, split and, if wanted, mask_path, ignore_path, category and group.

    Paths are relative to the file. The separator is a comma, a semicolon or a tab. The label is good, ok, normal or 0
    for a normal image, empty if unknown (test images only), and the kind of defect otherwise. Images of one group show
    one part. ignore_path is a mask of what to ignore in the image.
    """
    columns = {key: key for key in ("category", "split", "label", "image_path", "mask_path", "group", "ignore_path")}
    return _rows(path, path.parent, columns)


def ksdd2(root: Path) -> Iterator[Record]:
    """KolektorSDD2: train and test hold <id>.png and <id>_GT.png. An image is anomalous if its mask is not empty."""
    for split in ("train", "test"):
        for path in _images(root / split, "*"):
            if not path.stem.endswith("_GT"):
                mask = path.with_name(f"{path.stem}_GT{path.suffix}")
                is_anomalous = read_mask(mask, str(mask)).any()
                defect = "defect" if is_anomalous else GOOD
                yield Record(str(path), path, "ksdd2", split, defect, mask if is_anomalous else None)


def mtd(root: Path) -> Iterator[Record]:
    """Magnetic tile defects as published: MT_<class>/Imgs/<id>.jpg and .png, and DifferNet's mtd_train_filenames.txt.

    The 761 defect-free images of that list are the training set, all others the test set. The masks are noisy: use
    `mask_threshold=127`.
    """
    names = root / "mtd_train_filenames.txt"
    if not names.is_file():
        raise FileNotFoundError(f"MTD needs the list of its training images: put mtd_train_filenames.txt into {root}")
    train = {Path(line.strip()).name for line in names.read_text().splitlines()}
    for folder in sorted(root.glob("MT_*")):
        kind = folder.name.removeprefix("MT_").lower()
        for path in _images(folder / "Imgs", "*"):
            if path.suffix.lower() == ".jpg":
                if kind == "free":
                    yield Record(str(path), path, "mtd", "train" if path.name in train else "test")
                else:
                    yield Record(str(path), path, "mtd", "test", kind, path.with_suffix(".png"))


LAYOUTS = {
    "visa": Layout(lambda root: (root / "split_csv" / "1cls.csv").is_file(), visa),
    "mtd": Layout(lambda root: (root / "MT_Free").is_dir(), mtd),
    "ksdd2": Layout(lambda root: any(root.glob("train/*_GT.*")), ksdd2),
    "mvtec": Layout(lambda root: _is_category(root) or any(_is_category(path) for path in root.iterdir()), mvtec),
    "flat": Layout(lambda root: True, flat),
}
"""All folder layouts, in the order in which "auto" tries them."""


def _is_category(folder: Path) -> bool:
    return (folder / "train").is_dir() or ((folder / "test").is_dir() and (folder / "ground_truth").is_dir())


def _images(folder: Path, pattern: str) -> list[Path]:
    paths = (path for path in folder.glob(pattern) if path.suffix.lower() in EXTENSIONS)
    return sorted(path for path in paths if not path.name.startswith(".") and path.is_file())


def _images_below(folder: Path) -> list[Path]:
    """All images in a folder and its subfolders, without hidden ones and those that jaxad wrote."""
    outputs = {path.parent for name in OUTPUT_FILES for path in folder.rglob(name)} - {folder}
    paths = (path for path in _images(folder, "**/*") if outputs.isdisjoint(path.parents))
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _group(path: Path, folder: Path) -> str:
    """The subfolder of `folder` that an image lies in, which is its group; empty if it lies in `folder` itself."""
    return path.parent.relative_to(folder).as_posix().removeprefix(".")


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.is_dir() and not path.name.startswith("."))


def _check_normal_only(root: Path) -> None:
    """Raises ValueError if a folder has a subfolder of normal images next to others, which may hold defects."""
    subfolders = [path for path in _folders(root) if _images(path, "**/*")]
    normal = [path.name for path in subfolders if defect_of(path.name) == GOOD]
    if normal and len(subfolders) > len(normal):
        others = ", ".join(path.name for path in subfolders if path.name not in normal)
        raise ValueError(
            f"a folder must hold normal images only, got {normal[0]} next to {others} in {root}: "
            f"pass {root / normal[0]}, or move them to train/good and test/<defect>"
        )


def _rows(path: Path, root: Path, columns: dict[str, str]) -> Iterator[Record]:
    """Reads the records of a CSV file; `columns` maps each field to the name of its column."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text, but {error}: save it again as CSV UTF-8") from None
    with io.StringIO(text, newline="") as file:
        separator = max(",;\t", key=text.partition("\n")[0].count)
        reader = csv.DictReader(file, skipinitialspace=True, delimiter=separator)
        header = reader.fieldnames or []
        missing = [columns[key] for key in ("image_path", "label", "split") if columns[key] not in header]
        if missing:
            raise ValueError(f"{path} lacks the columns {', '.join(missing)}: its first line is {','.join(header)!r}")
        for row in reader:
            fields = ("image_path", "label", "split", "mask_path", "category", "group", "ignore_path")
            cells = ((row.get(columns.get(field, "")) or "").strip() for field in fields)
            image, label, split, mask, category, group, ignore = cells
            defect = defect_of(label)
            line = f"line {reader.line_num} of {path}"
            if not image:
                raise ValueError(f"image_path must not be empty, in {line}: complete or remove the line")
            if split not in ("train", "test"):
                raise ValueError(f"split must be train or test, got {split!r} in {line}: correct it")
            if split == "train" and not defect:
                raise ValueError(f"a training image needs a label, got none in {line}: write good or the defect")
            mask_path = root / mask if mask and defect != GOOD else None
            record = Record(str(root / image), root / image, category or path.stem, split, defect, mask_path, group)
            yield record._replace(ignore=(root / ignore,) if ignore else ())
