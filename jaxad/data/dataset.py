"""`Dataset`, the lazily decoded images of one category and split, and `open_data`, which opens any source.

A reader is a small function that yields one `Record` per image. Checks, grouping by category and decoding are shared.
To add a folder layout, write a reader and add it to `jaxad.data.folders.LAYOUTS`.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Bool, Int32, UInt8

from jaxad.data import checks, folders, ignore, images, multipage, repeats
from jaxad.data.arrays import array_records
from jaxad.data.images import MaskThreshold, Preprocess, Size, Source
from jaxad.data.records import Record


class Split(NamedTuple):
    """The training and the test set of one category."""

    train: "Dataset"
    """Empty of a source that has test images only."""
    test: "Dataset | None"


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """The images of one category and split. Images are decoded on request and not cached."""

    name: str
    category: str
    split: str
    records: tuple[Record, ...]
    preprocess: Preprocess
    mask_threshold: MaskThreshold
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
                batch[position] = ignore.fill(image, *self._to_ignore(record)) if self.ignores else image
            except (ValueError, OSError) as error:
                if self.errors is None:
                    raise
                self.errors[rows[position]] = str(error)

        images.in_threads(load, range(len(rows)))
        return batch

    @functools.cached_property
    def ignores(self) -> bool:
        """Whether there are regions to ignore, which `images` fills from what lies around."""
        return bool(self.preprocess.ignore) or any(record.ignore for record in self.records)

    def ignored(self, indices: Iterable[SupportsIndex]) -> Bool[np.ndarray, "b h w"] | None:
        """Which pixels of the images at `indices` do not count; None if all pixels of all images do.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a mask cannot be decoded, has other proportions than its image, or leaves no pixel.
        """
        if not self.ignores:
            return None
        found = images.in_threads(self._ignored, indices)
        nothing = np.zeros(self.image_size, np.bool_)
        return np.array([nothing if one is None else one for one in found], np.bool_).reshape(-1, *self.image_size)

    def _ignored(self, index: SupportsIndex) -> Bool[np.ndarray, "h w"] | None:
        try:
            return ignore.ignored(*self._to_ignore(self.records[index]))
        except (ValueError, OSError):
            if self.errors is None:
                raise
            return None  # of an image that cannot be read

    def ignoring(self, regions: Iterable[bytes]) -> "Dataset":
        """The same images with more regions of `jaxad.data.ignore.regions` to ignore in all of them."""
        together = ignore.regions((*self.preprocess.ignore, *regions))
        same = together == self.preprocess.ignore
        return self if same else dataclasses.replace(self, preprocess=self.preprocess._replace(ignore=together))

    def also_ignoring(self, regions: Iterable[bytes]) -> "Dataset":
        """The same images with such regions as masks of their own, which the images of the fit did not have."""
        masks = tuple(functools.partial(bytes, region) for region in regions)
        return dataclasses.replace(self, records=tuple(r._replace(ignore=(*r.ignore, *masks)) for r in self.records))

    def _to_ignore(self, record: Record) -> tuple[Preprocess, Size, tuple[Source, ...], str]:
        return self.preprocess, images.size_of(record.image, record.path), record.ignore, record.path

    def masks(self, indices: Iterable[SupportsIndex]) -> Bool[np.ndarray, "b h w"] | None:
        """Decodes the masks at `indices`, preprocessed like the images. The masks of normal images are empty.

        Warns if masks of a test set have gray levels and there is no `mask_threshold`.

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

        def load(position: int) -> int:
            record, gray = records[position], 0
            checks.check_mask_size(record)
            for source in record.masks:
                options = (f"the mask of {record.path}", self.preprocess, self.mask_threshold)
                mask, left_out = images.mask_and_gray(source, *options)
                batch[position] |= mask
                gray += left_out
            return gray

        gray = np.array(images.in_threads(load, range(len(records))))
        empty = [record.path for record, mask in zip(records, batch, strict=True) if record.masks and not mask.any()]
        if empty and self.split == "test":
            warnings.warn(
                f"{len(empty)} of {len(records)} test images of {self.name} are anomalous, but their masks mark no "
                f"pixel at {self.image_size[0]} x {self.image_size[1]}, the first is that of {empty[0]}",
                stacklevel=2,
            )
        if gray.any() and self.split == "test":  # those of a training set are read batch by batch
            warnings.warn(
                f"{np.count_nonzero(gray)} of {len(gray)} masks of {self.name} have gray levels, most that of "
                f"{records[int(gray.argmax())].path}: {gray.sum()} pixels that are not black, but below half of the "
                "maximum, count as normal; a mask threshold of 0 counts them, too",
                stacklevel=2,
            )
        return batch

    def original(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """The image at its original resolution, upright, with what is ignored."""
        return images.read(self.records[index].image, self.records[index].path)

    def original_ignored(self, index: int) -> Bool[np.ndarray, "h w"] | None:
        """Which pixels of `original(index)` do not count; None if all do."""
        whole = dataclasses.replace(self, preprocess=self.preprocess._replace(resize=None, center_crop=None))
        return ignore.ignored(*whole._to_ignore(self.records[index]))

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
    mask_threshold: MaskThreshold = None,
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
        mask_threshold: a mask pixel is anomalous if its value is above this threshold. None: above half of the mask's
            maximum (right for two levels, JPEG and soft edges), or above 0 if that is less than 64 (numbers of
            classes).
        layout: one of `folders.LAYOUTS`, or "auto" to detect it. "flat" reads any folder as one set of images; "any"
            does so with a folder in no layout, whether or not it looks as if all images were normal.
        train_anomalies: keep anomalous images in the training split instead of dropping them.
        group_by: a regular expression, searched in every path below the data set's folder (of a list of files: in the
            path as given; of TFDS: in NAME/ID). What its parentheses match is the image's group; several are joined.
            It replaces the groups of the source.
        pages: read all pages or frames of a file, each as an image: "scan.tif[0]", "scan.tif[1]" ... Otherwise only the
            first is read, with a warning.
        broken: what to do with images that cannot be read. "refuse" raises the error, of most of them when they are
            read; "skip" decodes all images at once and leaves those out, with a warning that names them; "keep" neither
            looks for them nor raises: they are black, and listed in `Dataset.errors` once they have been read.

    Warns with one line if a folder holds files that are not read, and says why.

    Returns:
        The training and test set of each category, in alphabetical order. A source may lack training images.

    Raises:
        FileNotFoundError: the source or one of its files does not exist.
        ValueError: the source is invalid: no images, training images of which none is normal, an unknown category or
            layout, a broken CSV file, floats outside [0, 1], a folder in no known layout that holds defects or masks,
            masks that fit no image, a mask that differs from its image in size, masks for only some of the anomalous
            images, images of different sizes without `resize`, or a training image that `group_by` does not match.
    """
    preprocess.check()
    if mask_threshold is not None and not 0 <= mask_threshold < np.inf:
        raise ValueError(f"mask_threshold must be 0 or more, or None, got {mask_threshold}")
    name, read = _read(source, layout, mask_threshold)
    records = list(read)

    def is_used(record: Record) -> bool:
        return train_anomalies or record.split != "train" or record.label == 0

    categories: dict[str, list[Record]] = {}
    for record in records:
        members = categories.setdefault(record.category, [])
        if category in (None, "all", record.category):
            members.append(record)
    if not categories:
        note = folders.unread(Path(source), layout, []) if isinstance(source, str | Path) else ""
        raise ValueError(f"no images found in {source}: {note or 'give a folder of images such as .png, .jpg or .tif'}")
    if category not in (None, "all", *categories):
        raise ValueError(f"no category {category!r} in {name}: choose one of {', '.join(sorted(categories))}")
    splits = {}
    for key in sorted(key for key, members in categories.items() if members):
        members = [record for record in categories[key] if is_used(record)]
        members = members if group_by is None else list(_grouped(members, group_by, source))
        if pages:
            members = list(multipage.split(members))
        elif note := multipage.note(members):
            warnings.warn(note, stacklevel=2)
        members, unread = checks.skip_broken(members, preprocess) if broken == "skip" else (members, ())
        parts = {split: tuple(r for r in members if r.split == split) for split in ("train", "test")}
        if not any(record.label == 0 for record in parts["train"]) and not parts["test"]:
            raise _no_normals(name, key)
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
    if isinstance(source, str | Path) and (note := folders.unread(Path(source), layout, filter(is_used, records))):
        warnings.warn(note, stacklevel=2)
    return splits


def check_normals(*trains: Dataset) -> None:
    """Raises ValueError if a training set has no normal images, as that of a source that can be evaluated only."""
    for train in trains:
        if not (train.labels == 0).any():
            raise _no_normals(train.name, train.category)


def _no_normals(name: str, category: str) -> ValueError:
    return ValueError(
        f"category {category!r} of {name} has no normal training images: expected train/good, or rows with split train "
        "and label good"
    )


def _read(source: Any, layout: str, mask_threshold: MaskThreshold) -> tuple[str, Iterable[Record]]:
    """Returns the name of the data set and its records."""
    if isinstance(source, str) and source.startswith("tfds:"):
        from jaxad.data import tfds

        return tfds.read(source)
    if isinstance(source, str) and source == "demo":
        from jaxad.data import demo

        return "demo", demo.records()
    if isinstance(source, str | Path):
        return folders.read(Path(source), layout, mask_threshold)
    if isinstance(source, Mapping):
        parts = (array_records(str(key), value, mask_threshold) for key, value in source.items())
        return "arrays", itertools.chain.from_iterable(parts)
    if isinstance(source, Sequence) and all(isinstance(item, str | Path) for item in source):
        return "files", folders.files([Path(item) for item in source])
    return "arrays", array_records("arrays", source, mask_threshold)


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
