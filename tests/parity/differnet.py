"""DifferNet against the official code, marco-rudolph/differnet at commit 9bdf026, with two convolutions as AlexNet.

Images turned by fixed_rotation go through DifferNet, get_loss, the Adam of train.py and export_gradient_maps (one image
at a time, as batch_size_test has it). Their angles are multiples of 90 degrees, at which bilinear and cubic
interpolation and the nearest pixel are the same; every step takes all of them.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array

from jaxad.backbones.architecture import build
from jaxad.backbones.convolution import Conv
from jaxad.methods.differnet import DiffernetFlow, differnet
from tests.parity.golden import Golden, pixels
from tests.parity.steps import batch_of, follow, from_torch, gradient, shapes_of, to_torch, under

LAYERS = ("fc1", "fc2", "fc2b", "fc3")
BLOCKS, ROTATIONS = 2, 4


class Convolutions(nn.Module):
    """The backbone, whose layers are torch's features.0 and features.2."""

    @nn.compact
    def __call__(self, x: Array, layers: tuple[str, ...]) -> dict[str, Array]:
        x = nn.relu(Conv(4, 5, 2, name="features0")(x))
        return {"features": nn.relu(Conv(3, 3, 2, name="features2")(x))}


def fold(shapes: Any, tensors: Any) -> Any:
    """A torch checkpoint -> the parameters of the backbone."""
    return {
        f"features{i}": {
            "kernel": tensors[f"features.{i}.weight"].transpose(2, 3, 1, 0),
            "bias": tensors[f"features.{i}.bias"],
        }
        for i in (0, 2)
    }


BACKBONE = build("convolutions", "own", Convolutions(), ("features",), fold)


def name_of(path: str) -> list[str]:
    """A leaf of the parameters -> its tensors in torch, one for each block."""
    first, dense, leaf = re.findall(r"\w+", path.replace("params/Dense_", ""))
    tensor = f"s{2 - int(first)}.{LAYERS[int(dense)]}.{leaf.replace('kernel', 'weight')}"
    return [f"block{block}.{tensor}" for block in range(BLOCKS)]


def ours(golden: Golden) -> dict[str, Any]:
    method = differnet(
        backbone=BACKBONE,
        image_size=(24, 24),
        coupling_blocks=BLOCKS,
        hidden=4,
        rotations=ROTATIONS,
        train_rotations=ROTATIONS,
        localize=True,
    )
    frozen, stage = BACKBONE.fold(golden.given), method.stages[0]
    x = jax.jit(method.embed)(frozen, pixels("images", 3, 24, 24, 3))
    start = shapes_of(stage, x)
    params = from_torch(start.model.params, name_of)
    permutations = jnp.asarray([golden.given[f"permutation {block}"] for block in range(BLOCKS)])
    states, losses = follow(stage, start._replace(model=DiffernetFlow(params, permutations)), [batch_of(x)] * 3)
    change = jax.tree.map(lambda new, old: np.asarray(new) - old, states[-1].model.params, params)
    scores = jax.jit(method.score)(states[-1].model, frozen, x)
    return {
        **under("gradient", to_torch(gradient(states[0], 0.8), name_of)),
        "loss": np.asarray(losses),
        **under("change in 3 steps", to_torch(change, name_of)),
        "score": scores.image,
        "heat map": scores.pixel,
    }
