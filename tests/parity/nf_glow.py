"""NF's Glow against the official code, PolinaKirichenko/flows_ood at commit 26a920a.

Glow(num_scales=1, num_coupling_layers_per_scale=2, mid_channels=4, num_layers=1, st_type="resnet"), of networks without
batch norm and 1x1 convolutions that are products of jaxad's triangular factors and permutations. All parameters decay;
otherwise as for RealNVP, with Adam.
"""

import re
from typing import Any

import jax.numpy as jnp

from jaxad.methods.nf import nf
from tests.parity.golden import Golden, pixels
from tests.parity.nf import BITS, TOLERANCES, trained
from tests.parity.nf import name_of as name_in_coupling

__all__ = ["TOLERANCES"]
STEPS = 2
LEAVES = {"log_scale": "norm{}.logs", "shift": "norm{}.bias"}


def name_of(path: str) -> str | list[str]:
    """A leaf of the parameters -> its tensors in torch, one for each step of the flow."""
    if not path.startswith("flow/0/"):
        return name_in_coupling(STEPS)(path)
    leaf = path.removeprefix("flow/0/")
    if leaf.startswith("network/"):
        return name_in_coupling(STEPS)(f"flow/0/{leaf.removeprefix('network/')}")
    name = LEAVES.get(leaf, re.sub("conv1x1/", "lu{}.", leaf))
    return [name.format(i) for i in range(STEPS)]


def ours(golden: Golden) -> dict[str, Any]:
    del golden
    method = nf(on="pixels", flow="glow", scales=1, couplings=STEPS, hidden=4, blocks=1)
    return trained(method, jnp.asarray(pixels("images", 3, 8, 8, 3)), name_of, BITS)
