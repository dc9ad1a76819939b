"""The recipes: one file per method, which holds its `RECIPES` by name."""

import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Recipe(NamedTuple):
    """What to run and what was published. As in the papers, no training images are held out."""

    method: str
    dataset: str
    backbone: str | tuple[str, ...] | None
    """None: the method needs no pretrained network."""
    hyperparameters: Mapping[str, Any] = NOTHING
    image_size: int = 224
    center_crop: int | None = None
    mask_threshold: int = 0
    seeds: tuple[int, ...] = (0,)
    """With `parts`, each has a split of its own."""
    parts: str | None = None
    """A file in data/ that names the part which each image shows. A fifth of the normal parts, drawn anew for every
    seed, is in the test set with all anomalous images, and in no training set; None: the split of the data set."""
    published: Mapping[str, Mapping[str, Any]] = NOTHING
    """Metric -> {"value": a fraction, "source": where it was published}.

    It is the strongest number of the method on this data set and category that its authors or, with the recipe's
    backbone, others have published; if there is none, of others with any backbone. It is never a mean over categories.
    The source says "best epoch" where the test images chose the epoch."""
    notes: str = ""
    smoke_backbone: str = "resnet18"
    """What replaces the backbone in a smoke run."""


MTD = {"dataset": "mtd", "mask_threshold": 127}
"""Magnetic Tile Defects in DifferNet's split: 761 training, 191 good and 392 defective test images; resized, not
cropped."""
MTD_TILES: Mapping[str, Any] = {
    "dataset": "mtd_tiles",
    "mask_threshold": 127,
    "parts": "mtd_tiles.csv",
    "seeds": (0, 1, 2, 3, 4),
    "published": NOTHING,
}
"""Magnetic Tile Defects split by tile: no tile of the test set is in the training set, which in DifferNet's split holds
nearly all of them."""
BOTTLE = {"dataset": "mvtec_bottle", "image_size": 256, "center_crop": 224}
"""MVTec AD's bottle, resized to 256 px and cropped to 224 px."""
RESNET50 = "resnet50.caffe_in1k"


def published(source: str, **values: float) -> dict[str, dict[str, Any]]:
    """The published metrics of one source, as fractions."""
    return {metric: {"value": value, "source": source} for metric, value in values.items()}


def by_tile(recipes: Mapping[str, Recipe], *names: str) -> dict[str, Recipe]:
    """The named recipes for MTD, on splits by tile: `padim_mtd` -> `padim_mtd_tiles`."""
    return {f"{name}_tiles": recipes[name]._replace(**MTD_TILES) for name in names}


def all_recipes() -> dict[str, Recipe]:
    """The recipes of all files in this folder, by name."""
    modules = (importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    return {name: recipe for module in modules for name, recipe in module.RECIPES.items()}
