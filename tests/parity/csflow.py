"""CS-Flow against anomalib's CsFlowModel and CsFlowLoss, with features in place of its backbone.

anomalib sums the log-determinants of a batch, so it is given one image at a time, and the losses are averaged. Its heat
map is that of AnomalyMapMode.MAX, its Adam that of the official code (anomalib's has other betas). With these weights,
inputs and permutations, get_cs_flow_model, nf_forward, get_loss and concat_maps of marco-rudolph/cs-flow (commit
88a13b8), trained on the whole batch as its train.py does, give what the file holds within 3e-6 (the change in 3 steps
within 5e-5).
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxad.methods.csflow import SCALES, CsflowFlow, csflow
from tests.parity.golden import Golden, normal
from tests.parity.steps import batch_of, follow, from_torch, gradient, nhwc, shapes_of, to_torch, under

CONVOLUTIONS = (
    *("conv_scale0_0", "conv_scale1_0", "conv_scale2_0"),
    *("conv_scale0_1", "up_conv10", "conv_scale1_1", "down_conv01", "up_conv21", "conv_scale2_1", "down_conv12"),
)
BLOCKS = 2
TOLERANCES = {"change in 3 steps": (3e-4, "a change of 6e-4 of parameters near 1, which float32 resolves to 1e-4")}


def name_of(path: str) -> str:
    """A leaf of the parameters -> its tensor in torch."""
    block, first, leaf = path.replace("/params", "").split("/", 2)
    conv = re.fullmatch(r"Conv_(\d)/(\w+)", leaf)
    tensor = f"{CONVOLUTIONS[int(conv[1])]}.{conv[2].replace('kernel', 'weight')}" if conv else f"gamma{leaf[-1]}"
    return f"block{block}.cross_convolution{2 - int(first)}.{tensor}"


def ours(golden: Golden) -> dict[str, Any]:
    method = csflow(backbone="pdn_small", image_size=(20, 24), coupling_blocks=BLOCKS, hidden=3)
    x = tuple(nhwc(3 * normal(f"scale {i}", 3, 5, 8 // 2**i, 8 // 2**i)) for i in range(SCALES))
    stage = method.stages[0]
    start = shapes_of(stage, x)
    params = from_torch(start.model.params, name_of)
    permutations = tuple(
        tuple(jnp.asarray(golden.given[f"permutation {block} {scale}"]) for scale in range(SCALES))
        for block in range(BLOCKS)
    )
    states, losses = follow(stage, start._replace(model=CsflowFlow(params, permutations)), [batch_of(x)] * 3)
    scores = jax.jit(method.score)(states[-1].model, None, x)
    change = jax.tree.map(lambda new, old: np.asarray(new) - old, states[-1].model.params, params)
    return {
        **under("gradient", to_torch(gradient(states[0]), name_of)),
        "loss": np.asarray(losses),
        **under("change in 3 steps", to_torch(change, name_of)),
        "heat map": scores.pixel,
        "score": scores.image,
    }
