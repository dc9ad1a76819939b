"""The encoder and decoder of DRAEM's networks."""

import jax
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from jaxad.nn.norm import ConvNorm


class Blocks(nn.Module):
    """3x3 convolutions with batch norm, one after another."""

    features: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], valid: Bool[Array, "b"] | None) -> Float[Array, "b h w f"]:
        """The last one's map."""
        for features in self.features:
            x = nn.relu(ConvNorm(features, 3)(x, valid=valid))
        return x


def halved(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """The largest of every 2 x 2 positions."""
    return nn.max_pool(x, (2, 2), (2, 2))  # pyright: ignore[reportArgumentType]


def doubled(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Twice as many rows and columns, by bilinear interpolation."""
    b, h, w, c = x.shape
    return jax.image.resize(x, (b, 2 * h, 2 * w, c), "linear")
