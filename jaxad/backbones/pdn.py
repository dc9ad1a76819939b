"""Small fully convolutional patch-description networks: that of this package, and the published ones of EfficientAD.

Every position of `pdn_small` describes a patch of 65 px. The package contains its weights, which
`experiments/distill/backbone.py` distills from layer2 and layer3 of a ResNet-50, much as the two papers below distill
their networks. Its channels are the principal components of those features, all multiplied by one factor: they are not
scaled to unit variance one by one.
The positions of `efficientad_small` and `efficientad_medium` describe patches of 33 px. The user imports their weights,
from the authors or a reimplementation.

Paper: Uninformed Students, CVPR 2020, arXiv:1911.02357; EfficientAD, WACV 2024, arXiv:2303.14535, Tables 6 and 7.
Reference: https://github.com/nelson1425/EfficientAD and anomalib (parameter names of the published ones).
"""

import functools
from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float

from jaxad.backbones import convolution
from jaxad.backbones.architecture import Backbone, Family, Student, build, make_student
from jaxad.backbones.convolution import Conv, Params, Shapes, Source
from jaxad.backbones.registry import IMAGENET, Entry, Normalization
from jaxad.nn.initial import torch_bias, torch_uniform

STAGES = ("layer1", "layer2", "layer3")
WIDTHS = (64, 160, 256)
BLOCKS = 3
OUT = 384
"""Channels of the description."""
PUBLISHED = {
    "efficientad_small": ((4, 128), (4, 256), (3, 256), (4, OUT)),
    "efficientad_medium": ((4, 256), (4, 512), (1, 512), (3, 512), (4, OUT), (1, OUT)),
}
"""Kernel and channels of every convolution; average pooling follows the first two."""
PUBLISHED_STAGES = ("head",)
TRAINABLE = functools.partial(Conv, kernel_init=torch_uniform, bias_init=torch_bias)
"""Makes the convolutions of a student."""


class PatchDescriptionNetwork(nn.Module):
    """`layer1` (stride 4) and `layer2` (stride 8) are hidden maps; `layer3` (stride 8) is the description itself."""

    out: int = OUT
    conv: Any = Conv
    """Makes a convolution from (features, kernel, stride, name)."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"], layers: tuple[str, ...]) -> dict[str, Float[Array, "b _ _ _"]]:
        """The maps of those stages of a normalized image."""
        relu, conv = jax.nn.relu, self.conv
        maps = {}
        x = relu(conv(WIDTHS[0], 5, 2, name="conv1")(x))
        x = maps["layer1"] = relu(conv(WIDTHS[1], 3, 2, name="conv2")(x))
        if {"layer2", "layer3"} & set(layers):
            x = maps["layer2"] = relu(conv(WIDTHS[2], 3, 2, name="conv3")(x))
        if "layer3" in layers:
            for i in range(BLOCKS):
                y = relu(conv(WIDTHS[2] // 2, 1, name=f"block{i}.conv1")(x))
                x = relu(x + conv(WIDTHS[2], 3, name=f"block{i}.conv2")(y))
            maps["layer3"] = conv(self.out, 1, name="head")(x)
        return {name: maps[name] for name in layers}


class PublishedNetwork(nn.Module):
    """A network of EfficientAD, without padding: 256 px give 56 positions of stride 4."""

    convolutions: tuple[tuple[int, int], ...]
    """Kernel and channels of every convolution; average pooling follows the first two."""
    out: int = OUT
    """Channels of the description; they replace `OUT` in every convolution that has as many."""
    conv: Any = Conv

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"], layers: tuple[str, ...]) -> dict[str, Float[Array, "b _ _ _"]]:
        """The description of a normalized image, the only stage."""
        for i, (kernel, features) in enumerate(self.convolutions):
            x = self.conv(self.out if features == OUT else features, kernel, pad=False, name=f"conv{i + 1}")(x)
            if i < len(self.convolutions) - 1:
                x = jax.nn.relu(x)
            if i < 2:
                x = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
        return dict.fromkeys(layers, x)


def source(module: str, keys: Collection[str]) -> Source:
    """The names of a convolution of a published network in a checkpoint: anomalib's, or those of a torch sequence."""
    if "conv1.weight" in keys:
        return Source(module, None)
    number = int(module.removeprefix("conv")) - 1  # activations lie between, and two pools after the first ones
    return Source(str(2 * number + min(number, 2)), None)


def fold(modules: Mapping[str, Shapes], tensors: Mapping[str, np.ndarray]) -> Params:
    """Converts the file of `pdn_small` (`conv1.kernel`, `conv1.bias`, ... in half precision) to float32 parameters.

    Raises:
        ValueError: The file is of another architecture, or not all of its numbers are finite.
    """
    expected = {m: {f"{m}.{leaf}": shape for leaf, shape in leaves.items()} for m, leaves in modules.items()}
    params: Params = {}
    for module in convolution.complete_modules(STAGES, expected, tensors):
        params[module] = {leaf: tensors[f"{module}.{leaf}"].astype(np.float32) for leaf in modules[module]}
        if not all(np.isfinite(leaf).all() for leaf in params[module].values()):
            raise ValueError(f"needs finite numbers, got others in {module}")
    return params


@functools.lru_cache
def make(name: str, convolutions: tuple[tuple[int, int], ...], *, normalization: Normalization = IMAGENET) -> Backbone:
    """A network of EfficientAD with convolutions of the caller's own; equal arguments give the same object.

    Args:
        name: Name of the backbone, for messages.
        convolutions: Kernel and channels of every convolution, `OUT` channels in the last one; average pooling follows
            the first two.
        normalization: Mean and deviation of the training images, RGB in 0..255.
    """

    def fold_published(modules: Mapping[str, Shapes], tensors: Mapping[str, np.ndarray]) -> Params:
        names = functools.partial(source, keys=tensors.keys())
        return convolution.fold(PUBLISHED_STAGES, modules, names, tensors)

    def student(layers: tuple[str, ...], copies: int) -> Student:
        return make_student(PublishedNetwork(convolutions, copies * OUT, TRAINABLE), layers)

    return build(
        name,
        "pdn",
        PublishedNetwork(convolutions),
        PUBLISHED_STAGES,
        fold_published,
        normalization=normalization,
        pads=False,
        student=student,
        copies=True,
    )


def _registered(name: str, entry: Entry) -> Backbone:
    if entry.architecture in PUBLISHED:
        return make(name, PUBLISHED[entry.architecture], normalization=entry.normalization)

    def student(layers: tuple[str, ...], copies: int) -> Student:
        return make_student(PatchDescriptionNetwork(copies * OUT, TRAINABLE), layers)

    return build(
        name,
        "pdn",
        PatchDescriptionNetwork(),
        STAGES,
        fold,
        patch_layers=STAGES[-1:],
        normalization=entry.normalization,
        student=student,
        copies=True,
    )


FAMILY = Family(("pdn_small", *PUBLISHED), _registered)
