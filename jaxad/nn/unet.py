"""The building blocks of DRAEM's encoders and decoders."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxad.base import Key
from jaxad.nn.norm import ConvNorm

NORMAL = nn.initializers.normal(0.02)
"""The weights of DRAEM's convolutions."""


def near_one(key: Key, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """The scales of DRAEM's batch norms: normal, of deviation 0.02."""
    return 1 + NORMAL(key, shape, dtype)


class Blocks(nn.Module):
    """A chain of 3x3 convolutions with batch norm and ReLU."""

    features: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w f"]:
        """The map of the last convolution; `train` as in `ConvNorm`."""
        for features in self.features:
            x = nn.relu(ConvNorm(features, 3, kernel_init=NORMAL, scale_init=near_one)(x, train=train))
        return x


def halved(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Half as many rows and columns, by max pooling 2x2."""
    return nn.max_pool(x, (2, 2), (2, 2))  # pyright: ignore[reportArgumentType]


def doubled(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Twice as many rows and columns, by bilinear interpolation."""
    b, h, w, c = x.shape
    return jax.image.resize(x, (b, 2 * h, 2 * w, c), "linear")


def stretched(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Twice as many rows and columns, by bilinear interpolation; corners stay corners (torch's `align_corners`)."""

    def weights(n: int) -> Float[Array, "n2 n"]:
        distance = (n - 1) * jnp.arange(2 * n)[:, None] - (2 * n - 1) * jnp.arange(n)
        return jnp.maximum(0, 1 - jnp.abs(distance) / (2 * n - 1))

    rows, columns = (weights(n) for n in x.shape[1:3])
    return jnp.einsum("Hh,bhwc,Ww->bHWc", rows, x, columns, precision=jax.lax.Precision.HIGHEST)
