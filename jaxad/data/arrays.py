"""Images in memory: arrays of any library that numpy understands, images of Pillow, and encoded files."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jaxad.data import images
from jaxad.data.images import MaskThreshold, Source
from jaxad.data.records import GOOD, Record

CHANNELS = (1, 3, 4)


class Arrays(NamedTuple):
    """Images in memory: (n, h, w) or (n, h, w, 1|3|4), uint8, uint16 or float in [0, 1]."""

    train: Any = None
    """Normal images."""
    test: Any = None
    labels: Any = None
    """(n,) of the test images: 0 normal, 1 anomalous. None: derived from the masks, or unknown without masks."""
    masks: Any = None
    """(n, h, w) of the test images: bool, or numbers that are compared with `mask_threshold`; or a list of arrays,
    files, encoded files, images of Pillow, or None for a normal image."""
    groups: Any = None
    """(n,) of the training images: the part that each one shows, as `Record.group`; None if unknown."""


def with_batch_axis(source: Any) -> Any:
    """A single image as a batch of one; anything else as it is."""
    if isinstance(source, bytes | Image.Image):
        return [source]
    if hasattr(source, "ndim") and _is_image(source.shape):
        return np.asarray(source)[None]
    return source


def image_list(stack: Any, kind: str) -> Sequence[np.ndarray | Image.Image | bytes | Path]:
    """Checks a batch of images or a list of them, and returns the images one by one.

    Args:
        stack: an array (n h w) or (n h w 1|3|4), an image of Pillow, an encoded file, or a list of images.
        kind: the name of the batch in error messages.

    Raises:
        ValueError: the shape is that of no batch of images, or may be that of one image with its channels first.
        ImageError: the type is not supported, or floats lie outside [0, 1].
    """
    if isinstance(stack, bytes | Image.Image):
        stack = [stack]
    if isinstance(stack, list | tuple):
        return [_image(item, f"{kind}[{i}]") for i, item in enumerate(stack)]
    array = np.asarray(stack)
    if array.ndim == 3 and _is_image(array.shape):
        raise ValueError(f"images must have a batch axis, got one image of shape {array.shape}: pass image[None]")
    if array.ndim == 3 and array.shape[0] in CHANNELS[1:]:
        raise ValueError(
            f"{kind} of shape {array.shape} may be one image with its channels first or {array.shape[0]} gray images: "
            "pass np.moveaxis(image, 0, -1)[None] or images[..., None]"
        )
    if array.ndim not in (3, 4) or (array.ndim == 4 and not _is_image(array.shape[1:])) or 0 in array.shape:
        raise ValueError(
            f"{kind} must have shape (n, h, w) or (n, h, w, 1|3|4), got {array.shape} of {array.dtype}"
            + _channels_first(array.shape[1:])
        )
    images.to_uint8(array if np.issubdtype(array.dtype, np.floating) else array[:1], kind)
    return list(array)


def _image(item: Any, name: str) -> np.ndarray | Image.Image | bytes | Path:
    if isinstance(item, str | Path):
        return Path(item)
    if isinstance(item, bytes):
        return item
    if isinstance(item, Image.Image):
        images.load(item, name)
        return item
    array = np.asarray(item)
    if not _is_image(array.shape) or 0 in array.shape:
        hint = _channels_first(array.shape)
        raise ValueError(f"{name} must have shape (h, w) or (h, w, 1|3|4), got {array.shape} of {array.dtype}{hint}")
    images.to_uint8(array, name)
    return array


def _mask(mask: Any) -> Source | None:
    if mask is None or isinstance(mask, bytes | Image.Image):
        return mask
    return Path(mask) if isinstance(mask, str | Path) else np.asarray(mask)


def _is_image(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 or (len(shape) == 3 and shape[2] in CHANNELS)


def _channels_first(shape: tuple[int, ...]) -> str:
    is_so = len(shape) == 3 and shape[0] in CHANNELS
    return f" with {shape[0]} channels first: move them last, as np.moveaxis(image, -3, -1) does" if is_so else ""


def array_records(category: str, value: Any, mask_threshold: MaskThreshold) -> Iterator[Record]:
    """The records of arrays, or of an `Arrays`."""
    arrays = value if isinstance(value, Arrays) else Arrays(value)
    train = [] if arrays.train is None and arrays.test is not None else image_list(arrays.train, "train")
    groups = (
        [""] * len(train)
        if arrays.groups is None
        else ["" if group is None or group != group else str(group) for group in arrays.groups]
    )
    if len(groups) != len(train):
        raise ValueError(f"groups must have one entry per training image ({len(train)}), got {len(groups)}")
    for i, (image, group) in enumerate(zip(train, groups, strict=True)):
        yield Record(f"array[{i}]", image, category, "train", group=group)
    if arrays.test is None:
        if arrays.labels is not None or arrays.masks is not None:
            raise ValueError("labels and masks belong to test images, but test is None: pass Arrays(train, test, ...)")
        return
    test = image_list(arrays.test, "test")
    masks = None if arrays.masks is None else [_mask(mask) for mask in arrays.masks]
    marking = [
        mask is not None and bool(images.read_mask(mask, f"mask {i}", threshold=mask_threshold).any())
        for i, mask in enumerate(masks or ())
    ]
    if arrays.labels is not None:
        labels = np.asarray(arrays.labels).ravel().tolist()
    else:
        labels = [-1] * len(test) if masks is None else list(map(int, marking))
    for kind, values in (("labels", labels), ("masks", masks)):
        if values is not None and len(values) != len(test):
            raise ValueError(f"{kind} must have one entry per test image ({len(test)}), got {len(values)}")
    defects = {0: GOOD, 1: "anomalous", -1: ""}
    for i, (image, label) in enumerate(zip(test, labels, strict=True)):
        if label not in defects:
            raise ValueError(f"labels must be 0 (normal) or 1 (anomalous), got {label!r} at position {i}")
        if label == 0 and masks is not None and marking[i]:
            raise ValueError(f"an image with the label 0 must have an empty mask, but that at position {i} is not")
        mask = masks[i] if masks is not None and label else None
        yield Record(f"array[{i}]", image, category, "test", defects[label], mask)
