"""CFLOW-AD against anomalib's CflowModel, with features in place of its backbone, and all positions in one step.

anomalib subtracts a map from the largest value of the batch, jaxad from the number of levels; both maps are compared
from their smallest value on. All levels have the size of the heat map, because anomalib upsamples with aligned corners;
and the images that are scored are those of the training, which the largest likelihood is taken of.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxad.methods.cflow import CflowFlows, cflow
from tests.parity.golden import Golden, normal
from tests.parity.steps import KEY, batch_of, follow, from_torch, gradient, nhwc, shapes_of, to_torch, under

SHAPES, BLOCKS = {"layer1": (5, 6, 8), "layer2": (6, 6, 8)}, 2


def name_of(path: str) -> list[str]:
    """A leaf of the parameters -> its tensors in torch."""
    layer, leaf = path.split("/", 1)
    dense = re.fullmatch(r"subnet/params/Dense_(\d)/(\w+)", leaf)
    if dense:
        tensor = f"subnet.{2 * int(dense[1])}.{dense[2].replace('kernel', 'weight')}"
    else:
        tensor = {"scale": "global_scale", "shift": "global_offset"}[leaf]
    return [f"decoders.{list(SHAPES).index(layer)}.module_list.{block}.{tensor}" for block in range(BLOCKS)]


def ours(golden: Golden) -> dict[str, Any]:
    method = cflow(
        layers=tuple(SHAPES), image_size=(6, 8), coupling_blocks=BLOCKS, condition_size=8, learning_rate=0.01
    )
    train, calibrate = method.stages
    x = {layer: nhwc(normal(f"features {layer}", 4, *shape)) for layer, shape in SHAPES.items()}
    rotations = {
        layer: jnp.stack([golden.given[f"decoders.{i}.module_list.{j}.w_perm"].T for j in range(BLOCKS)])
        for i, layer in enumerate(SHAPES)
    }
    start = shapes_of(train, x)
    flows = CflowFlows(from_torch(start.model.params, name_of), rotations)
    batch = batch_of(x, progress=0.5)
    states, losses = follow(train, start._replace(model=flows), [batch] * 3)

    def scored(flows: CflowFlows) -> Any:
        state, _ = calibrate.update(KEY, calibrate.init(KEY, flows, None, None), None, batch)
        return method.score(state, None, x)

    scores = jax.jit(scored)(states[-1].model)
    gradients = dict(zip(SHAPES, gradient(states[0]), strict=True))
    return {
        **under("gradient", to_torch(gradients, name_of)),
        "loss": np.asarray(losses),
        **under("parameters after 3 steps", to_torch(states[-1].model.params, name_of)),
        "heat map": scores.pixel - scores.pixel.min(),
        "score": scores.image - scores.pixel.min(),
    }
