"""Networks of 17, 33 or 65 px patches, evaluated on a whole image at once: the teachers of Uninformed Students.

A stage is a density: `stride1` describes the patch around every pixel, `stride4` the patch in the middle of every 4 x 4
pixels. Where a patch network pools, the dense network pools with a stride only until the requested density is reached;
after that it pools with stride 1 and dilates all later layers. Every position then holds exactly what the patch network
computes from that patch.

Paper: Uninformed Students, CVPR 2020, arXiv:1911.02357, section 3.1 and appendix; Fast Dense Feature Extraction with
    CNNs that have Pooling or Striding Layers, BMVC 2017, arXiv:1805.03096 (the same numbers, arranged in another way).
Reference: https://github.com/denguir/student-teacher-anomaly-detection, except for the third convolution of `patch65`,
    which has twice the channels there.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxad.backbones import convolution
from jaxad.backbones.architecture import Backbone, Family, Student, build, make_student
from jaxad.backbones.convolution import Conv, Params, Shapes, Source
from jaxad.backbones.registry import IMAGENET, Entry, Normalization
from jaxad.nn.initial import torch_bias, torch_uniform

OUT = 128
"""Channels of the description."""


class Layout(NamedTuple):
    """A patch network."""

    patch_size: int
    """Height and width of the patches in pixels."""
    convolutions: tuple[tuple[int, int, bool], ...]
    """Kernel and channels of every convolution, and whether max pooling 2x2 follows."""


LAYOUTS = {
    "patch17": Layout(17, ((6, 128, False), (5, 256, False), (5, 256, False), (4, OUT, False))),
    "patch33": Layout(33, ((5, 128, True), (5, 256, True), (2, 256, False), (4, OUT, False))),
    "patch65": Layout(65, ((5, 128, True), (5, 128, True), (5, 128, True), (4, 256, False), (1, OUT, False))),
}
STAGES = ("stride1", "stride2", "stride4", "stride8")
SLOPE = 5e-3
"""Negative slope of the leaky ReLUs."""


class PatchNetwork(nn.Module):
    """Descriptions of patches; the image is padded with zeros."""

    layout: Layout
    conv: Any = Conv
    """Makes a convolution from (features, kernel, stride, dilation, pad, name)."""
    single_patch: bool = False
    """The image is one patch and is not padded."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"], layers: tuple[str, ...]) -> dict[str, Float[Array, "b _ _ c"]]:
        """The descriptions of a normalized image's patches at those densities."""
        strides = {layer: int(layer.removeprefix("stride")) for layer in layers}
        finest, stride, dilation = min(strides.values()), 1, 1
        rows, columns = (-(-size // finest) for size in x.shape[1:3])
        patch_size, convolutions = self.layout
        if not self.single_patch:
            border, middle = (patch_size - 1) // 2, finest // 2
            pads = ((border - middle, border + middle),) * 2
            x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        for i, (kernel, features, pooling) in enumerate(convolutions):
            last = i == len(convolutions) - 1
            step = max(1, finest // stride) if last else 1
            x = self.conv(features, kernel, step, pad=False, dilation=dilation, name=f"conv{i + 1}")(x)
            if not last:
                x = jax.nn.leaky_relu(x, SLOPE)
            if pooling:
                strided = stride < finest or self.single_patch
                x = max_pool(x, 2 if strided else 1, dilation)
                stride, dilation = (stride * 2, 1) if strided else (stride, dilation * 2)
        x = x[:, :rows, :columns]  # pooling drops an odd last row, so some patches start behind the image
        return {layer: x[:, :: spacing // finest, :: spacing // finest] for layer, spacing in strides.items()}


def max_pool(x: Float[Array, "b h w c"], stride: int, dilation: int) -> Float[Array, "b h2 w2 c"]:
    """Max pooling over 2x2 positions that are `dilation` apart: a window of XLA with gaps has no gradient."""
    h, w = (size - dilation for size in x.shape[1:3])
    starts = [(i, j) for i in (0, dilation) for j in (0, dilation)]
    return functools.reduce(jnp.maximum, (x[:, i : i + h : stride, j : j + w : stride] for i, j in starts))


def source(module: str) -> Source:
    """The names of a convolution in a checkpoint."""
    return Source(module, None)


@functools.lru_cache
def make(name: str, layout: Layout, *, normalization: Normalization = IMAGENET) -> Backbone:
    """A patch network with a layout of the caller's own; equal arguments give the same object.

    Args:
        name: Name of the backbone, for messages.
        layout: Its patch size and convolutions; they reduce a patch to a single position.
        normalization: Mean and deviation of the training images, RGB in 0..255.

    Raises:
        ValueError: The convolutions do not fit the patch size.
    """
    positions = layout.patch_size
    for kernel, _, pooling in layout.convolutions:
        positions = (positions - kernel + 1) // (2 if pooling else 1)
    if positions != 1:
        raise ValueError(
            f"the convolutions of {name} must reduce {layout.patch_size} px to 1 position, got {positions}"
        )

    def fold(modules: Mapping[str, Shapes], tensors: Mapping[str, np.ndarray]) -> Params:
        return convolution.fold(STAGES, modules, source, tensors)

    def student(layers: tuple[str, ...], copies: int) -> Student:
        del copies
        conv = functools.partial(Conv, kernel_init=torch_uniform, bias_init=torch_bias, as_products=True)
        return make_student(PatchNetwork(layout, conv), layers)

    return build(
        name,
        "patchnet",
        PatchNetwork(layout),
        STAGES,
        fold,
        patch_layers=("stride4",),
        pyramid_layers=("stride4",),
        normalization=normalization,
        patch_size=layout.patch_size,
        student=student,
    )


def _registered(name: str, entry: Entry) -> Backbone:
    return make(name, LAYOUTS[entry.architecture], normalization=entry.normalization)


FAMILY = Family(tuple(LAYOUTS), _registered)
