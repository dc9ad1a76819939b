"""Loads images from folders, CSV files, TFDS and memory, decoded lazily to uint8 RGB of one size."""

from jaxad.data.arrays import Arrays
from jaxad.data.dataset import Dataset, Split, open_data
from jaxad.data.images import PAPER, ImageError, Preprocess, to_original

__all__ = ["PAPER", "Arrays", "Dataset", "ImageError", "Preprocess", "Split", "open_data", "to_original"]
