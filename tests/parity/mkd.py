"""MKD against get_networks, MseDirectionLoss, detection_test and the localizations of Knowledge_Distillation_AD.

rohban-lab/Knowledge_Distillation_AD, commit 0c574ae9ad12666982a1ccc2c7148acd6bf442fe: a VGG-16 teaches the smaller
cloner (`equal_network_size=False`, without biases) with `lamda=0.5`, and Adam as in train.py but at 3e-5 (at 1e-3,
rounding decides after three steps which units are on).

Images are not normalized, as there; the first two are scored. Heat maps are those of the untrained cloner: absolute
gradients summed over channels and smoothed, without `convert_to_grayscale`'s clipping and scaling, from
`gradients_localization` and, with the same smoothing, from `GuidedBackprop`. jaxad's variances of batches are corrected
before images are scored.
"""

import re
from typing import Any

import jax
import numpy as np

from jaxad.backbones import backbone, vgg
from jaxad.methods.mkd import MkdCloner, mkd
from tests.parity.golden import Golden, pixels, synthetic
from tests.parity.steps import KEY, batch_of, follow, from_torch, gradient, shapes_of, to_torch, unbiased, under

N, SIDE = 8, 32
NETWORK, LAYERS = "vgg16", ("pool2", "pool3", "pool4", "pool5")
NUMBERS = {"ConvNorm": (0, 6, 12, 15, 21, 24, 30, 33), "Conv": (3, 9, 18, 27, 36)}
"""Of the convolutions in `features`."""
SIDES = (32, 16, 8, 8, 4, 4, 2, 2)
"""Rows and columns of what is normalized."""
LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def name_of(path: str) -> str:
    """A leaf of the parameters or statistics -> its tensor in torch."""
    kind, number, part, leaf = re.fullmatch(r"(\w+)_(\d)/(\w+/)?(\w+)", path).groups()
    return f"features.{NUMBERS[kind][int(number)] + (part == 'norm/')}.{LEAVES.get(leaf, leaf)}"


def positions(path: str) -> int:
    """Values of a batch that a batch norm averages over."""
    return N * SIDES[int(path[len("ConvNorm_")])] ** 2


def teacher() -> Any:
    """The teacher's weights, for images in [0, 1]."""
    network = backbone(NETWORK)
    modules = jax.eval_shape(network.init, KEY)["params"]
    sources = {m: vgg.source(vgg.CONVOLUTIONS[NETWORK], False, m) for m in modules}
    shapes = {
        k: shape for m, leaves in modules.items() for k, shape in sources[m].shapes(leaves["kernel"].shape).items()
    }
    frozen = network.fold({k: synthetic(f"vgg.{k}", shape) for k, shape in shapes.items()})
    return frozen | {"mean": np.zeros(3, np.float32), "std": np.full(3, 255, np.float32)}


def ours(golden: Golden) -> dict[str, Any]:
    del golden
    frozen = teacher()
    method, guided = (
        mkd(backbone=NETWORK, layers=LAYERS, image_size=(SIDE, SIDE), localization=kind, learning_rate=3e-5)
        for kind in ("gradients", "guided_backprop")
    )
    stage = method.stages[0]
    x = jax.jit(method.embed)(frozen, pixels("images", N, SIDE, SIDE, 3))
    start = shapes_of(stage, x)
    params, stats = (
        from_torch(tree, name_of, lambda name, shape: synthetic(f"model.{name}", shape)) for tree in start.model
    )
    begin = MkdCloner(params, stats)
    states, losses = follow(stage, start._replace(model=begin), [batch_of(x)] * 3, frozen)
    last = MkdCloner(states[-1].model.params, unbiased(states[-1].model.stats, stats, positions))
    score, first = jax.jit(method.score), jax.tree.map(lambda leaf: leaf[:2], x)
    return {
        "loss": np.asarray(losses),
        **under("gradient", to_torch(gradient(states[0]), name_of)),
        **under("parameters after a step", to_torch(states[0].model.params, name_of)),
        **under("statistics after 3 steps", to_torch(last.stats, name_of)),
        "score": score(last, frozen, first).image,
        "heat map": score(begin, frozen, first).pixel,
        "guided heat map": jax.jit(guided.score)(begin, frozen, first).pixel,
    }
