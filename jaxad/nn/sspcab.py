"""The self-supervised predictive convolutional attentive block.

Paper: Self-Supervised Predictive Convolutional Attentive Block for Anomaly Detection, CVPR 2022, arXiv:2111.09099.
Reference: https://github.com/ristea/sspcab
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxad.nn.initial import torch_bias, torch_uniform


class Sspcab(nn.Module):
    """Predicts every position from four patches around it, then weights the channels by squeeze and excitation.

    The patches lie in the corners of the neighborhood, `dilation` away from the position, which is masked. The mean
    squared difference between input and prediction belongs to the loss.
    """

    kernel: int = 1
    """Height and width of a patch."""
    dilation: int = 1
    reduction: int = 8
    """The squeezed layer has this many times fewer channels."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The prediction."""
        c, k = x.shape[-1], self.kernel
        border, distance = k + self.dilation, k + 2 * self.dilation + 1
        padded = jnp.pad(x, ((0, 0), (border, border), (border, border), (0, 0)))
        first, last = slice(None, -distance), slice(distance, None)
        prediction = jnp.zeros(())
        for i, (rows, columns) in enumerate(((first, first), (last, first), (first, last), (last, last))):
            init: Any = dict(kernel_init=torch_uniform, bias_init=torch_bias(k * k * c))
            corner = nn.Conv(c, (k, k), padding="VALID", name=f"corner{i}", **init)
            prediction = prediction + corner(padded[:, rows, columns])
        prediction = nn.relu(prediction)
        weight = prediction.mean((1, 2))
        for name, features, act in (("squeeze", max(1, c // self.reduction), nn.relu), ("excite", c, jax.nn.sigmoid)):
            init: Any = dict(kernel_init=torch_uniform, bias_init=torch_bias(weight.shape[-1]))
            weight = act(nn.Dense(features, name=name, **init)(weight))
        return prediction * weight[:, None, None, :]
