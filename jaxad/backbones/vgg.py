"""VGG-11, 13, 16 and 19 feature pyramids in flax.linen, without batch norm or with it folded into the convolutions.

A stage is a block of convolutions and the max pooling after it, so `pool2` has stride 4.

Paper: Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015, arXiv:1409.1556, Table 1.
Reference: torchvision.models.vgg and timm.models.vgg (parameter names).
"""

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float

from jaxad.backbones import convolution
from jaxad.backbones.architecture import Backbone, Family, build
from jaxad.backbones.convolution import Conv, Params, Shapes, Source
from jaxad.backbones.registry import IMAGENET, Entry, Normalization

STAGES = ("pool1", "pool2", "pool3", "pool4", "pool5")
PATCH_LAYERS = ("pool3", "pool4")
PYRAMID_LAYERS = ("pool2", "pool3", "pool4")
WIDTHS = (64, 128, 256, 512, 512)
CONVOLUTIONS = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
"""Convolutions of every stage; `vgg16_bn` has those of `vgg16`."""
ARCHITECTURES = (*CONVOLUTIONS, *(f"{name}_bn" for name in CONVOLUTIONS))


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Max pooling 2x2 with stride 2; an odd last row or column is dropped."""
    return nn.max_pool(x, (2, 2), (2, 2))


class Vgg(nn.Module):
    """Feature maps of a VGG by stage name; nothing past the deepest requested stage is computed."""

    convolutions: tuple[int, ...]
    """Convolutions of every stage."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"], layers: tuple[str, ...]) -> dict[str, Float[Array, "b _ _ _"]]:
        """The maps of those stages of a normalized image."""
        maps = {}
        for s in range(max(map(STAGES.index, layers)) + 1):
            for i in range(self.convolutions[s]):
                x = jax.nn.relu(Conv(WIDTHS[s], 3, name=f"{STAGES[s]}.{i}")(x))
            x = maps[STAGES[s]] = max_pool(x)
        return {layer: maps[layer] for layer in layers}


def source(convolutions: tuple[int, ...], batch_norm: bool, module: str) -> Source:
    """The names of a convolution, and of its batch norm if it has one, in torchvision's and timm's checkpoints."""
    stage, i = module.split(".")
    s = STAGES.index(stage)
    before = sum(convolutions[:s]) + int(i)
    number = before * (3 if batch_norm else 2) + s
    return Source(f"features.{number}", f"features.{number + 1}" if batch_norm else None, biased=batch_norm)


@functools.lru_cache
def make(
    name: str, convolutions: tuple[int, ...], *, batch_norm: bool = False, normalization: Normalization = IMAGENET
) -> Backbone:
    """A VGG with a layout of the caller's own; equal arguments give the same object.

    Args:
        name: Name of the backbone, for messages.
        convolutions: Convolutions of every stage, five numbers.
        batch_norm: Its checkpoints have batch norm after every convolution.
        normalization: Mean and deviation of the training images, RGB in 0..255.
    """

    def fold(modules: Mapping[str, Shapes], tensors: Mapping[str, np.ndarray]) -> Params:
        return convolution.fold(STAGES, modules, functools.partial(source, convolutions, batch_norm), tensors)

    return build(
        name,
        "vgg",
        Vgg(convolutions),
        STAGES,
        fold,
        patch_layers=PATCH_LAYERS,
        pyramid_layers=PYRAMID_LAYERS,
        normalization=normalization,
    )


def _registered(name: str, entry: Entry) -> Backbone:
    convolutions = CONVOLUTIONS[entry.architecture.removesuffix("_bn")]
    batch_norm = entry.architecture.endswith("_bn")
    return make(name, convolutions, batch_norm=batch_norm, normalization=entry.normalization)


FAMILY = Family(ARCHITECTURES, _registered)
