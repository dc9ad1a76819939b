"""Regions to ignore: pixels whose content changes no score, such as a clock, a label or the background.

An image is filled there, in fit and in score, with what lies around: mirrored at the edge of the region. So nothing of
the content is left, and no edge that would look like a defect.
"""

import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image
from scipy import ndimage

from jaxad.data.images import ImageError, Preprocess, Size, Source, read_mask


def regions(masks: Any) -> tuple[bytes, ...]:
    """Masks as `Preprocess.ignore` has them: PNG files in memory, so that a model keeps what it was fitted with.

    Args:
        masks: One or several: a file, an array (h, w), or what this function returned. Pixels that are set are ignored.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A mask cannot be decoded, or marks no pixel or all of them.
    """
    return tuple(dict.fromkeys(map(_region, masks if isinstance(masks, list | tuple) else [masks])))


def _region(mask: Any) -> bytes:
    if isinstance(mask, bytes):
        return mask
    source = Path(mask) if isinstance(mask, str | Path) else mask if isinstance(mask, Image.Image) else np.asarray(mask)
    name = f"the ignore mask {mask}" if isinstance(source, Path) else "the ignore mask"
    try:
        pixels = read_mask(source, name)
    except ImageError as error:  # no image of the data set
        raise ValueError(str(error)) from error
    if pixels.all() or not pixels.any():
        share = "all" if pixels.all() else "none"
        raise ValueError(f"{name} must mark what to ignore and leave the rest, but it marks {share} of its pixels")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def ignored(preprocess: Preprocess, size: Size, own: Sequence[Source], name: str) -> Bool[np.ndarray, "h w"] | None:
    """The pixels of a preprocessed image that do not count; None if all do.

    Around the image's own masks, that is also a margin: features there see what fills the masks, and images of the fit,
    which lack them, have nothing like it. The masks of all images need none.

    Args:
        preprocess: Its `ignore` holds for all images.
        size: (height, width) of the original image.
        own: The image's own masks.
        name: The name of the image in error messages.

    Raises:
        ValueError: A mask cannot be decoded or has other proportions than the image, or no pixel is left.
    """
    if not preprocess.ignore and not own:
        return None
    pixels = shared = _of_all(preprocess, size, name)
    if own:
        marked = _own(preprocess, size, own, name)
        margin = preprocess.ignore_margin * min(marked.shape)
        pixels = shared | (ndimage.distance_transform_edt(~marked) <= margin if marked.any() else marked)
    if pixels.all():
        grown = " and their margin (ignore_margin)" if own else ""
        raise ValueError(f"masks of what to ignore{grown} must leave pixels that count, but leave none of {name}")
    return pixels


def origins(pixels: Bool[np.ndarray, "h w"]) -> Int[np.ndarray, "h w"]:
    """The position in the flattened image that every pixel is filled from: its own, or the mirrored one if ignored.

    Where the mirrored one is outside of the image or ignored itself, it is the nearest that is not.
    """
    nearest: Any = ndimage.distance_transform_edt(pixels, return_distances=False, return_indices=True)
    mirrored = 2 * nearest - np.indices(pixels.shape)
    inside = ((mirrored >= 0) & (mirrored < np.array(pixels.shape)[:, None, None])).all(0)
    mirrored = np.where(inside, mirrored, nearest)
    mirrored = np.where(pixels[tuple(mirrored)], nearest, mirrored)
    return mirrored[0] * pixels.shape[1] + mirrored[1]


def fill(
    image: UInt8[np.ndarray, "h w 3"], preprocess: Preprocess, size: Size, own: Sequence[Source], name: str
) -> UInt8[np.ndarray, "h w 3"]:
    """A preprocessed image without what its masks mark; arguments and errors as for `ignored`."""
    if ignored(preprocess, size, own, name) is None:
        return image
    if not own:
        return image.reshape(-1, 3)[_shared_origins(preprocess, size)]
    return image.reshape(-1, 3)[origins(_of_all(preprocess, size, name) | _own(preprocess, size, own, name))]


def _of_all(preprocess: Preprocess, size: Size, name: str) -> Bool[np.ndarray, "h w"]:
    try:
        return _shared(preprocess, size)
    except _Unfit as error:
        raise ValueError(f"{error} in {name}: draw the mask on such an image") from None


def _own(preprocess: Preprocess, size: Size, own: Sequence[Source], name: str) -> Bool[np.ndarray, "h w"]:
    masks = [read_mask(mask, f"the ignore mask of {name}") for mask in own]
    try:
        return np.logical_or.reduce([_covered(mask, preprocess, size) for mask in masks])
    except _Unfit as error:
        raise ValueError(f"{error} in {name}: draw the mask on such an image") from None


class _Unfit(ValueError):
    """A mask has other proportions than its image."""


@functools.lru_cache(maxsize=16)
def _shared(preprocess: Preprocess, size: Size) -> Bool[np.ndarray, "h w"]:
    masks = [read_mask(lambda mask=mask: mask, "the ignore mask") for mask in preprocess.ignore]
    covered = [_covered(mask, preprocess, size) for mask in masks]
    return np.logical_or.reduce([np.zeros(preprocess.output_size(size), bool), *covered])


@functools.lru_cache(maxsize=16)
def _shared_origins(preprocess: Preprocess, size: Size) -> Int[np.ndarray, "h w"]:
    return origins(_shared(preprocess, size))


def _covered(mask: Bool[np.ndarray, "_ _"], preprocess: Preprocess, size: Size) -> Bool[np.ndarray, "h w"]:
    """The pixels of a preprocessed image of `size` that any marked pixel has a part in."""
    if abs(mask.shape[0] * size[1] - mask.shape[1] * size[0]) >= max(*size, *mask.shape):
        raise _Unfit(
            f"an ignore mask must have the proportions of its image, got {mask.shape[0]} x {mask.shape[1]} for "
            f"{size[0]} x {size[1]}"
        )
    image: Any = Image.fromarray(mask.astype(np.float32))
    image = image.resize(size[::-1], Image.Resampling.NEAREST) if mask.shape != size else image
    resized = preprocess.resize or size
    pixels = np.asarray(image.resize(resized[::-1], Image.Resampling.BILINEAR) if resized != size else image)
    return pixels[preprocess.window(resized)] > 0
