"""Checks of TIFF files: Pillow leaves rows black that are not there, and reads signed samples as if they were not."""

import io
import math
from typing import Any

from PIL import Image

TAGS = "tag_v2"
"""Where Pillow keeps the tags of an image; its copies have them among their `info`."""
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, PLANAR, SAMPLE_FORMAT = 256, 257, 258, 259, 262, 277, 284, 339
STRIPS, TILES = (273, 279), (324, 325)
"""Tags of the offsets and sizes."""
ROWS_PER_STRIP, TILE_WIDTH, TILE_HEIGHT = 278, 322, 323
RAW, JPEG, PLANES, YCBCR, SIGNED = 1, 7, 2, 6, 2
"""Values of tags."""
JPEG_END = b"\xff\xd9"


def tag(image: Image.Image, number: int, default: Any = None) -> Any:
    """The (first) value of a tag; the default where there is none, as in a file of another format."""
    value = getattr(image, TAGS, image.info.get(TAGS, {})).get(number, default)
    return value[0] if isinstance(value, tuple) and value else value


def check(image: Image.Image) -> None:
    """Raises ValueError where strips or tiles are missing, or where samples of 8 bits are signed."""
    tags, file = getattr(image, TAGS, None), getattr(image, "fp", None)
    if tags is None or file is None:
        return
    if image.mode == "L" and tag(image, SAMPLE_FORMAT) == SIGNED:
        raise ValueError("its samples of 8 bits are signed, but must not be")
    width, height = tag(image, WIDTH), tag(image, HEIGHT)
    offset_tag, size_tag = TILES if TILES[0] in tags else STRIPS
    kind = "tile" if offset_tag == TILES[0] else "strip"
    columns = tag(image, TILE_WIDTH) if kind == "tile" else width
    rows = tag(image, TILE_HEIGHT) if kind == "tile" else max(1, min(tag(image, ROWS_PER_STRIP, height), height))
    layers = tag(image, SAMPLES, 1) if tag(image, PLANAR) == PLANES else 1
    parts = math.ceil(width / columns) * math.ceil(height / rows)
    offsets, sizes = tags.get(offset_tag, ()), tags.get(size_tag)
    sizes = (None,) * len(offsets) if sizes is None else sizes
    if min(len(offsets), len(sizes)) < parts * layers:
        raise ValueError(f"it has {min(len(offsets), len(sizes))} of {parts * layers} {kind}s")
    compression, samples = tag(image, COMPRESSION, RAW), 1 if layers > 1 else tag(image, SAMPLES, 1)
    row_bytes = math.ceil(columns * samples * tag(image, BITS, 1) / 8)
    position, end = file.tell(), file.seek(0, io.SEEK_END)
    for number, (offset, size) in enumerate(zip(offsets[: parts * layers], sizes, strict=False)):
        below = height - rows * (number % parts) if kind == "strip" else rows
        least = row_bytes * min(rows, below) if compression == RAW and tag(image, PHOTOMETRIC) != YCBCR else 1
        size = least if size is None else size
        is_whole = offset > 0 and size >= least and offset + size <= end
        if is_whole and compression == JPEG:
            file.seek(max(offset, offset + size - 64))
            is_whole = file.read(min(size, 64)).rstrip(b"\0").endswith(JPEG_END)
        if not is_whole:
            raise ValueError(f"{kind} {number + 1} of {parts * layers} is incomplete")
    file.seek(position)
