"""`Dataset`, the lazily decoded images of one category and split, and `open_data`, which opens any source.

A reader is a small function that yields one `Record` per image. Checks, grouping by category and decoding are shared.
To add a folder layout, write a reader and add it to `jaxad.data.folders.LAYOUTS`.
"""

import contextlib
import dataclasses
import functools
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Bool, Int32, UInt8

from jaxad.data import checks, folders, images, multipage, repeats
from jaxad.data.arrays import image_list
from jaxad.data.images import Preprocess, Size
from jaxad.data.records import GOOD, Record


class Split(NamedTuple):
    """The training and the test set of one category."""

    train: "Dataset"
    test: "Dataset | None"


class Arrays(NamedTuple):
    """Images in memory: (n, h, w) or (n, h, w, 1|3|4), uint8, uint16 or float in [0, 1]."""

    train: Any
    """Normal images."""
    test: Any = None
    labels: Any = None
    """(n,) of the test images: 0 normal, 1 anomalous. None: derived from the masks, or unknown without masks."""
    masks: Any = None
    """(n, h, w) of the test images: bool, or numbers that are compared with `mask_threshold`."""
    groups: Any = None
    """(n,) of the training images: the part that each one shows, as `Record.group`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """The images of one category and split. Images are decoded on request and not cached."""

    name: str
    category: str
    split: str
    records: tuple[Record, ...]
    preprocess: Preprocess
    mask_threshold: int
    has_masks: bool
    left_out: tuple[str, ...] = ()
    """The names of images that cannot be read, where `open_data` skips these."""
    errors: dict[int, str] | None = None
    """Where they are kept: why the images at these positions cannot be read, which are black. None: raises."""

    def __len__(self) -> int:
        return len(self.records)

    @functools.cached_property
    def paths(self) -> tuple[str, ...]:
        """The name of each image: its path, its TFDS id, or "array[3]"."""
        return tuple(record.path for record in self.records)

    @functools.cached_property
    def labels(self) -> Int32[np.ndarray, "n"]:
        """0 normal, 1 anomalous, -1 unknown (never in a training set)."""
        return np.array([record.label for record in self.records], np.int32)

    @functools.cached_property
    def defects(self) -> tuple[str, ...]:
        """The kind of defect of each image; "good" for normal ones."""
        return tuple(record.defect for record in self.records)

    @functools.cached_property
    def groups(self) -> tuple[str, ...]:
        """The part that each image shows; an image of which nothing is known is a group of its own."""
        return tuple(record.group or f"image {i}" for i, record in enumerate(self.records))

    @functools.cached_property
    def repeats(self) -> str:
        """What makes several images look like shots of one part; empty if nothing does, or if there are groups.

        Decodes at most `repeats.SAMPLE` images.
        """
        if any(record.group for record in self.records):
            return ""
        names = repeats.alike_names(self.paths)
        if names:
            return f"most file names differ in the last part only, as {names[0]} and {names[1]} do"
        if len(self) < repeats.LEAST:
            return ""
        small = dataclasses.replace(self, preprocess=Preprocess((repeats.SIDE, repeats.SIDE)))
        share = repeats.near_duplicates(small.images(repeats.sample(len(self))))
        return f"{share:.0%} of the images have near duplicates" if share >= 0.5 else ""

    @functools.cached_property
    def image_size(self) -> Size:
        """(height, width) after preprocessing, of the first image that can be read."""
        first = 0
        while self.errors is not None and self.preprocess.resize is None and first < len(self) - 1:
            with contextlib.suppress(ValueError, OSError):
                self.original_size(first)
                break
            first += 1
        return self.preprocess.output_size(self.preprocess.resize or self.original_size(first))

    def images(self, indices: Iterable[SupportsIndex]) -> UInt8[np.ndarray, "b h w 3"]:
        """Decodes and preprocesses the images at `indices` in parallel.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file cannot be decoded, or the images differ in size and there is no `resize`.
        """
        rows = [int(i) for i in indices]
        batch = np.zeros((len(rows), *self.image_size, 3), np.uint8)

        def load(position: int) -> None:
            record = self.records[rows[position]]
            try:
                image = images.read(record.image, record.path, self.preprocess)
                if image.shape[:2] != self.image_size:
                    raise checks.mixed_sizes(record.path, image.shape[:2], self.records[0].path, self.image_size)
                batch[position] = image
            except (ValueError, OSError) as error:
                if self.errors is None:
                    raise
                self.errors[rows[position]] = str(error)

        images.in_threads(load, range(len(rows)))
        return batch

    def masks(self, indices: Iterable[SupportsIndex]) -> Bool[np.ndarray, "b h w"] | None:
        """Decodes the masks at `indices`, preprocessed like the images. The masks of normal images are empty.

        Returns:
            The masks, or None if the data set has none.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file cannot be decoded, or a mask and its image differ in size.
        """
        if not self.has_masks:
            return None
        records = [self.records[i] for i in indices]
        batch = np.zeros((len(records), *self.image_size), np.bool_)

        def load(position: int) -> None:
            record = records[position]
            if record.mask is not None:
                checks.check_mask_size(record)
                batch[position] = images.read_mask(
                    record.mask, f"the mask of {record.path}", self.preprocess, self.mask_threshold
                )

        images.in_threads(load, range(len(records)))
        return batch

    def original(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """The image at its original resolution, upright."""
        return images.read(self.records[index].image, self.records[index].path)

    def original_size(self, index: int) -> Size:
        """(height, width) of `original(index)`, from the file's header."""
        return images.size_of(self.records[index].image, self.records[index].path)

    def subset(self, indices: Any) -> "Dataset":
        """The images at `indices`: integers, a boolean mask or a slice."""
        positions = np.arange(len(self))[indices if isinstance(indices, slice) or len(indices) else slice(0)]
        errors = None if self.errors is None else {}
        return dataclasses.replace(self, records=tuple(self.records[i] for i in positions), errors=errors)

    def with_bits(self, bits: int | None) -> "Dataset":
        """The same images, whose integers have this depth.

        Raises:
            ValueError: the data set says another depth.
        """
        if self.preprocess.bits not in (None, bits):
            raise ValueError(f"images must have the bits of the model, {bits}, got {self.preprocess.bits}: omit bits")
        return dataclasses.replace(self, preprocess=self.preprocess._replace(bits=bits))


def unite(datasets: Sequence[Dataset], category: str) -> Dataset:
    """Merges the images of several categories into one data set. Groups of the same name stay apart."""
    records = tuple(
        record._replace(group=record.group and f"{data.category}/{record.group}")
        for data in datasets
        for record in data.records
    )
    left_out = tuple(name for data in datasets for name in data.left_out)
    return dataclasses.replace(datasets[0], category=category, records=records, left_out=left_out)


def open_data(
    source: Any,
    *,
    category: str | None = None,
    preprocess: Preprocess = images.DEFAULT,
    mask_threshold: int = 0,
    layout: str = "auto",
    train_anomalies: bool = False,
    group_by: str | None = None,
    pages: bool = False,
    broken: Literal["refuse", "skip", "keep"] = "refuse",
) -> dict[str, Split]:
    """Opens a data set from any supported source.

    Args:
        source: a folder (of normal images, or in one of the layouts of `folders.LAYOUTS`), a CSV file, one image file,
            a list of image files, "tfds:NAME" or "tfds:NAME:DATA_DIR", "demo", an array of normal images, a list of
            arrays, of images of Pillow or of encoded files as bytes, an `Arrays`, or a mapping from categories to such.
        category: the only category to open; None or "all" opens all of them.
        preprocess: resize, crop and depth.
        mask_threshold: a mask pixel is anomalous if its value is above this threshold.
        layout: one of `folders.LAYOUTS`, or "auto" to detect it. "flat" reads any folder as one set of images.
        train_anomalies: keep anomalous images in the training split instead of dropping them.
        group_by: a regular expression, searched in every path below the data set's folder (of a list of files: in the
            path as given; of TFDS: in NAME/ID). What its parentheses match is the image's group; several are joined.
            It replaces the groups of the source.
        pages: read all pages or frames of a file, each as an image: "scan.tif[0]", "scan.tif[1]" ... Otherwise only the
            first is read, with a warning.
        broken: what to do with images that cannot be read. "refuse" raises the error, of most of them when they are
            read; "skip" decodes all images at once and leaves those out, with a warning that names them; "keep" neither
            looks for them nor raises: they are black, and listed in `Dataset.errors` once they have been read.

    Returns:
        The training and test set of each category, in alphabetical order.

    Raises:
        FileNotFoundError: the source or one of its files does not exist.
        ValueError: the source is invalid: no images, no normal training images, an unknown category or layout, a broken
            CSV file, floats outside [0, 1], a mask that differs from its image in size, masks for only some of the
            anomalous images, images of different sizes without `resize`, or a training image that `group_by` does not
            match.
    """
    preprocess.check()
    name, read = _read(source, layout)
    categories: dict[str, list[Record]] = {}
    for record in read:
        members = categories.setdefault(record.category, [])
        if category in (None, "all", record.category):
            members.append(record)
    if not categories:
        raise ValueError(f"no images found in {source}: give a folder of images such as .png, .jpg or .tif")
    if category not in (None, "all", *categories):
        raise ValueError(f"no category {category!r} in {name}: choose one of {', '.join(sorted(categories))}")
    splits = {}
    for key in sorted(key for key, members in categories.items() if members):
        members = [r for r in categories[key] if train_anomalies or r.split != "train" or r.label == 0]
        members = members if group_by is None else list(_grouped(members, group_by, source))
        if pages:
            members = list(multipage.split(members))
        elif note := multipage.note(members):
            warnings.warn(note, stacklevel=2)
        members, unread = checks.skip_broken(members, preprocess) if broken == "skip" else (members, ())
        parts = {split: tuple(r for r in members if r.split == split) for split in ("train", "test")}
        if not any(record.label == 0 for record in parts["train"]):
            raise ValueError(
                f"category {key!r} of {name} has no normal training images: expected train/good, or rows with split "
                "train and label good"
            )
        if broken != "keep":
            checks.check(members, preprocess)
        has_masks = any(record.mask is not None for record in members)
        options = (preprocess, mask_threshold, has_masks)
        train, test = (
            Dataset(name, key, split, part, *options, tuple(record.path for record in unread if record.split == split))
            for split, part in parts.items()
        )
        if broken == "keep":
            train, test = (dataclasses.replace(data, errors={}) for data in (train, test))
        splits[key] = Split(train, test if len(test) else None)
    return splits


def _read(source: Any, layout: str) -> tuple[str, Iterator[Record]]:
    """Returns the name of the data set and its records."""
    if isinstance(source, str) and source.startswith("tfds:"):
        from jaxad.data import tfds

        return tfds.read(source)
    if isinstance(source, str) and source == "demo":
        from jaxad.data import demo

        return "demo", demo.records()
    if isinstance(source, str | Path):
        return folders.read(Path(source), layout)
    if isinstance(source, Mapping):
        return "arrays", (record for key, value in source.items() for record in _array_records(str(key), value))
    if isinstance(source, Sequence) and all(isinstance(item, str | Path) for item in source):
        return "files", folders.files([Path(item) for item in source])
    return "arrays", _array_records("arrays", source)


def _grouped(records: Iterable[Record], group_by: str, source: Any) -> Iterator[Record]:
    """The records with the groups that a regular expression finds in their paths."""
    try:
        pattern = re.compile(group_by)
    except re.error as error:
        raise ValueError(f"group_by must be a regular expression, got {group_by!r} ({error})") from None
    if not pattern.groups:
        raise ValueError(rf"group_by must have parentheses around the group, as in '(part\d+)', got {group_by!r}")
    root = Path(source) if isinstance(source, str | Path) and Path(source).exists() else None
    for record in records:
        below = root if root is None or root.is_dir() else root.parent
        path = Path(os.path.relpath(record.path, below) if below else record.path).as_posix()
        match = pattern.search(path)
        group = " ".join(filter(None, match.groups())) if match else ""
        if not group and record.split == "train":
            raise ValueError(f"group_by {group_by!r} finds no group in {path}: it must match every training image")
        yield record._replace(group=group)


def _array_records(category: str, value: Any) -> Iterator[Record]:
    arrays = value if isinstance(value, Arrays) else Arrays(value)
    train = image_list(arrays.train, "train")
    groups = [""] * len(train) if arrays.groups is None else [str(group) for group in arrays.groups]
    if len(groups) != len(train):
        raise ValueError(f"groups must have one entry per training image ({len(train)}), got {len(groups)}")
    for i, (image, group) in enumerate(zip(train, groups, strict=True)):
        yield Record(f"array[{i}]", image, category, "train", group=group)
    if arrays.test is None:
        if arrays.labels is not None or arrays.masks is not None:
            raise ValueError("labels and masks belong to test images, but test is None: pass Arrays(train, test, ...)")
        return
    test = image_list(arrays.test, "test")
    masks = None if arrays.masks is None else [np.asarray(mask) for mask in arrays.masks]
    if arrays.labels is not None:
        labels = np.asarray(arrays.labels).tolist()
    elif masks is not None:
        labels = [int(mask.any()) for mask in masks]
    else:
        labels = [-1] * len(test)
    for kind, values in (("labels", labels), ("masks", masks)):
        if values is not None and len(values) != len(test):
            raise ValueError(f"{kind} must have one entry per test image ({len(test)}), got {len(values)}")
    defects = {0: GOOD, 1: "anomalous", -1: ""}
    for i, (image, label) in enumerate(zip(test, labels, strict=True)):
        if label not in defects:
            raise ValueError(f"labels must be 0 (normal) or 1 (anomalous), got {label!r} at position {i}")
        mask = masks[i] if masks is not None and label else None
        yield Record(f"array[{i}]", image, category, "test", defects[label], mask)
