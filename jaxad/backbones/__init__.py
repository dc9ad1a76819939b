"""Pretrained feature extractors: pure functions over frozen weights.

`backbone("resnet50")` gives the architecture, `load("resnet50")` its weights, `features("resnet50", layers)` the
`embed` of a method. The `make` of a family (`resnet.make`, `pdn.make`, ...) builds a `Backbone` that is not registered.
All functions here take it in place of a name, except for those about files of weights: its weights come from
`network.init(key)` or `network.fold(tensors)`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxad.backbones.architecture import Backbone, ResidualBlocks, Student, normalize
    from jaxad.backbones.networks import FAMILIES, backbone, features, residual_blocks, stride, student
    from jaxad.backbones.store import Weights, available, cache_dir, of_file, resolve
    from jaxad.backbones.weights import fetch, import_file, load, source

__all__ = [
    "FAMILIES",
    "Backbone",
    "ResidualBlocks",
    "Student",
    "Weights",
    "available",
    "backbone",
    "cache_dir",
    "features",
    "fetch",
    "import_file",
    "load",
    "normalize",
    "of_file",
    "residual_blocks",
    "resolve",
    "source",
    "stride",
    "student",
]

_MODULES = {
    "architecture": ("Backbone", "ResidualBlocks", "Student", "normalize"),
    "networks": ("FAMILIES", "backbone", "features", "residual_blocks", "stride", "student"),
    "store": ("Weights", "available", "cache_dir", "of_file", "resolve"),
    "weights": ("fetch", "import_file", "load", "source"),
}
"""Module -> the public names that it defines. Modules are imported on first use: `jaxad list` needs no JAX."""


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
