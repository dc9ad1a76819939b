"""NF's RealNVP on pixels against the official code, PolinaKirichenko/flows_ood at commit 26a920a.

RealNVP(num_scales=1, mid_channels=4, num_blocks=1, use_batch_norm=False), with glow_utils' ActNorm2d after its iLogits,
FlowLoss, get_param_groups, clip_grad_norm, Adam and bits_per_dim as in train_unsup_ood.py. torch.rand_like gives the
noise that jaxad draws. The bits of the reference are log2(256 / 255) higher, from the scale of its pixels.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxad.base import Method
from jaxad.methods.nf import NfFlow, nf
from tests.parity.golden import Golden, pixels, synthetic
from tests.parity.steps import KEY, batch_of, follow, from_torch, gradient, shapes_of, to_torch, under

BITS = math.log2(256 / 255)
"""What the reference adds to the bits per dimension of pixels."""
CONVOLUTIONS = ("in_conv", "in_skip", "blocks.0.in_conv", "blocks.0.out_conv", "skips.0", "out_conv")
LEAVES = {"direction": "weight_v", "length": "weight_g", "bias": "bias"}
TOLERANCES = {"change in 3 steps": (5e-4, "a change of 3e-4 of parameters near 1, which float32 resolves to 2e-4")}


def name_of(*couplings: int) -> Callable[[str], str | list[str]]:
    """A leaf of the parameters -> its tensors in torch, one for each coupling of a part of so many."""

    def name(path: str) -> str | list[str]:
        first = {"log_scale": "first.logs", "shift": "first.bias"}.get(path)
        if first:
            return first
        _, part, _, leaf = path.split("/", 3)
        conv = re.fullmatch(r"network/WeightNormConv_(\d)/(\w+)", leaf)
        tensor = f"st_net.{CONVOLUTIONS[int(conv[1])]}.conv.{LEAVES[conv[2]]}" if conv else "rescale.weight_g"
        start = sum(couplings[: int(part)])
        return [f"coupling{i}.{tensor}" for i in range(start, start + couplings[int(part)])]

    return name


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """With larger lengths of kernels and bounds."""
    return synthetic(name, shape) * np.float32(3 if name.endswith("weight_g") else 1)


def before(method: Method, x: Any, names: Callable[[str], str | list[str]]) -> Any:
    """The state of the training stage before its first step."""
    measure, stage = method.stages
    start = shapes_of(stage, x, shapes_of(measure, x))
    return start._replace(model=NfFlow(from_torch(start.model.params, names, tensor)))


def trained(method: Method, x: Any, names: Callable[[str], str | list[str]], bits: float) -> dict[str, Any]:
    """The quantities of three steps; the reference has so many bits more."""
    start = before(method, x, names)
    states, losses = follow(method.stages[1], start, [batch_of(x)] * 3)
    change = jax.tree.map(lambda new, old: np.asarray(new) - old, states[-1].model.params, start.model.params)
    return {
        **under("gradient", to_torch(gradient(states[0]), names)),
        "loss": np.asarray(losses) + bits,
        **under("change in 3 steps", to_torch(change, names)),
        "score": np.asarray(jax.jit(method.score)(states[-1].model, None, x).image) + bits,
    }


def ours(golden: Golden) -> dict[str, Any]:
    del golden
    method = nf(on="pixels", scales=1, couplings=4, hidden=4, blocks=1)
    x = jnp.asarray(pixels("images", 3, 8, 8, 3))
    noise = jax.random.uniform(KEY, x.shape)
    return trained(method, x, name_of(4), BITS) | {"noise": noise}
