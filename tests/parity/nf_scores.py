"""Scores of NF's other RealNVPs against the official code, PolinaKirichenko/flows_ood at commit 26a920a.

The first four couplings of RealNVPCycleMask, RealNVPMaskHorizontal3Layers, and RealNVP(num_scales=2), all with
mid_channels=4, num_blocks=1, use_batch_norm=False and glow_utils' ActNorm2d after iLogits; otherwise as for one scale.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxad.methods.nf import nf
from tests.parity.golden import Golden, pixels
from tests.parity.nf import BITS, before, name_of

FLOWS = {
    "cycle": (6, (4,), dict(mask="cycle", scales=1, couplings=4)),
    "horizontal": (6, (3,), dict(mask="horizontal", scales=1, couplings=3)),
    "two scales": (8, (3, 3, 4), dict(scales=2, couplings=4)),
}
"""Name -> the size of images, the couplings of every part, the hyperparameters."""


def ours(golden: Golden) -> dict[str, Any]:
    del golden
    scores = {}
    for name, (size, couplings, options) in FLOWS.items():
        method, x = nf(on="pixels", hidden=4, blocks=1, **options), jnp.asarray(pixels("images", 3, size, size, 3))
        flow = before(method, x, name_of(*couplings)).model
        scores[f"score/{name}"] = np.asarray(jax.jit(method.score)(flow, None, x).image) + BITS
    return scores
