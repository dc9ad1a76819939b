"""Bijectors of normalizing flows, built on distrax.

A bijector takes its parameters as arrays, or as functions of them, so that a flow is a pure function of its parameters:
`flow(params)` is a `distrax.Bijector`, and `distrax.Transformed(base, distrax.Inverse(flow(params)))` is its density.
"""

from jaxad.bijectors.blocks import BlockParams, affine_block, block_params
from jaxad.bijectors.coupling import (
    CrossScaleCoupling,
    GlowNetworks,
    clamped_affine,
    coupling,
    glow_coupling,
    half_coupling,
    masked_coupling,
    soft_clamp,
)
from jaxad.bijectors.image import MultiScale, Squeeze, checkerboard_mask, half_mask, quadrant_mask
from jaxad.bijectors.linear import (
    ActNorm,
    Invertible1x1,
    LuFactors,
    Permutation,
    act_norm_init,
    init_in_order,
    lu_identity,
    lu_matrix,
    random_orthogonal,
)
from jaxad.bijectors.scan import Scan, scan_init

__all__ = [
    "ActNorm",
    "BlockParams",
    "CrossScaleCoupling",
    "GlowNetworks",
    "Invertible1x1",
    "LuFactors",
    "MultiScale",
    "Permutation",
    "Scan",
    "Squeeze",
    "act_norm_init",
    "affine_block",
    "block_params",
    "checkerboard_mask",
    "clamped_affine",
    "coupling",
    "glow_coupling",
    "half_coupling",
    "half_mask",
    "init_in_order",
    "lu_identity",
    "lu_matrix",
    "masked_coupling",
    "quadrant_mask",
    "random_orthogonal",
    "scan_init",
    "soft_clamp",
]
