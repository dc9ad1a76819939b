"""A small fully convolutional patch-description network: the embedded backbone of a fresh clone.

Every output position describes the 65 px patch around it. The weights in the package are distilled from a
ResNet-50's layer2 and layer3 by `experiments/distill_backbone.py`, as the patch networks of the two papers below are.

Paper: Uninformed Students, CVPR 2020, arXiv:1911.02357; EfficientAD, WACV 2024, arXiv:2303.14535.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float

from jaxad.backbones.convolution import Conv

STAGES = ("layer1", "layer2", "layer3")
PATCH_LAYERS = ("layer3",)
PYRAMID_LAYERS = STAGES
WIDTHS = (64, 160, 256)
BLOCKS = 3
OUT = 384


class PatchDescriptionNetwork(nn.Module):
    """`layer1` (stride 4) and `layer2` (stride 8) are hidden maps; `layer3` (stride 8) is the description itself."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"], layers: tuple[str, ...]) -> dict[str, Float[Array, "b _ _ _"]]:
        """The maps of those stages of a normalized image."""
        relu = jax.nn.relu
        maps = {}
        x = relu(Conv(WIDTHS[0], 5, 2, name="conv1")(x))
        x = maps["layer1"] = relu(Conv(WIDTHS[1], 3, 2, name="conv2")(x))
        if {"layer2", "layer3"} & set(layers):
            x = maps["layer2"] = relu(Conv(WIDTHS[2], 3, 2, name="conv3")(x))
        if "layer3" in layers:
            for i in range(BLOCKS):
                y = relu(Conv(WIDTHS[2] // 2, 1, name=f"block{i}.conv1")(x))
                x = relu(x + Conv(WIDTHS[2], 3, name=f"block{i}.conv2")(y))
            maps["layer3"] = Conv(OUT, 1, name="head")(x)
        return {name: maps[name] for name in layers}


def fold(tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The network's own file (`conv1.kernel`, `conv1.bias`, ... in half precision) as flax parameters in float32."""
    params: dict[str, dict[str, np.ndarray]] = {}
    for name, value in tensors.items():
        module, leaf = name.rsplit(".", 1)
        params.setdefault(module, {})[leaf] = np.asarray(value, np.float32)
    return params
