"""NF on embeddings against the official code, PolinaKirichenko/flows_ood at commit 26a920a.

RealNVPTabular(in_dim=5, num_coupling_layers=3, hidden_dim=4, num_layers=2) after an ActNorm1d, with FlowLoss,
clip_grad_norm, Adam and bits_per_dim as in train_unsup_ood.py, whose loss has 8 bits for the levels of pixels, too.
"""

import re
from typing import Any

import jax.numpy as jnp

from jaxad.methods.nf import nf
from tests.parity.golden import Golden, normal
from tests.parity.nf import TOLERANCES, trained

__all__ = ["TOLERANCES"]
COUPLINGS, LAYERS = 3, (0, 3, 5, 7)


def name_of(path: str) -> str | list[str]:
    """A leaf of the parameters -> its tensors in torch, one for each coupling."""
    first = {"log_scale": "first.weight", "shift": "first.bias"}.get(path)
    if first:
        return first
    dense = re.fullmatch(r"flow/0/params/network/Dense_(\d)/(\w+)", path)
    name = f"st_net.{LAYERS[int(dense[1])]}.{dense[2].replace('kernel', 'weight')}" if dense else "rescale.weight_g"
    return [f"coupling{i}.{name}" for i in range(COUPLINGS)]


def ours(golden: Golden) -> dict[str, Any]:
    del golden
    method = nf(backbone="pdn_small", layers=("layer1",), couplings=COUPLINGS, hidden=4, blocks=2)
    return trained(method, {"layer1": jnp.asarray(2 * normal("embeddings", 3, 5))}, name_of, 8.0)
