"""Networks of 17, 33 or 65 px patches, evaluated on a whole image at once: the teachers of Uninformed Students.

A stage is a density: `stride1` describes the patch around every pixel, `stride4` that in the middle of every 4 x 4.
Where a network of patches halves its map, a dense one halves it as long as the stride allows, and from then on looks at
positions twice as far apart (dilation): every position has just what the network makes of its patch alone.

Paper: Uninformed Students, CVPR 2020, arXiv:1911.02357, section 3.1 and appendix; Fast Dense Feature Extraction with
    CNNs that have Pooling or Striding Layers, BMVC 2017, arXiv:1805.03096 (the same numbers, arranged in another way).
Reference: https://github.com/denguir/student-teacher-anomaly-detection, but for the third convolution of `patch65`,
    which has twice the channels there.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxad.backbones.convolution import Conv, Source

OUT = 128
LAYERS = {
    "patch17": ((6, 128, False), (5, 256, False), (5, 256, False), (4, OUT, False)),
    "patch33": ((5, 128, True), (5, 256, True), (2, 256, False), (4, OUT, False)),
    "patch65": ((5, 128, True), (5, 128, True), (5, 128, True), (4, 256, False), (1, OUT, False)),
}
"""Kernel and channels of every convolution, and whether max pooling 2x2 follows."""
STAGES = ("stride1", "stride2", "stride4", "stride8")
SLOPE = 5e-3
"""Of the leaky ReLUs."""


def patch_size(architecture: str) -> int:
    """Height and width of the patches in pixels."""
    return int(architecture.removeprefix("patch"))


class PatchNetwork(nn.Module):
    """Descriptions of patches; the image is surrounded by zeros."""

    architecture: str
    conv: Any = Conv
    """What makes a convolution of (features, kernel, stride, dilation, pad, name)."""
    alone: bool = False
    """The image is one patch, with nothing around it."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"], layers: tuple[str, ...]) -> dict[str, Float[Array, "b _ _ c"]]:
        """The descriptions of a normalized image's patches at those densities."""
        strides = {layer: int(layer.removeprefix("stride")) for layer in layers}
        finest, stride, dilation = min(strides.values()), 1, 1
        grid = tuple(-(-size // finest) for size in x.shape[1:3])
        if not self.alone:
            around, middle = (patch_size(self.architecture) - 1) // 2, finest // 2
            pads = ((around - middle, around + middle),) * 2
            x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        convolutions = LAYERS[self.architecture]
        for i, (kernel, features, pooled) in enumerate(convolutions):
            last = i == len(convolutions) - 1
            step = max(1, finest // stride) if last else 1
            x = self.conv(features, kernel, step, pad=False, dilation=dilation, name=f"conv{i + 1}")(x)
            if not last:
                x = jax.nn.leaky_relu(x, SLOPE)
            if pooled:
                halved = stride < finest or self.alone
                x = max_pool(x, 2 if halved else 1, dilation)
                stride, dilation = (stride * 2, 1) if halved else (stride, dilation * 2)
        x = x[:, : grid[0], : grid[1]]  # a pooling leaves out the last row of an odd number, so some patches fit behind
        return {layer: x[:, :: apart // finest, :: apart // finest] for layer, apart in strides.items()}


def max_pool(x: Float[Array, "b h w c"], stride: int, dilation: int) -> Float[Array, "b h2 w2 c"]:
    """The largest of 2x2 positions that are `dilation` apart."""
    window, steps, apart = (1, 2, 2, 1), (1, stride, stride, 1), (1, dilation, dilation, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, steps, "VALID", window_dilation=apart)


def source(module: str) -> Source:
    """The names of a convolution in a checkpoint."""
    return Source(module, None)
