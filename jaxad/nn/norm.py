"""Convolutions with batch norm, which counts no padding."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

HE = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""How torchvision draws the weights of a ResNet."""
TRANSPOSED = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")
"""How torch draws those of a transposed convolution."""
EPSILON = 1e-5
"""Of batch norm."""


class Convolution(nn.Module):
    """A convolution without a bias.

    With `up` a transposed one, which multiplies rows and columns by the size of an even kernel, and doubles them if
    the kernel is odd (torch's of stride 2 whose output is padded by 1). Even ones and those of a single pixel are
    matrix products, other odd ones a plain convolution for each of the four pixels that one becomes, since XLA is slow
    at transposed ones on a CPU.
    """

    features: int
    kernel: int
    stride: int = 1
    up: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
        """The convolved map."""
        (b, h, w, c), k, stride = x.shape, self.kernel, self.stride
        kernel = self.param("kernel", TRANSPOSED if self.up else HE, (k, k, c, self.features))
        layout = ("NHWC", "HWIO", "NHWC")
        if self.up and k == 1:
            between = ((0, 0, 0), (0, 1, 1), (0, 1, 1), (0, 0, 0))
            return jax.lax.pad(x @ kernel[0, 0], jnp.zeros((), x.dtype), between)
        if self.up and k % 2:
            n, before = (k + 1) // 2, (k // 2 + 1) % 2
            even = jnp.pad(kernel, ((before, 1 - before),) * 2 + ((0, 0),) * 2)
            split = even.reshape(n, 2, n, 2, c, -1)[:, ::-1, :, ::-1]
            of_pixel = split.transpose(0, 2, 4, 1, 3, 5).reshape(n, n, c, -1)
            pads = ((k // 4, n // 2),) * 2
            y = jax.lax.conv_general_dilated(x, of_pixel, (1, 1), pads, dimension_numbers=layout)
            return y.reshape(b, h, w, 2, 2, -1).swapaxes(2, 3).reshape(b, 2 * h, 2 * w, -1)
        if self.up:
            return jnp.einsum("bhwc,ijcf->bhiwjf", x, kernel).reshape(b, h * k, w * k, self.features)
        if k == 1:
            return x[:, ::stride, ::stride] @ kernel[0, 0]
        pads = ((k // 2, k // 2),) * 2
        return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, pads, dimension_numbers=layout)


class ConvNorm(nn.Module):
    """A `Convolution` and the batch norm behind it."""

    features: int
    kernel: int
    stride: int = 1
    up: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, valid: Bool[Array, "b"] | None) -> Float[Array, "b h2 w2 f"]:
        """The map, normalized by the statistics of the valid images (of all where none is); None: the running ones."""
        convolve = Convolution(self.features, self.kernel, self.stride, self.up, name="conv")
        norm = nn.BatchNorm(valid is None, momentum=0.9, epsilon=EPSILON, name="norm")
        mask = None if valid is None else (valid | ~valid.any())[:, None, None, None]
        return norm(convolve(x), mask=mask)


def without_norm(variables: Mapping[str, Any]) -> dict[str, dict[str, Array]]:
    """The kernels and biases that do what a network's `ConvNorm`s do by their running statistics, by module."""

    def folded(params: Mapping[str, Any], running: Mapping[str, Any]) -> dict[str, Array]:
        scale = params["norm"]["scale"] * jax.lax.rsqrt(running["norm"]["var"] + EPSILON)
        return {
            "kernel": params["conv"]["kernel"] * scale,
            "bias": params["norm"]["bias"] - running["norm"]["mean"] * scale,
        }

    return {name: folded(params, variables["batch_stats"][name]) for name, params in variables["params"].items()}
