"""VGG-11, 13, 16 and 19 feature pyramids in flax.linen, without batch norm or with it folded into the convolutions.

A stage is a block of convolutions with the max pooling behind it, so that `pool2` has stride 4.

Paper: Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015, arXiv:1409.1556, Table 1.
Reference: torchvision.models.vgg and timm.models.vgg (parameter names).
"""

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from jaxad.backbones.convolution import Conv, Source

STAGES = ("pool1", "pool2", "pool3", "pool4", "pool5")
PATCH_LAYERS = ("pool3", "pool4")
PYRAMID_LAYERS = ("pool2", "pool3", "pool4")
WIDTHS = (64, 128, 256, 512, 512)
BLOCKS = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
"""Convolutions of every stage; `vgg16_bn` has those of `vgg16`."""
ARCHITECTURES = (*BLOCKS, *(f"{name}_bn" for name in BLOCKS))


def blocks(architecture: str) -> tuple[int, ...]:
    """Convolutions of every stage."""
    return BLOCKS[architecture.removesuffix("_bn")]


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Max pooling 2x2 with stride 2; an odd row or column at the end is left out."""
    return nn.max_pool(x, (2, 2), (2, 2))


class Vgg(nn.Module):
    """Feature maps of a VGG by stage name; nothing past the last wanted stage is computed."""

    architecture: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"], layers: tuple[str, ...]) -> dict[str, Float[Array, "b _ _ _"]]:
        """The maps of those stages of a normalized image."""
        maps = {}
        for s in range(max(map(STAGES.index, layers)) + 1):
            for i in range(blocks(self.architecture)[s]):
                x = jax.nn.relu(Conv(WIDTHS[s], 3, name=f"{STAGES[s]}.{i}")(x))
            x = maps[STAGES[s]] = max_pool(x)
        return {layer: maps[layer] for layer in layers}


def source(architecture: str, module: str) -> Source:
    """The names of a convolution, and of its batch norm if there is one, in torchvision's and timm's checkpoints."""
    stage, i = module.split(".")
    s, normed = STAGES.index(stage), architecture.endswith("_bn")
    before = sum(blocks(architecture)[:s]) + int(i)
    number = before * (3 if normed else 2) + s
    return Source(f"features.{number}", f"features.{number + 1}" if normed else None, biased=normed)
