"""EfficientNet-B0..B7 feature pyramids in flax.linen, with batch norm folded into the convolutions.

`efficientnet_b0` pads its convolutions symmetrically, as the networks trained in torch do; `tf_efficientnet_b0` pads as
TensorFlow does ("SAME"), for the authors' weights. The nine stages are the stem, the seven groups of blocks and the
head's 1x1 convolution: the levels of Mahalanobis AD (arXiv:2005.14140).

Paper: EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, ICML 2019, arXiv:1905.11946, Table 1
    and Section 3.3.
Reference: timm.models.efficientnet and torchvision.models.efficientnet (parameter names).
"""

import math
from collections.abc import Collection

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxad.backbones.convolution import Conv, DepthwiseConv, Source

STAGES = ("stem", *(f"blocks.{s}" for s in range(7)), "head")
PATCH_LAYERS = ("blocks.2", "blocks.4")
PYRAMID_LAYERS = ("blocks.1", "blocks.2", "blocks.4")
# kernel, stride, expansion, channels, blocks of each of B0's seven groups
BLOCKS = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
# width and depth of B0..B7 relative to B0
SCALES = ((1.0, 1.0), (1.0, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8), (1.6, 2.2), (1.8, 2.6), (2.0, 3.1))


def channels(base: int, width: float) -> int:
    """`base` times the width factor, rounded to a multiple of 8 that is not more than 10 % below it."""
    wanted = base * width
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * wanted else rounded + 8


class EfficientNet(nn.Module):
    """Feature maps of an EfficientNet by stage name; nothing past the last wanted stage is computed."""

    architecture: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"], layers: tuple[str, ...]) -> dict[str, Float[Array, "b _ _ _"]]:
        """The maps of those stages of a normalized image."""
        swish = jax.nn.swish
        same = self.architecture.startswith("tf_")
        width, depth = SCALES[int(self.architecture[-1])]
        last = max(map(STAGES.index, layers))
        maps = {"stem": swish(Conv(channels(32, width), 3, 2, same, name="stem")(x))}
        x = maps["stem"]
        for s, (kernel, stage_stride, expansion, base, repeats) in enumerate(BLOCKS[: min(last, len(BLOCKS))]):
            out = channels(base, width)
            for i in range(math.ceil(repeats * depth)):
                stride = stage_stride if i == 0 else 1
                prefix, entering = f"blocks.{s}.{i}.", x.shape[-1]
                y = x if expansion == 1 else swish(Conv(entering * expansion, 1, name=prefix + "expand")(x))
                y = swish(DepthwiseConv(kernel, stride, same, name=prefix + "depthwise")(y))
                gate = y.astype(jnp.float32).mean((1, 2), keepdims=True).astype(y.dtype)
                gate = swish(Conv(entering // 4, 1, name=prefix + "squeeze")(gate))
                y = y * jax.nn.sigmoid(Conv(y.shape[-1], 1, name=prefix + "excite")(gate))
                y = Conv(out, 1, name=prefix + "project")(y)
                x = x + y if stride == 1 and entering == out else y
            maps[f"blocks.{s}"] = x
        if "head" in layers:
            maps["head"] = swish(Conv(channels(1280, width), 1, name="head")(x))
        return {layer: maps[layer] for layer in layers}


def source(architecture: str, module: str, keys: Collection[str]) -> Source:
    """The names of a convolution and its batch norm in a checkpoint with those keys: torchvision's or timm's."""
    *block, op = module.split(".")
    first = block[1:2] == ["0"]  # the first group does not expand, so the numbers of its layers are one less
    if "features.0.0.weight" in keys:
        eps = 1e-3 if int(architecture[-1]) >= 5 else 1e-5
        if not block:
            number = {"stem": 0, "head": 8}[op]
            return Source(f"features.{number}.0", f"features.{number}.1", eps)
        prefix = f"features.{int(block[1]) + 1}.{block[2]}.block"
        number = {"expand": 0, "depthwise": 1, "squeeze": 2, "excite": 2, "project": 3}[op] - first
        if op in ("squeeze", "excite"):
            return Source(f"{prefix}.{number}.{'fc1' if op == 'squeeze' else 'fc2'}", None)
        return Source(f"{prefix}.{number}.0", f"{prefix}.{number}.1", eps)
    eps = 1e-3 if architecture.startswith("tf_") else 1e-5
    if not block:
        return Source(f"conv_{op}", "bn1" if op == "stem" else "bn2", eps)
    prefix = ".".join(block)
    if op in ("squeeze", "excite"):
        return Source(f"{prefix}.se.conv_{'reduce' if op == 'squeeze' else 'expand'}", None)
    conv = {"expand": "pw", "depthwise": "dw", "project": "pw" if first else "pwl"}[op]
    number = {"expand": 1, "depthwise": 2, "project": 3}[op] - first
    return Source(f"{prefix}.conv_{conv}", f"{prefix}.bn{number}", eps)
