"""EfficientNet-B0..B7 feature pyramids in flax.linen, with batch norm folded into the convolutions.

`efficientnet_b0` pads its convolutions symmetrically, like the networks trained in torch; `tf_efficientnet_b0` pads
like TensorFlow ("SAME"), for the authors' weights. The nine stages are the stem, the seven groups of blocks and the 1x1
convolution of the head: the levels of Mahalanobis AD (arXiv:2005.14140).

Paper: EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, ICML 2019, arXiv:1905.11946, Table 1
    and Section 3.3.
Reference: timm.models.efficientnet and torchvision.models.efficientnet (parameter names).
"""

import functools
import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxad.backbones import convolution
from jaxad.backbones.architecture import Backbone, Family, build
from jaxad.backbones.convolution import Conv, DepthwiseConv, Params, Shapes, Source
from jaxad.backbones.registry import IMAGENET, Entry, Normalization

STAGES = ("stem", *(f"blocks.{s}" for s in range(7)), "head")
PATCH_LAYERS = ("blocks.2", "blocks.4")
PYRAMID_LAYERS = ("blocks.1", "blocks.2", "blocks.4")
BLOCKS = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
"""Kernel, stride, expansion, channels and number of blocks of each of B0's seven groups."""


class Layout(NamedTuple):
    """How an EfficientNet differs from B0, and from torch's conventions."""

    width: float = 1.0
    """Channels relative to B0."""
    depth: float = 1.0
    """Blocks relative to B0."""
    same: bool = False
    """TensorFlow's padding ("SAME"), and 1e-3 in the batch norm of timm's checkpoints instead of 1e-5."""
    eps: float = 1e-5
    """Added to the variance in the batch norm of torchvision's checkpoints."""


SCALES = ((1.0, 1.0), (1.0, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8), (1.6, 2.2), (1.8, 2.6), (2.0, 3.1))
"""Width and depth of B0..B7."""
LAYOUTS = {
    f"{prefix}efficientnet_b{i}": Layout(*scale, same=prefix == "tf_", eps=1e-3 if i >= 5 else 1e-5)
    for prefix in ("", "tf_")
    for i, scale in enumerate(SCALES)
}


def channels(base: int, width: float) -> int:
    """`base` times the width factor, rounded to a multiple of 8 that is at most 10 % below it."""
    exact = base * width
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * exact else rounded + 8


class EfficientNet(nn.Module):
    """Feature maps of an EfficientNet by stage name; nothing past the deepest requested stage is computed."""

    layout: Layout

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"], layers: tuple[str, ...]) -> dict[str, Float[Array, "b _ _ _"]]:
        """The maps of those stages of a normalized image."""
        swish = jax.nn.swish
        width, depth, same, _ = self.layout
        last = max(map(STAGES.index, layers))
        maps = {"stem": swish(Conv(channels(32, width), 3, 2, same, name="stem")(x))}
        x = maps["stem"]
        for s, (kernel, stage_stride, expansion, base, repeats) in enumerate(BLOCKS[: min(last, len(BLOCKS))]):
            out = channels(base, width)
            for i in range(math.ceil(repeats * depth)):
                stride = stage_stride if i == 0 else 1
                prefix, inputs = f"blocks.{s}.{i}.", x.shape[-1]
                y = x if expansion == 1 else swish(Conv(inputs * expansion, 1, name=prefix + "expand")(x))
                y = swish(DepthwiseConv(kernel, stride, same, name=prefix + "depthwise")(y))
                gate = y.astype(jnp.float32).mean((1, 2), keepdims=True).astype(y.dtype)
                gate = swish(Conv(inputs // 4, 1, name=prefix + "squeeze")(gate))
                y = y * jax.nn.sigmoid(Conv(y.shape[-1], 1, name=prefix + "excite")(gate))
                y = Conv(out, 1, name=prefix + "project")(y)
                x = x + y if stride == 1 and inputs == out else y
            maps[f"blocks.{s}"] = x
        if "head" in layers:
            maps["head"] = swish(Conv(channels(1280, width), 1, name="head")(x))
        return {layer: maps[layer] for layer in layers}


def source(layout: Layout, module: str, keys: Collection[str]) -> Source:
    """The names of a convolution and its batch norm in a checkpoint with those keys: torchvision's or timm's."""
    *block, op = module.split(".")
    first = block[1:2] == ["0"]  # the first group does not expand, so the numbers of its layers are one less
    if "features.0.0.weight" in keys:
        eps = layout.eps
        if not block:
            number = {"stem": 0, "head": 8}[op]
            return Source(f"features.{number}.0", f"features.{number}.1", eps)
        prefix = f"features.{int(block[1]) + 1}.{block[2]}.block"
        number = {"expand": 0, "depthwise": 1, "squeeze": 2, "excite": 2, "project": 3}[op] - first
        if op in ("squeeze", "excite"):
            return Source(f"{prefix}.{number}.{'fc1' if op == 'squeeze' else 'fc2'}", None)
        return Source(f"{prefix}.{number}.0", f"{prefix}.{number}.1", eps)
    eps = 1e-3 if layout.same else 1e-5
    if not block:
        return Source(f"conv_{op}", "bn1" if op == "stem" else "bn2", eps)
    prefix = ".".join(block)
    if op in ("squeeze", "excite"):
        return Source(f"{prefix}.se.conv_{'reduce' if op == 'squeeze' else 'expand'}", None)
    conv = {"expand": "pw", "depthwise": "dw", "project": "pw" if first else "pwl"}[op]
    number = {"expand": 1, "depthwise": 2, "project": 3}[op] - first
    return Source(f"{prefix}.conv_{conv}", f"{prefix}.bn{number}", eps)


@functools.lru_cache
def make(name: str, layout: Layout, *, normalization: Normalization = IMAGENET) -> Backbone:
    """An EfficientNet with a layout of the caller's own; equal arguments give the same object.

    Args:
        name: Name of the backbone, for messages.
        layout: Its width, depth and conventions.
        normalization: Mean and deviation of the training images, RGB in 0..255.
    """

    def fold(modules: Mapping[str, Shapes], tensors: Mapping[str, np.ndarray]) -> Params:
        return convolution.fold(STAGES, modules, functools.partial(source, layout, keys=tensors.keys()), tensors)

    return build(
        name,
        "efficientnet",
        EfficientNet(layout),
        STAGES,
        fold,
        patch_layers=PATCH_LAYERS,
        pyramid_layers=PYRAMID_LAYERS,
        normalization=normalization,
    )


def _registered(name: str, entry: Entry) -> Backbone:
    return make(name, LAYOUTS[entry.architecture], normalization=entry.normalization)


FAMILY = Family(tuple(LAYOUTS), _registered)
