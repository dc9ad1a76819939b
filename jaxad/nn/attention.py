"""Attention along the axes of an image.

Paper: Coordinate Attention for Efficient Mobile Network Design, CVPR 2021, arXiv:2103.02907.
Reference: https://github.com/houqb/CoordAttention
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from jaxad.nn.norm import ConvNorm


class CoordinateAttention(nn.Module):
    """Weighs every position and channel by two numbers, one of its row and one of its column (Eq. 4 to 9)."""

    reduction: int = 32
    """Channels over those between, which are 8 at least."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], valid: Bool[Array, "b"] | None) -> Float[Array, "b h w c"]:
        """The weighed map."""
        h, c = x.shape[1], x.shape[-1]
        lines = jnp.concatenate([x.mean(2), x.mean(1)], 1)[:, :, None]
        mixed = ConvNorm(max(8, c // self.reduction), 1)(lines, valid=valid)
        mixed = jax.nn.hard_swish(mixed)[:, :, 0]
        rows, columns = (
            jax.nn.sigmoid(nn.Dense(c, name=name)(part))
            for name, part in (("rows", mixed[:, :h]), ("columns", mixed[:, h:]))
        )
        return x * rows[:, :, None] * columns[:, None]
