"""STFPM against ResNet18_MS3, train_val and test of gdwang08/STFPM's main.py, with a narrow ResNet.

Commit 2598a5e35fd02f2f9dcfd0f3e8249adc22320e59. `train_val` ran three epochs of one batch with an optimizer of its own;
`test` multiplies the maps on a grid of 64 x 64, which is the size of the images here. The heat map of wider images is
that of anomalib's AnomalyMapGenerator, for the maps of the same networks. `test` has no factor 1/2 for each of the
three maps, which anomalib and jaxad have; jaxad's variances of batches are corrected before images are scored.
"""

from typing import Any

import jax
import numpy as np

from jaxad.backbones import resnet
from jaxad.methods.stfpm import StfpmTraining, stfpm
from tests.parity.golden import Golden, pixels, synthetic
from tests.parity.steps import KEY, batch_of, follow, from_torch, gradient, shapes_of, to_torch, unbiased, under
from tests.tiny import TINY_RESNET

N, SIDE = 4, 64
LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
FACTOR = 1 / 2**3
"""Of all maps together."""


def tensor_of(module: str) -> str:
    """A module of torchvision's ResNet -> its name in ResNet18_MS3."""
    first, dot, rest = module.partition(".")
    number = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3").index(first)
    return f"model.{number}{dot}{rest}"


def name_of(path: str) -> str:
    """A leaf of the student -> its tensor in torch."""
    module, part, leaf = path.split("/")
    source = resnet.source(module)
    return f"{tensor_of(source.conv if part == 'conv' else source.norm)}.{LEAVES.get(leaf, leaf)}"


def teacher() -> Any:
    """The teacher's weights."""
    modules = jax.eval_shape(TINY_RESNET.init, KEY)["params"]
    shapes = [resnet.source(m).shapes(v["kernel"].shape) for m, v in modules.items() if not m.startswith("layer4")]
    names = {k: v for part in shapes for k, v in part.items()}
    tensors = {k: f"teacher.{tensor_of(k.rpartition('.')[0])}.{k.rpartition('.')[2]}" for k in names}
    return TINY_RESNET.fold({k: synthetic(tensors[k], v) for k, v in names.items()})


def positions(path: str) -> int:
    """Values of a batch that a batch norm averages over."""
    stride = 2 if path.startswith("conv1") else 2 ** (1 + int(path[len("layer")]))
    return N * (SIDE // stride) ** 2


def ours(golden: Golden) -> dict[str, Any]:
    del golden
    frozen = teacher()
    method, wide = (stfpm(backbone=TINY_RESNET, image_size=(SIDE, width)) for width in (SIDE, 96))
    embed, stage = jax.jit(method.embed), method.stages[0]
    x = embed(frozen, pixels("images", N, SIDE, SIDE, 3))
    start = shapes_of(stage, x)
    params, stats = (
        from_torch(tree, name_of, lambda name, shape: synthetic(f"student.{name}", shape)) for tree in start.model
    )
    states, losses = follow(stage, start._replace(model=StfpmTraining(params, stats)), [batch_of(x)] * 3, frozen)
    stats = unbiased(states[-1].model.stats, stats, positions)
    last = states[-1]._replace(model=StfpmTraining(states[-1].model.params, stats))
    student = jax.jit(stage.finalize)(KEY, last, frozen)
    scores = jax.jit(method.score)(student, frozen, x)
    return {
        "loss": np.asarray(losses),
        **under("gradient", to_torch(gradient(states[0]), name_of)),
        **under("parameters after 3 steps", to_torch(last.model.params, name_of)),
        **under("statistics after 3 steps", to_torch(stats, name_of)),
        "heat map": scores.pixel / FACTOR,
        "score": scores.image / FACTOR,
        "heat map at the size of the image": jax.jit(wide.score)(
            student, frozen, embed(frozen, pixels("wide images", 2, SIDE, 96, 3))
        ).pixel,
    }
