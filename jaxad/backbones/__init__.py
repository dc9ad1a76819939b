"""Pretrained feature extractors: pure functions over frozen weights.

`backbone("resnet50")` gives the architecture, `load("resnet50")` its weights, `features("resnet50", layers)` the
`embed` of a method. The `make` of a family (`resnet.make`, `pdn.make`, ...) builds a `Backbone` that is not registered.
All functions here take it in place of a name, except for those about files of weights: its weights come from
`network.init(key)` or `network.fold(tensors)`.
"""

from jaxad.backbones.architecture import Backbone, ResidualBlocks, Student, normalize
from jaxad.backbones.networks import FAMILIES, backbone, features, residual_blocks, stride, student
from jaxad.backbones.weights import Weights, available, cache_dir, fetch, import_file, load, of_file, resolve, source

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
