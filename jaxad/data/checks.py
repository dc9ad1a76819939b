"""Faults of data sets: images that cannot be read, missing files, and sizes that do not match."""

import warnings
from collections.abc import Sequence
from pathlib import Path

from jaxad.data import ignore, images
from jaxad.data.images import Preprocess, Size
from jaxad.data.records import Record


def skip_broken(records: Sequence[Record], preprocess: Preprocess) -> tuple[list[Record], list[Record]]:
    """The images that can be read, with their masks, and the others, which a warning names."""

    def error_of(record: Record) -> str:
        try:
            images.read(record.image, record.path, preprocess)
            for mask in record.masks:
                images.read_mask(mask, f"the mask of {record.path}")
            check_mask_size(record)
            ignore.ignored(preprocess, images.size_of(record.image, record.path), record.ignore, record.path)
        except (ValueError, OSError) as error:
            return str(error)
        return ""

    errors = images.in_threads(error_of, records)
    if n := sum(map(bool, errors)):
        listed = "; ".join(filter(None, errors))
        warnings.warn(f"{n} of {len(records)} images cannot be read and are left out: {listed}", stacklevel=3)
    sound, broken = (
        [record for record, error in zip(records, errors, strict=True) if bool(error) == wanted]
        for wanted in (False, True)
    )
    return sound, broken


def check(records: Sequence[Record], preprocess: Preprocess) -> None:
    """Reports the faults that show without decoding: missing files and masks, and sizes that do not match."""
    for record in records:
        if isinstance(record.image, Path) and not record.image.is_file():
            raise FileNotFoundError(f"image file not found: {record.path}")
        for mask in record.ignore:
            if isinstance(mask, Path) and not mask.is_file():
                raise FileNotFoundError(f"ignore mask not found: {mask} of {record.path}")
    with_mask = [record for record in records if record.mask is not None]
    without_mask = [record.path for record in records if record.label == 1 and record.mask is None]
    if with_mask and without_mask:
        raise ValueError(
            "either all anomalous images need a mask or none, but "
            f"{len(without_mask)} of them have none, the first is {without_mask[0]}"
        )
    images.in_threads(check_mask_size, [record for record in with_mask if not callable(record.mask)])
    if preprocess.resize is None:
        files_and_arrays = [record for record in records if not callable(record.image)]
        sizes = images.in_threads(lambda record: images.size_of(record.image, record.path), files_and_arrays)
        for record, size in zip(files_and_arrays, sizes, strict=True):
            if preprocess.output_size(size, record.path) != preprocess.output_size(sizes[0]):
                raise mixed_sizes(record.path, size, files_and_arrays[0].path, sizes[0])


def check_mask_size(record: Record) -> None:
    """Raises ValueError if a mask and its image differ in size."""
    size = images.size_of(record.image, record.path) if record.masks else None
    for source in record.masks:
        mask_size = images.size_of(source, f"the mask of {record.path}")
        if size and mask_size != size:
            raise ValueError(
                f"a mask must have the size of its image, got {mask_size[0]} x {mask_size[1]} for the "
                f"{size[0]} x {size[1]} image {record.path}: recreate the mask"
            )


def mixed_sizes(path: str, size: Size, first_path: str, first: Size) -> ValueError:
    """The error of two images that differ in size."""
    return ValueError(
        f"without resize all images must have the same size, got {size[0]} x {size[1]} in {path} but "
        f"{first[0]} x {first[1]} in {first_path}: set resize (--image-size)"
    )
