"""Convolutions with weight normalization."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxad.nn.initial import torch_bias, torch_uniform


class WeightNormConv(nn.Module):
    """A convolution whose kernels have a direction and a length, as in `torch.nn.utils.weight_norm`.

    Source: Salimans, Kingma, arXiv:1602.07868.
    """

    out: int
    kernel: int = 3
    dilation: int = 1
    bias: bool = True
    zero: bool = False
    """Start at zero, not as torch's convolutions do."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        """Of the same height and width."""
        shape = self.kernel, self.kernel, x.shape[-1], self.out
        direction = self.param("direction", torch_uniform, shape)
        norm = jnp.sqrt(jnp.sum(direction**2, (0, 1, 2)))
        length = self.param("length", lambda key: jnp.zeros_like(norm) if self.zero else norm)
        x = jax.lax.conv_general_dilated(
            x,
            direction * (length / norm),
            (1, 1),
            "SAME",
            rhs_dilation=(self.dilation, self.dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        if not self.bias:
            return x
        return x + self.param(
            "bias", nn.initializers.zeros if self.zero else torch_bias(math.prod(shape[:3])), shape[3:]
        )
