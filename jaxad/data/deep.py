"""Samples in more than 8 bits, and what files leave open about them: how deep they are, and whether zero is white."""

import sys
from typing import Any

import numpy as np
from jaxtyping import UInt16
from PIL import Image, ImageFile

from jaxad.data.tiff import BITS, PHOTOMETRIC, tag

SCALED, UPPER = "scaled to 16 bits", "upper bytes of 16 bits"
"""What is kept of a file among the `info` of its image once it is decoded."""
_OTHER_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}


def is_gray(image: Image.Image) -> bool:
    """Whether it is gray, in integers of more than 8 bits or in floats."""
    return image.mode == "F" or image.mode.startswith("I")


def is_color(image: Image.Image) -> bool:
    """Whether it is a file in color of 16 bits, of which Pillow reads the upper 8."""
    return image.mode in ("RGB", "RGBA") and any(_is_deep(_raw_mode(tile)) for tile in getattr(image, "tile", ()))


def is_inverted(image: Image.Image) -> bool:
    """Whether zero is white, and Pillow does not change that, as it does in 8 bits."""
    return is_gray(image) and tag(image, PHOTOMETRIC) == 0


def bits_of(image: Image.Image) -> int | None:
    """The depth of the samples, where the file states one and Pillow may have scaled them to 16 bits."""
    if image.info.get(SCALED):
        return 16
    bits = tag(image, BITS)
    return bits if is_gray(image) and bits is not None and 8 < bits < 16 else None


def is_scaled(image: Image.Image) -> bool:
    """Whether it is a file whose samples Pillow scales from the maximum that the file states to 16 bits."""
    return any(tile[0].startswith("ppm") for tile in getattr(image, "tile", ()))


def read_lower_bytes(image: Image.Image) -> None:
    """Makes Pillow read the lower bytes of a file in color of 16 bits, instead of the upper ones."""
    assert isinstance(image, ImageFile.ImageFile)
    tiles = []
    for tile in image.tile:
        mode = _raw_mode(tile)
        if not mode.startswith("RGB"):
            raise ValueError("of 16-bit gray with alpha only the upper 8 bits are read: remove the alpha")
        mode = mode[:-1] + _OTHER_BYTE[mode[-1]]
        tiles.append(tile._replace(args=(mode, *tile.args[1:]) if isinstance(tile.args, tuple) else mode))
    image.tile = tiles


def joined(upper: Image.Image, lower: Image.Image) -> UInt16[np.ndarray, "h w c"]:
    """Samples from their bytes."""
    return np.asarray(upper, np.uint16) << 8 | np.asarray(lower)


def _raw_mode(tile: Any) -> str:
    mode = tile.args[0] if isinstance(tile.args, tuple) and tile.args else tile.args
    return mode if isinstance(mode, str) else ""


def _is_deep(raw_mode: str) -> bool:
    return ";16" in raw_mode and raw_mode[-1] in _OTHER_BYTE
