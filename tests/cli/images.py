"""Small image files, and what runs leave on disk."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

SMALL = ("--image-size", "64", "--batch-size", "4")
MODEL = {"model.json", "model.safetensors", "recipe.json", "threshold.json"}


def save_image(path: Path, seed: int, size: tuple[int, int] = (48, 40), scratch: bool = False) -> None:
    pixels = np.random.default_rng(seed).integers(90, 160, (*size, 3), dtype=np.uint8)
    if scratch:
        pixels[10:20, 5:30] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
