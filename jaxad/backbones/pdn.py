"""Small fully convolutional patch-description networks: that of a fresh clone, and the published ones of EfficientAD.

Every output position of `pdn_small` describes the 65 px patch around it. Its weights in the package are distilled from
a ResNet-50's layer2 and layer3 by `experiments/distill_backbone.py`, much as the patch networks of the two papers below
are; its channels are principal components of those, of one scale, not channels of unit variance each.
Those of `efficientad_small` and `efficientad_medium` describe patches of 33 px; whoever has their authors' or a
reimplementation's weights imports them.

Paper: Uninformed Students, CVPR 2020, arXiv:1911.02357; EfficientAD, WACV 2024, arXiv:2303.14535, Tables 6 and 7.
Reference: https://github.com/nelson1425/EfficientAD and anomalib (parameter names of the published ones).
"""

from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float

from jaxad.backbones.convolution import Conv, Source

STAGES = ("layer1", "layer2", "layer3")
PATCH_LAYERS = ("layer3",)
PYRAMID_LAYERS = STAGES
WIDTHS = (64, 160, 256)
BLOCKS = 3
OUT = 384
PUBLISHED = {
    "efficientad_small": ((4, 128), (4, 256), (3, 256), (4, OUT)),
    "efficientad_medium": ((4, 256), (4, 512), (1, 512), (3, 512), (4, OUT), (1, OUT)),
}
"""Kernel and channels of every convolution; average pooling follows the first two."""
PUBLISHED_STAGES = ("head",)


class PatchDescriptionNetwork(nn.Module):
    """`layer1` (stride 4) and `layer2` (stride 8) are hidden maps; `layer3` (stride 8) is the description itself."""

    out: int = OUT
    conv: Any = Conv
    """What makes a convolution of (features, kernel, stride, name)."""

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
    """EfficientAD's, without padding: 256 px give 56 positions, of stride 4."""

    architecture: str
    out: int = OUT
    """Channels of the description, and of whatever else has as many."""
    conv: Any = Conv

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"], layers: tuple[str, ...]) -> dict[str, Float[Array, "b _ _ _"]]:
        """The description of a normalized image, its only stage."""
        shapes = PUBLISHED[self.architecture]
        for i, (kernel, features) in enumerate(shapes):
            x = self.conv(self.out if features == OUT else features, kernel, pad=False, name=f"conv{i + 1}")(x)
            if i < len(shapes) - 1:
                x = jax.nn.relu(x)
            if i < 2:
                x = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
        return dict.fromkeys(layers, x)


def source(architecture: str, module: str, keys: Collection[str]) -> Source:
    """The names of a convolution of a published network in a checkpoint: anomalib's, or those of a torch sequence."""
    if "conv1.weight" in keys:
        return Source(module, None)
    number = int(module.removeprefix("conv")) - 1  # activations lie between, and two pools after the first ones
    return Source(str(2 * number + min(number, 2)), None)


def fold(tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The file of `pdn_small` (`conv1.kernel`, `conv1.bias`, ... in half precision) as flax parameters in float32."""
    params: dict[str, dict[str, np.ndarray]] = {}
    for name, value in tensors.items():
        module, leaf = name.rsplit(".", 1)
        params.setdefault(module, {})[leaf] = np.asarray(value, np.float32)
    return params
