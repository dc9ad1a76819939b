"""FastFlow against anomalib's FastflowModel, with features in place of its backbone.

anomalib's heat map is minus the mean likelihood; jaxad's is 1 more.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxad.methods.fastflow import FastflowFlows, fastflow
from tests.parity.golden import Golden
from tests.parity.steps import batch_of, follow, from_torch, gradient, nhwc, shapes_of, to_torch, under

LAYERS, BLOCKS = ("layer1", "layer2"), 4


def name_of(path: str) -> str | list[str]:
    """A leaf of the parameters -> its tensor in torch, or those of every second block."""
    level = LAYERS.index(path.partition("/")[0])
    norm = {"scale": "weight", "bias": "bias"}.get(path.partition("/")[2])
    if norm:
        return f"norms.{level}.{norm}"
    first, leaf = re.fullmatch(r"\w+/blocks/(\d)/(.*)", path).groups()
    conv = re.fullmatch(r"subnet/params/Conv_(\d)/(\w+)", leaf)
    if conv:
        tensor = f"subnet.{2 * int(conv[1])}.{conv[2].replace('kernel', 'weight')}"
    else:
        tensor = {"scale": "global_scale", "shift": "global_offset"}[leaf]
    return [f"fast_flow_blocks.{level}.module_list.{block}.{tensor}" for block in range(int(first), BLOCKS, 2)]


def ours(golden: Golden) -> dict[str, Any]:
    method = fastflow(layers=LAYERS, image_size=(32, 32), flow_steps=BLOCKS, learning_rate=0.01)
    x = {layer: nhwc(golden.given[f"features {i}"]) for i, layer in enumerate(LAYERS)}
    permutations = {
        layer: jnp.asarray([golden.given[f"fast_flow_blocks.{i}.module_list.{j}.w_perm"] for j in range(BLOCKS)])
        for i, layer in enumerate(LAYERS)
    }
    start = shapes_of(method.stages[0], x)
    params = from_torch(start.model.params, name_of)
    pairs = {layer: p.reshape(-1, 2, p.shape[-1]) for layer, p in permutations.items()}
    states, losses = follow(method.stages[0], start._replace(model=FastflowFlows(params, pairs)), [batch_of(x)] * 3)
    scores = jax.jit(method.score)(states[-1].model, None, x)
    return {
        **under("gradient", to_torch(gradient(states[0]), name_of)),
        "loss": np.asarray(losses),
        **under("parameters after 3 steps", to_torch(states[-1].model.params, name_of)),
        "heat map": scores.pixel - 1,
        "score": scores.image - 1,
    }
