"""Pretrained feature extractors by name: pure functions over frozen weights.

`backbone("resnet50")` gives the architecture, `load("resnet50")` its weights, `features(...)` the `embed` of a method.
"""

from jaxad.backbones.networks import (
    Backbone,
    Student,
    backbone,
    features,
    normalize,
    residual_blocks,
    stride,
    student,
)
from jaxad.backbones.weights import Weights, available, cache_dir, fetch, import_file, load, of_file, resolve, source

__all__ = [
    "Backbone",
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
