"""The building block of several published flows."""

import math
from typing import NamedTuple

import distrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxad.base import PyTree
from jaxad.bijectors.coupling import Conditioner, coupling
from jaxad.bijectors.linear import ActNorm

GAIN = 0.1
"""Factor of the output of a block's network, so that a flow starts near the identity."""


class BlockParams(NamedTuple):
    """The parameters of a block."""

    subnet: PyTree
    scale: Float[Array, "*n c"]
    shift: Float[Array, "*n c"]


def block_params(subnet: PyTree, channels: int) -> BlockParams:
    """The parameters of a block with scale 1 and shift 0."""
    return BlockParams(subnet, jnp.full(channels, 2 * math.log(math.expm1(5)), jnp.float32), jnp.zeros(channels))


def affine_block(
    params: BlockParams, conditioner: Conditioner, permutation: distrax.Bijector, *, clamp: float, event_ndims: int
) -> distrax.Bijector:
    """A coupling of the second half of the channels, then a scale and shift per channel, then a permutation.

    Source: FrEIA's AllInOneBlock with its default softplus scales (based on Glow, arXiv:1807.03039).

    Args:
        params: Of one block.
        conditioner: (the first half) -> log scales and shifts of the second half, concatenated.
        permutation: A permutation or rotation of the channels.
        clamp: Bound of the log scales (tanh).
        event_ndims: 1 for vectors, 3 for images (h w c).
    """
    channels = params.scale.shape[-1]
    log_scale = jnp.log(2 * GAIN * jax.nn.softplus(params.scale / 2))
    damped = lambda x: GAIN * conditioner(x)  # noqa: E731
    affine = coupling(damped, channels, clamp=clamp, kind="tanh", event_ndims=event_ndims)
    return distrax.Chain([permutation, ActNorm(log_scale, params.shift, event_ndims), affine])
