"""Decodes image files and arrays to RGB uint8, resizes and crops them, and maps heat maps back to the original image.

Formats: gray images are repeated to three channels; 16-bit images are scaled by the full range (65535 becomes 255), or
by that of `Preprocess.bits`; floats must lie in [0, 1]; alpha is composited over black; palettes and CMYK are converted
to RGB; EXIF rotation is applied. An image is the same whether it comes as a file, as its bytes or as its pixels.
"""

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from jaxad.data import deep, masks, tiff
from jaxad.data.decoders import libtiff_errors
from jaxad.host_memory import reserved

Size = tuple[int, int]
"""(height, width)."""


class Page(NamedTuple):
    """One page or frame of a file."""

    file: Path | bytes
    number: int
    """Counted from 0."""


Content = bytes | np.ndarray | Image.Image
"""An encoded file, pixels, or an image of Pillow."""
Source = Path | Page | Content | Callable[[], Content]
"""Where an image comes from: a file or a page of one, its content, or a function that returns the content."""
MaskThreshold = float | None
"""A mask pixel is anomalous above it; None decides by the mask: see `jaxad.data.masks.anomalous`."""

EXTENSIONS = frozenset(
    {
        *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".tif", ".tiff", ".bmp", ".dib", ".gif", ".webp"),
        *(".avif", ".avifs", ".jp2", ".jpc", ".jpf", ".jpx", ".j2c", ".j2k", ".tga", ".icb", ".vda", ".vst", ".qoi"),
        *(".pbm", ".pgm", ".ppm", ".pnm", ".pfm", ".sgi", ".bw", ".rgb", ".rgba", ".ras", ".pcx", ".dcx", ".dds"),
        *(".psd", ".fits", ".fit", ".ico", ".icns", ".cur", ".im", ".msp", ".xbm", ".xpm", ".blp", ".ftc", ".ftu"),
        *(".fli", ".flc", ".pcd", ".pxr"),
    }
)
"""Suffixes of image files that Pillow reads, in lower case."""
PAGED = frozenset({".png", ".apng", ".tif", ".tiff", ".webp", ".avif", ".avifs", ".gif", ".fli", ".flc", ".dcx"})
"""Suffixes of files that may have several pages or frames."""

_ORIENTATION = 0x0112


class ImageError(ValueError):
    """An image cannot be decoded, or its pixel values are invalid."""


class Preprocess(NamedTuple):
    """Applied to every image and mask after decoding: first `resize`, then `center_crop`."""

    resize: Size | None = (224, 224)
    """(height, width) to resize to, with antialiased bilinear weights (masks: nearest pixel). None: no resizing."""
    center_crop: Size | None = None
    """(height, width) of the centered window to keep. None: the whole image."""
    ignore: tuple[bytes, ...] = ()
    """Masks of `jaxad.data.ignore.regions`, resized and cropped likewise. `Dataset` fills what they mark."""
    ignore_margin: float = 0.1
    """Of the shorter side: pixels so near to an image's own mask do not count either (`Record.ignore`)."""
    bits: int | None = None
    """How many bits of integers in more than 8 bits are used: 10 if white is 1023. None: 16, or as the file says."""

    def check(self) -> None:
        """Raises ValueError for a size, margin or depth out of range, or a crop larger than the resized image."""
        if self.bits is not None and (not isinstance(self.bits, int) or not 8 <= self.bits <= 16):
            raise ValueError(f"bits must be an integer from 8 to 16, got {self.bits}")
        for field, size in (("resize", self.resize), ("center_crop", self.center_crop)):
            if size is not None and (len(size) != 2 or min(size) < 1):
                raise ValueError(f"{field} must be two positive numbers (height, width), got {size}")
        if not 0 <= self.ignore_margin < 1:
            raise ValueError(f"ignore_margin must be in [0, 1), got {self.ignore_margin}")
        if self.resize and self.center_crop:
            self.output_size(self.resize)

    def output_size(self, size: Size, name: str = "the resized image") -> Size:
        """The size of an image of `size` after preprocessing. Raises ValueError if the crop does not fit."""
        size = self.resize or size
        if self.center_crop is None:
            return size
        if self.center_crop[0] > size[0] or self.center_crop[1] > size[1]:
            raise ValueError(
                f"center_crop must fit into the image, got {self.center_crop} for {size[0]} x {size[1]} ({name}): "
                "shrink center_crop or enlarge resize"
            )
        return self.center_crop

    def window(self, size: Size) -> tuple[slice, slice]:
        """The rows and columns that `center_crop` keeps of a resized image of `size`."""
        crop = self.center_crop or size
        top, left = (size[0] - crop[0]) // 2, (size[1] - crop[1]) // 2
        return slice(top, top + crop[0]), slice(left, left + crop[1])


DEFAULT = Preprocess()
ORIGINAL = Preprocess(None)
"""Keeps every image at its original size."""
PAPER = Preprocess((256, 256), (224, 224))
"""The preset of most papers: resize to 256, crop the central 224."""


def to_uint8(array: Shaped[np.ndarray, "..."], name: str, bits: int | None = None) -> UInt8[np.ndarray, "..."]:
    """Converts pixel values to 8 bits.

    Args:
        array: bool, uint8, uint16 or float in [0, 1].
        name: the name of the array in error messages.
        bits: depth of uint16: 2 ** bits - 1 becomes 255; None: 65535 does.

    Raises:
        ImageError: the type is not supported, or values lie outside their range.
    """
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return np.where(array, np.uint8(255), np.uint8(0))
    if array.dtype == np.uint16:
        white, highest = (1 << (bits or 16)) - 1, int(array.max())
        if highest > white:
            raise ImageError(
                f"pixels of {bits} bits must lie in 0..{white}, got {highest} in {name}: set bits (--bits) to the "
                "depth of the camera, and fit again"
            )
        return ((array.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):
            raise ImageError(
                f"float pixels must lie in [0, 1], got {low:.6g} to {high:.6g} in {name}: scale them or pass uint8"
            )
        return np.round(array * 255).astype(np.uint8)
    raise ImageError(f"pixels must be uint8, uint16 or float in [0, 1], got {array.dtype} in {name}")


def read(source: Source, name: str, preprocess: Preprocess = ORIGINAL) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes one image, turns it upright, and preprocesses it.

    Args:
        source: the file, array or function.
        name: the name of the image in error messages.
        preprocess: resize, crop and depth; by default the image keeps its original size.

    Raises:
        FileNotFoundError: there is no such file.
        ImageError: the file cannot be decoded, or its pixel values are invalid.
        ValueError: the crop is larger than the image.
    """
    with _decode(source, name, preprocess.bits) as image:
        image = _to_gray_or_rgb(image, name, preprocess.bits)
        if preprocess.resize:
            image = image.resize((preprocess.resize[1], preprocess.resize[0]), Image.Resampling.BILINEAR)
        pixels = np.asarray(image)
    preprocess.output_size(pixels.shape[:2], name)
    pixels = pixels[preprocess.window(pixels.shape[:2])]
    return np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels


def read_mask(
    source: Source, name: str, preprocess: Preprocess = ORIGINAL, threshold: MaskThreshold = None
) -> Bool[np.ndarray, "h w"]:
    """The mask of `mask_and_gray`."""
    return mask_and_gray(source, name, preprocess, threshold)[0]


def mask_and_gray(
    source: Source, name: str, preprocess: Preprocess = ORIGINAL, threshold: MaskThreshold = None
) -> tuple[Bool[np.ndarray, "h w"], int]:
    """Decodes one mask, resizes it by nearest neighbor and crops it like its image.

    Args:
        source: the file, array or function.
        name: the name of the mask in error messages.
        preprocess: resize and crop.
        threshold: a pixel is anomalous if its value (`masks.values`) is above, in the units of the file or array. None:
            as in `masks.anomalous`.

    Returns:
        The mask, and how many pixels of the file are gray and not counted by the choice of None.

    Raises the errors of `read`.
    """
    if isinstance(source, np.ndarray):
        is_mask = source.ndim == 2 or (source.ndim == 3 and source.shape[2] in (1, 3, 4))
        if not is_mask or source.size == 0 or source.dtype.kind not in "biuf":
            raise ImageError(
                f"a mask must have shape (h, w) or (h, w, 1|3|4) and hold numbers or bool, got {source.shape} of "
                f"{source.dtype} for {name}"
            )
        levels = masks.brightest(source)
    else:
        with _decode(source, name) as image:
            assert isinstance(image, Image.Image)
            levels = masks.values(image)
    try:
        mask, gray = masks.anomalous(levels, threshold)
    except ValueError as error:
        raise ImageError(f"{error}, in {name}: correct it") from None
    height, width = mask.shape
    resized = preprocess.resize or (height, width)
    rows, columns = (
        ((2 * np.arange(new) + 1) * old // (2 * new))[window]
        for new, old, window in zip(resized, (height, width), preprocess.window(resized), strict=True)
    )
    return mask[rows[:, None], columns], gray


def size_of(source: Source, name: str) -> Size:
    """The original (height, width), upright. Reads only the header of a file. Raises the errors of `read`."""
    if isinstance(source, np.ndarray):
        return source.shape[0], source.shape[1]
    with contextlib.nullcontext(source) if isinstance(source, Image.Image) else _open(source, name) as image:
        return (image.width, image.height) if _is_sideways(image) else (image.height, image.width)


def load(image: Image.Image, name: str) -> None:
    """Decodes an image of Pillow while its file is open. Raises the errors of `read`."""
    with _open(image, name):
        pass


def brightest(source: Source, name: str) -> int | None:
    """The largest integer of an image in 16 bits; None of any other. Raises the errors of `read`."""
    if isinstance(source, np.ndarray):
        return int(source.max()) if source.dtype == np.uint16 else None
    with _decode(source, name, 16) as image:
        if isinstance(image, Image.Image) and (not deep.is_gray(image) or image.mode == "F" or deep.bits_of(image)):
            return None
        return int(np.asarray(image).max())


def page_count(source: Source, name: str) -> int:
    """The number of pages or frames of a file; 1 where it cannot be told."""
    if isinstance(source, bytes) or (isinstance(source, Path) and source.suffix.lower() in PAGED):
        with contextlib.suppress(ValueError, OSError), _open(source, name) as image:
            return getattr(image, "n_frames", 1)
    return 1


def in_threads(function: Callable[[Any], Any], items: Any) -> list[Any]:
    """Computes `[function(item) for item in items]` with one thread per processor, and raises the first error."""
    items = list(items)
    if len(items) == 1:
        return [function(items[0])]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, items))


def to_original(
    heat_map: Float[np.ndarray, "h w"], original_size: Size, preprocess: Preprocess
) -> Float[np.ndarray, "height width"]:
    """Maps a heat map back to the frame of the original image.

    Args:
        heat_map: one value per pixel of the preprocessed image.
        original_size: (height, width) of the original image.
        preprocess: how the image was preprocessed.

    Returns:
        float32, bilinearly resized. The cropped border holds the minimum of the map.

    Raises:
        ValueError: the map does not have the size of the preprocessed image.
    """
    expected = preprocess.output_size(original_size)
    if heat_map.shape != expected:
        raise ValueError(f"the heat map must have the size of the preprocessed image {expected}, got {heat_map.shape}")
    resized = preprocess.resize or original_size
    frame = np.full(resized, heat_map.min(), np.float32)
    frame[preprocess.window(resized)] = heat_map
    if resized == original_size:
        return frame
    height, width = original_size
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR))


@contextlib.contextmanager
def _decode(source: Source, name: str, bits: int | None = None) -> Iterator[Image.Image | np.ndarray]:
    """Opens an image, decodes it in memory that is there for it, and turns it upright.

    With `bits`, colors of 16 bits are uint16 (h w 3|4).
    """
    with _open(source, name, bits) as image:
        tiff.check(image)
        with reserved(_decoding_bytes(image)):
            if bits and deep.is_color(image):
                with _open(source, name) as lower:
                    deep.read_lower_bytes(lower)
                    ImageOps.exif_transpose(lower, in_place=True)
                    ImageOps.exif_transpose(image, in_place=True)
                    yield deep.joined(image, lower)
            else:
                image.info[deep.SCALED] = deep.is_scaled(image)
                ImageOps.exif_transpose(image, in_place=True)
                yield image


@contextlib.contextmanager
def _open(source: Source, name: str, bits: int | None = None) -> Iterator[Image.Image]:
    """Opens an image, and turns any decoder error inside the block into one line that names the file."""
    try:
        content = source() if callable(source) else source
        if isinstance(content, np.ndarray):
            yield _from_array(content, name, bits)
        elif isinstance(content, Image.Image):
            tiff.check(content)
            if deep.is_color(content):
                content.info[deep.UPPER] = True
            if bits and content.info.get(deep.UPPER):
                raise ImageError(
                    f"Pillow has decoded the upper 8 bits of {name} only: give the file itself, or its bytes"
                )
            with reserved(_decoding_bytes(content)):
                content.load()
            image = content.copy()  # not the caller's
            image.format = content.format
            image.info[tiff.TAGS] = getattr(content, tiff.TAGS, {})
            yield image
        else:
            file, page = content if isinstance(content, Page) else (content, 0)
            file = io.BytesIO(file) if isinstance(file, bytes) else file
            with libtiff_errors() as complaints, Image.open(file) as image:
                if page:
                    image.seek(page)
                yield image
            if complaints:
                raise ImageError(f"{name} is damaged ({complaints[0]}): repair or remove it")
    except ImageError:
        raise
    except FileNotFoundError:
        raise FileNotFoundError(f"image file not found: {name}") from None
    except PermissionError:
        raise PermissionError(f"no permission to read {name}: change its permissions or remove it") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"image {name} is too large to decode ({error}): cut it into tiles") from error
    except MemoryError as error:
        reason = str(error) or "out of memory"
        raise ImageError(
            f"image {name} is too large for the memory at hand ({reason}): cut it into tiles or make it smaller"
        ) from error
    except Exception as error:  # decoders raise all kinds where a file is damaged
        is_unknown = isinstance(error, UnidentifiedImageError)
        reason = "not a known image format" if is_unknown else str(error).partition("\n")[0]
        raise ImageError(f"cannot decode {name} ({reason or type(error).__name__}): repair or remove it") from error


def _from_array(array: np.ndarray, name: str, bits: int | None) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or 0 in array.shape:
        raise ImageError(f"an image must have shape (h, w) or (h, w, 1|3|4), got {array.shape} for {name}")
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    return Image.fromarray(array if array.dtype == np.bool_ else to_uint8(array, name, bits))


def _decoding_bytes(image: Image.Image) -> int:
    """What it takes to decode and convert an image, at most."""
    tile = tiff.tag(image, tiff.TILE_WIDTH, 0) * tiff.tag(image, tiff.TILE_HEIGHT, 0)  # may be larger than the image
    return max(image.width * image.height, tile) * (24 if image.format == "JPEG2000" else 16)


def _is_sideways(image: Image.Image) -> bool:
    """Whether EXIF rotates the image by 90 degrees. PIL already reports the upright size of a TIFF."""
    return image.format != "TIFF" and image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)


def _to_gray_or_rgb(image: Image.Image | np.ndarray, name: str, bits: int | None = None) -> Image.Image:
    if isinstance(image, np.ndarray):
        image = _from_array(image, name, bits)
    mode = image.mode
    if mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if deep.is_gray(image):
        pixels = np.asarray(image)
        if mode != "F":
            low, high = int(pixels.min()), int(pixels.max())
            if low < 0 or high > 65535:
                raise ImageError(f"integer pixels must lie in 0..65535, got {low} to {high} in {name}: rescale them")
            pixels = pixels.astype(np.uint16)
        pixels = to_uint8(pixels, name, deep.bits_of(image) or bits)
        return Image.fromarray(255 - pixels if deep.is_inverted(image) else pixels)
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")
    return image.convert("L" if mode == "1" else "RGB")
