"""Coordinate attention: attention along the two axes of an image.

Paper: Coordinate Attention for Efficient Mobile Network Design, CVPR 2021, arXiv:2103.02907.
Reference: https://github.com/houqb/CoordAttention
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxad.nn.initial import torch_bias, torch_uniform
from jaxad.nn.norm import ConvNorm


class CoordinateAttention(nn.Module):
    """Multiplies every position and channel by two weights, one of its row and one of its column (Eq. 4 to 9)."""

    reduction: int = 32
    """The hidden layer has this many times fewer channels, but at least 8."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
        """The weighted map; `train` as in `ConvNorm`."""
        h, c = x.shape[1], x.shape[-1]
        lines = jnp.concatenate([x.mean(2), x.mean(1)], 1)[:, :, None]
        n = max(8, c // self.reduction)
        hidden = ConvNorm(n, 1, kernel_init=torch_uniform)(lines, train=train)
        hidden = jax.nn.hard_swish(hidden)[:, :, 0]
        rows, columns = (
            jax.nn.sigmoid(nn.Dense(c, kernel_init=torch_uniform, bias_init=torch_bias(n), name=name)(part))
            for name, part in (("rows", hidden[:, :h]), ("columns", hidden[:, h:]))
        )
        return x * rows[:, :, None] * columns[:, None]
