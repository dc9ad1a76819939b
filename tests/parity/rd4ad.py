"""RD4AD against BN_layer, ResNet (de_resnet.py), loss_fucntion and cal_anomaly_map of hq-deng/RD4AD, on given maps.

Commit 6554076872c65f8784f6ece8cfb39ce77e1aee12. The networks are those of a Wide ResNet-50-2 with a sixteenth of its
channels and fewer blocks: `BN_layer(AttnBottleneck, 1)` and `ResNet(Bottleneck, [1, 2, 1, 1])`, both with
`width_per_group=128`, trained by Adam as in main.py but with a rate of 5e-4 (at 5e-3, rounding decides after
three steps which units are on); maps are smoothed by scipy's `gaussian_filter`, as in `evaluation`.

The maps are upsampled as there, so that corners stay corners; and jaxad's variances of batches are corrected before
images are scored.
"""

import re
from typing import Any
from unittest.mock import patch

import jax
import numpy as np

from jaxad.backbones import ResidualBlocks, resnet
from jaxad.methods.rd4ad import Rd4adStudent, rd4ad
from tests.parity.golden import Golden, normal, synthetic
from tests.parity.steps import (
    KEY,
    batch_of,
    follow,
    from_torch,
    gradient,
    nhwc,
    shapes_of,
    to_torch,
    unbiased,
    under,
)

N, SIDE = 4, 128
SHAPES = {"layer1": (16, 32, 32), "layer2": (32, 16, 16), "layer3": (64, 8, 8)}
BACKBONE = resnet.make("narrow", ResidualBlocks((1, 2, 1, 1), 0.5, 4))
BLOCKS = ("bn.bn_layer.0", *(f"decoder.layer{name}" for name in ("1.0", "2.0", "2.1", "3.0")))
SIDES = {"ConvNorm": (16, 8, 8), "Residual": (4, 8, 16, 16, 32)}
"""Rows and columns of the results of the bottleneck's convolutions, and of all blocks."""
SCALES = (2, 0.5, 0.5, 1, 0.5)
"""Rows and columns of a block's input by those of its result."""
LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}

ROUNDED = "Adam's steps are as large for gradients of the size of rounding as for others"
TOLERANCES = {"heat map": (5e-4, ROUNDED), "score": (3e-4, ROUNDED)}


def name_of(path: str) -> str:
    """A leaf of the parameters or statistics -> its tensor in torch."""
    kind, number, conv, part, leaf = re.fullmatch(r"(\w+)_(\d)/(?:ConvNorm_(\d)/)?(\w+)/(\w+)", path).groups()
    second, end = part == "norm", LEAVES.get(leaf, leaf)
    if kind == "ConvNorm":
        return f"bn.{'bn' if second else 'conv'}{int(number) + 1}.{end}"
    block = BLOCKS[int(number)]
    if conv == "3":
        return f"{block}.{'upsample' if block.startswith('decoder') else 'downsample'}.{int(second)}.{end}"
    return f"{block}.{'bn' if second else 'conv'}{int(conv) + 1}.{end}"


def positions(path: str) -> int:
    """Values of a batch that a batch norm averages over."""
    kind, number, conv = re.match(r"(\w+)_(\d)/(?:ConvNorm_(\d)/)?", path).groups()
    side = SIDES[kind][int(number)]
    return N * int(side * SCALES[int(number)] if kind == "Residual" and conv == "0" else side) ** 2


def axes_of(name: str) -> tuple[int, ...]:
    """A transposed convolution's tensor has the inputs first."""
    up = re.fullmatch(r"decoder\.layer\d\.0\.(conv2|upsample\.0)\.weight", name)
    return (1, 0, 2, 3) if up else tuple(range(4))


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor with the outputs first."""
    axes = axes_of(name)[: len(shape)]
    return synthetic(name, tuple(shape[axis] for axis in axes)).transpose(axes)


def tensors(tree: Any) -> dict[str, np.ndarray]:
    """The arrays of a tree as torch's modules have them."""
    return {k: v.transpose(axes_of(k)[: v.ndim]) for k, v in to_torch(tree, name_of).items()}


def corners(size: int, out: int) -> np.ndarray:
    """The matrix of bilinear upsampling where corners stay corners."""
    return np.maximum(0, 1 - np.abs(np.linspace(0, size - 1, out)[:, None] - np.arange(size)))


def ours(golden: Golden) -> dict[str, Any]:
    del golden
    method = rd4ad(backbone=BACKBONE, image_size=(SIDE, SIDE), learning_rate=5e-4)
    x = {k: nhwc(abs(normal(f"features {shape[0]}", N, *shape))) for k, shape in SHAPES.items()}
    start = shapes_of(method.stages[0], x)
    params, stats = (from_torch(tree, name_of, tensor) for tree in start.model)
    states, losses = follow(method.stages[0], start._replace(model=Rd4adStudent(params, stats)), [batch_of(x)] * 3)
    model = states[-1].model
    model = model._replace(stats=unbiased(model.stats, stats, positions))
    with patch("jaxad.ops.heatmap.resize_matrix", corners):
        scores = jax.jit(method.score)(method.stages[0].finalize(KEY, states[-1]._replace(model=model), None), None, x)
    return {
        "loss": np.asarray(losses),
        **under("gradient", tensors(gradient(states[0], 0.5))),
        **under("parameters after a step", tensors(states[0].model.params)),
        **under("statistics after 3 steps", tensors(model.stats)),
        "heat map": scores.pixel,
        "score": scores.image,
    }
