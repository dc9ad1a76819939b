"""ResNet and Wide ResNet feature pyramids in flax.linen, with batch norm folded into the convolutions.

Paper: Deep Residual Learning for Image Recognition, CVPR 2016, arXiv:1512.03385; Wide Residual Networks, BMVC 2016,
    arXiv:1605.07146.
Reference: torchvision.models.resnet (parameter names, "v1.5": a stage's stride sits in its 3x3 convolution) and the
    original Caffe release ("v1": the stride sits in the first 1x1 convolution).
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float

from jaxad.backbones import convolution
from jaxad.backbones.architecture import Backbone, Family, ResidualBlocks, Student, build, make_student
from jaxad.backbones.convolution import Conv, Params, Shapes, Source
from jaxad.backbones.registry import CAFFE, IMAGENET, Entry, Normalization
from jaxad.nn import ConvNorm

STAGES = ("layer1", "layer2", "layer3", "layer4")
PATCH_LAYERS = ("layer2", "layer3")
PYRAMID_LAYERS = ("layer1", "layer2", "layer3")
BLOCKS = {
    "resnet18": ResidualBlocks((2, 2, 2, 2), 1.0),
    "resnet34": ResidualBlocks((3, 4, 6, 3), 1.0),
    "resnet50": ResidualBlocks((3, 4, 6, 3)),
    "resnet101": ResidualBlocks((3, 4, 23, 3)),
    "resnet152": ResidualBlocks((3, 8, 36, 3)),
    "wide_resnet50_2": ResidualBlocks((3, 4, 6, 3), 0.5),
    "wide_resnet101_2": ResidualBlocks((3, 4, 23, 3), 0.5),
}


class ResNet(nn.Module):
    """Feature maps of a ResNet by stage name; nothing past the deepest requested stage is computed."""

    blocks: ResidualBlocks
    stride_in_1x1: bool = False
    conv: Any = Conv
    """Makes a convolution from (features, kernel, stride, name)."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w 3"], layers: tuple[str, ...], **options: Any
    ) -> dict[str, Float[Array, "b _ _ _"]]:
        """The maps of those stages of a normalized image; `options` are passed on to every convolution."""

        def conv(x: Array, *shape: int, name: str) -> Array:
            return self.conv(*shape, name=name)(x, **options)

        relu = jax.nn.relu
        counts, width, channels = self.blocks
        bottleneck = width < 1
        x = relu(conv(x, channels, 7, 2, name="conv1"))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        maps = {}
        for s in range(max(map(STAGES.index, layers)) + 1):
            planes = channels * 2**s
            out = planes * 4 if bottleneck else planes
            inner = int(out * width)
            for i in range(counts[s]):
                stride = 2 if i == 0 and s > 0 else 1
                prefix = f"{STAGES[s]}.{i}."
                if bottleneck:
                    first, second = (stride, 1) if self.stride_in_1x1 else (1, stride)
                    y = relu(conv(x, inner, 1, first, name=prefix + "conv1"))
                    y = relu(conv(y, inner, 3, second, name=prefix + "conv2"))
                    y = conv(y, out, 1, name=prefix + "conv3")
                else:
                    y = relu(conv(x, planes, 3, stride, name=prefix + "conv1"))
                    y = conv(y, planes, 3, name=prefix + "conv2")
                if stride != 1 or x.shape[-1] != out:
                    x = conv(x, out, 1, stride, name=prefix + "downsample.0")
                x = relu(x + y)
            maps[STAGES[s]] = x
        return {layer: maps[layer] for layer in layers}


def source(module: str) -> Source:
    """The names of a convolution and its batch norm in torchvision's and timm's checkpoints."""
    return Source(module, module.replace("downsample.0", "downsample.1").replace("conv", "bn"))


@functools.lru_cache
def make(
    name: str, blocks: ResidualBlocks, *, stride_in_1x1: bool = False, normalization: Normalization = IMAGENET
) -> Backbone:
    """A ResNet with blocks of the caller's own; equal arguments give the same object.

    Args:
        name: Name of the backbone, for messages.
        blocks: Its residual blocks.
        stride_in_1x1: The stride of a stage sits in its first 1x1 convolution (v1).
        normalization: Mean and deviation of the training images, RGB in 0..255. Caffe's weights take images that are
            not divided by a deviation. A first convolution on such inputs trains thousands of times too fast, so
            images are divided by ImageNet's deviation, and the first kernel is multiplied by it.
    """
    scale = None
    if normalization == CAFFE:
        normalization, scale = (CAFFE[0], IMAGENET[1]), np.asarray(IMAGENET[1], np.float32)[:, None]

    def fold(modules: Mapping[str, Shapes], tensors: Mapping[str, np.ndarray]) -> Params:
        params = convolution.fold(STAGES, modules, source, tensors)
        if scale is not None:
            params["conv1"]["kernel"] = params["conv1"]["kernel"] * scale
        return params

    def student(layers: tuple[str, ...], copies: int) -> Student:
        del copies
        return make_student(ResNet(blocks, stride_in_1x1, ConvNorm), layers, batch_norm=True)

    return build(
        name,
        "resnet",
        ResNet(blocks, stride_in_1x1),
        STAGES,
        fold,
        patch_layers=PATCH_LAYERS,
        pyramid_layers=PYRAMID_LAYERS,
        normalization=normalization,
        blocks=blocks,
        student=student,
    )


def _registered(name: str, entry: Entry) -> Backbone:
    blocks = BLOCKS[entry.architecture]
    return make(name, blocks, stride_in_1x1=entry.stride_in_1x1, normalization=entry.normalization)


FAMILY = Family(tuple(BLOCKS), _registered)
