"""The demo data set: four products and five kinds of defects, rendered to look like inspection photographs.

A product is a surface (color, height, gloss). A defect modifies the surface and returns the pixels that it covers. The
result is lit and photographed, with uneven light, cast shadows, highlights, vignetting, slight blur and sensor noise.
Every image has two random streams of its own, one for the product and one for the defect. So any image can be rendered
independently, and the same product with and without its defect.
"""

import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image
from scipy import ndimage

from jaxad.data.demo_surfaces import CATEGORIES, DEFECTS, Map, Random, Surface, grid, noise
from jaxad.data.images import in_threads
from jaxad.data.records import GOOD, Record


def render(
    category: str, index: int, defect: str | None = None, seed: int = 0, size: int = 256
) -> tuple[UInt8[np.ndarray, "size size 3"], Bool[np.ndarray, "size size"]]:
    """Renders one image of the demo data set.

    Args:
        category: one of `CATEGORIES`.
        index: which specimen. With `seed` it determines all natural variation.
        defect: one of `DEFECTS`, or None for a flawless product.
        seed: seed of the data set.
        size: side of the image in pixels.

    Returns:
        The image and the mask of the defect.

    Raises:
        ValueError: there is no such category or defect, or the size is below 32.
    """
    if category not in CATEGORIES:
        raise ValueError(f"no demo category {category!r}: choose one of {', '.join(CATEGORIES)}")
    if defect is not None and defect not in DEFECTS:
        raise ValueError(f"no demo defect {defect!r}: choose one of {', '.join(DEFECTS)}")
    if size < 32:
        raise ValueError(f"size must be at least 32, got {size}")
    key = (seed, list(CATEGORIES).index(category), index)
    random = np.random.default_rng(key)
    surface = CATEGORIES[category](random, size)
    mask = np.zeros((size, size), np.bool_)
    shade = np.ones((size, size), np.float32)
    if defect is not None:
        coverage, shade = DEFECTS[defect](np.random.default_rng((*key, list(DEFECTS).index(defect))), surface)
        mask = coverage > 0.25
    return _photograph(random, surface, shade), mask


def _photograph(random: Random, surface: Surface, shade: Map) -> UInt8[np.ndarray, "h w 3"]:
    size = surface.height.shape[0]
    y, x = grid(size)
    slope_y, slope_x = np.gradient(surface.height * np.float32(size / 256))
    normal_scale = 1 / np.sqrt(slope_x**2 + slope_y**2 + 1)
    lx, ly, lz = random.normal(40, 10) - x, random.normal(20, 10) - y, random.normal(300, 12)
    light_scale = 1 / np.sqrt(lx**2 + ly**2 + lz**2)
    diffuse = np.maximum((-slope_x * lx - slope_y * ly + lz) * light_scale * normal_scale, 0)
    vx, vy, vz = 128 - x, 128 - y, 620
    view_scale = 1 / np.sqrt(vx**2 + vy**2 + vz**2)
    hx, hy, hz = (light * light_scale + view * view_scale for light, view in ((lx, vx), (ly, vy), (lz, vz)))
    cosine = (-slope_x * hx - slope_y * hy + hz) * normal_scale / np.sqrt(hx**2 + hy**2 + hz**2)
    specular = surface.gloss * np.maximum(cosine, 0) ** surface.shine
    falloff = (light_scale * 310) ** 1.3 * (1 + 0.03 * noise(random, size, 2))
    if surface.cover.min() < 0.5:
        unit = size / 256
        shifted = ndimage.shift(surface.cover, (5 * unit, 4 * unit), order=1, mode="nearest")
        shadow = ndimage.gaussian_filter(shifted, 3.5 * unit)
        shade = shade * (1 - 0.55 * shadow * (1 - surface.cover))
    light = shade * falloff
    image = surface.albedo * (light * (0.30 + 0.95 * diffuse))[..., None] + (light * specular)[..., None]
    vignette = ((x - 128 - random.normal(0, 8)) ** 2 + (y - 128 - random.normal(0, 8)) ** 2) / (2 * 128**2)
    exposure = (1 - 0.22 * vignette) * random.normal(1, 0.025)
    white = np.array((1.02, 1.0, 0.97)) * random.normal(1, 0.008, 3)
    image = image * exposure[..., None] * white.astype(np.float32)
    sharpness = random.uniform(0.6, 0.75) * size / 256
    image = np.stack([ndimage.gaussian_filter(image[..., c], sharpness, truncate=3) for c in range(3)], -1)
    grain = 0.7 * random.standard_normal((size, size, 3), np.float32)
    grain += random.standard_normal((size, size, 1), np.float32)
    image = image + grain * np.sqrt(np.maximum(image, 0) * 0.00012 + 0.000006)
    image = np.maximum(image, 0)
    bright = image > 0.8
    image[bright] = 1 - 0.2 * np.exp(4 - 5 * image[bright])
    return np.round(255 * np.clip(image, 0, 1) ** (1 / 2.2)).astype(np.uint8)


def records(train: int = 40, good: int = 10, per_defect: int = 4, seed: int = 0, size: int = 256) -> Iterator[Record]:
    """The records of the demo data set; images are rendered when they are read.

    Args:
        train: normal training images per category.
        good: normal test images per category.
        per_defect: test images per category and kind of defect.
        seed: seed of the data set.
        size: side of the images in pixels.
    """
    for category in CATEGORIES:
        specimens = [("train", None)] * train + [("test", None)] * good
        specimens += [("test", defect) for defect in DEFECTS for _ in range(per_defect)]
        for index, (split, defect) in enumerate(specimens):
            image, mask = (functools.partial(_render_part, i, category, index, defect, seed, size) for i in (0, 1))
            label = defect or GOOD
            path = f"{category}/{split}/{label}/{index:03d}.png"
            yield Record(path, image, category, split, label, mask if defect else None)


def write_demo(directory: str | Path, **options: int) -> Path:
    """Writes the demo data set as PNG files in the MVTec layout. Leaves nothing behind if writing fails.

    Args:
        directory: the folder to create.
        **options: the options of `records`.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder exists already.
    """
    directory = Path(directory)
    if directory.exists():
        raise FileExistsError(f"the demo data need a new folder, but {directory} exists: remove it or choose another")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as scratch:
        root = Path(scratch) / directory.name

        def write(record: Record) -> None:
            path = Path(record.path)
            assert callable(record.image)
            _save(root / path, record.image())
            if callable(record.mask):
                name = f"{path.stem}_mask.png"
                _save(root / record.category / "ground_truth" / record.defect / name, record.mask())

        in_threads(write, list(records(**options)))
        os.replace(root, directory)
    return directory


def _render_part(part: int, *arguments: Any) -> np.ndarray:
    """The image (part 0) or the mask (part 1) of `render`."""
    return _render_cached(*arguments)[part]


@functools.lru_cache(160)
def _render_cached(*arguments: Any) -> tuple[np.ndarray, np.ndarray]:
    """Renders an image and its mask once, and the training images of all categories once for all that read them."""
    return render(*arguments)


def _save(path: Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=3)
