"""Convolutions with batch norm."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

HE = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""The weights of torchvision's ResNets."""
TRANSPOSED = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")
"""The weights of torch's transposed convolutions."""
EPSILON = 1e-5
"""Added to the variance in batch norm."""


class Convolution(nn.Module):
    """A convolution without a bias, padded by half of its kernel, rounded down.

    An even kernel therefore gives one row and column more than an odd one: h / stride + 1 where the stride divides h.
    With `up` it is a transposed convolution. An even kernel multiplies rows and columns by its size; an odd one doubles
    them (torch's with stride 2 and an output padding of 1). Even kernels and single pixels become matrix products, and
    other odd kernels one plain convolution for each of the four output pixels of an input pixel: XLA's transposed
    convolutions are slow on a CPU.
    """

    features: int
    kernel: int
    stride: int = 1
    up: bool = False
    kernel_init: nn.initializers.Initializer | None = None
    """By default a ResNet's, and torch's of a transposed convolution."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
        """The convolved map."""
        (b, h, w, c), k, stride = x.shape, self.kernel, self.stride
        init = self.kernel_init or (TRANSPOSED if self.up else HE)
        kernel = self.param("kernel", init, (k, k, c, self.features))
        layout = ("NHWC", "HWIO", "NHWC")
        if self.up and k == 1:
            zeros_between = ((0, 0, 0), (0, 1, 1), (0, 1, 1), (0, 0, 0))
            return jax.lax.pad(x @ kernel[0, 0], jnp.zeros((), x.dtype), zeros_between)
        if self.up and k % 2:
            n, before = (k + 1) // 2, (k // 2 + 1) % 2
            even = jnp.pad(kernel, ((before, 1 - before),) * 2 + ((0, 0),) * 2)
            split = even.reshape(n, 2, n, 2, c, -1)[:, ::-1, :, ::-1]
            kernels = split.transpose(0, 2, 4, 1, 3, 5).reshape(n, n, c, -1)
            pads = ((k // 4, n // 2),) * 2
            y = jax.lax.conv_general_dilated(x, kernels, (1, 1), pads, dimension_numbers=layout)
            return y.reshape(b, h, w, 2, 2, -1).swapaxes(2, 3).reshape(b, 2 * h, 2 * w, -1)
        if self.up:
            return jnp.einsum("bhwc,ijcf->bhiwjf", x, kernel).reshape(b, h * k, w * k, self.features)
        if k == 1:
            return x[:, ::stride, ::stride] @ kernel[0, 0]
        pads = ((k // 2, k // 2),) * 2
        return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, pads, dimension_numbers=layout)


class ConvNorm(nn.Module):
    """A `Convolution` followed by batch norm."""

    features: int
    kernel: int
    stride: int = 1
    up: bool = False
    kernel_init: nn.initializers.Initializer | None = None
    scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h2 w2 f"]:
        """The normalized map.

        With `train` it is normalized by the statistics of the batch, and the collection `batch_stats` must be mutable;
        otherwise by the running statistics.
        """
        y = Convolution(self.features, self.kernel, self.stride, self.up, self.kernel_init, name="conv")(x)
        return nn.BatchNorm(not train, momentum=0.9, epsilon=EPSILON, scale_init=self.scale_init, name="norm")(y)


def without_norm(variables: Mapping[str, Any]) -> dict[str, dict[str, Array]]:
    """Folds batch norm, with its running statistics, into the convolutions of a network of `ConvNorm`s.

    Args:
        variables: The network's collections `params` and `batch_stats`.

    Returns:
        For every `ConvNorm` of the network the `kernel` and `bias` of a convolution that does the same.
    """

    def fold(params: Mapping[str, Any], stats: Mapping[str, Any]) -> dict[str, Array]:
        scale = params["norm"]["scale"] * jax.lax.rsqrt(stats["norm"]["var"] + EPSILON)
        return {
            "kernel": params["conv"]["kernel"] * scale,
            "bias": params["norm"]["bias"] - stats["norm"]["mean"] * scale,
        }

    return {name: fold(params, variables["batch_stats"][name]) for name, params in variables["params"].items()}
