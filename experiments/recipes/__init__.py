"""One file a method; each holds `RECIPES`, by name."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Recipe(NamedTuple):
    """What to run and what was published; all training images learn (no hold-out), as in the papers."""

    method: str
    dataset: str
    backbone: str | tuple[str, ...] | None
    """None: the method has networks of its own."""
    hyperparameters: Mapping[str, Any] = NOTHING
    image_size: int = 224
    center_crop: int | None = None
    mask_threshold: int = 0
    seeds: tuple[int, ...] = (0,)
    published: Mapping[str, Mapping[str, Any]] = NOTHING
    """Metric -> {"value": fraction, "source": where it stands}."""
    notes: str = ""
    smoke_backbone: str = "resnet18"
    """What stands in for the backbone in the tests."""


MTD = {"dataset": "mtd", "mask_threshold": 127}
"""Magnetic Tile Defects in DifferNet's split: 761 training, 191 good and 392 defective test images; plain resize."""
BOTTLE = {"dataset": "mvtec_bottle", "image_size": 256, "center_crop": 224}
"""MVTec AD's bottle, 256 -> 224."""
RESNET50 = "resnet50.caffe_in1k"


def published(source: str, **values: float) -> dict[str, dict[str, Any]]:
    """Published numbers of one source, as fractions."""
    return {metric: {"value": value, "source": source} for metric, value in values.items()}
