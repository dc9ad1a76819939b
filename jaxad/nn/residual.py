"""Residual blocks that also double the grid."""

from flax import linen as nn
from jaxtyping import Array, Bool, Float

from jaxad.nn.norm import ConvNorm


class Residual(nn.Module):
    """A block of a ResNet; with `scale` "down" or "up" it halves the grid or doubles it."""

    features: int
    inner: int
    """Channels within a bottleneck block; those of `features` make a basic block."""
    scale: str = "same"
    up_kernel: int | None = 2
    """Of the convolutions that double the grid; None: as large as the others at their places."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], valid: Bool[Array, "b"] | None) -> Float[Array, "b h2 w2 f"]:
        """The block's map."""

        def conv(x: Array, features: int, kernel: int) -> Array:
            return ConvNorm(features, kernel)(x, valid=valid)

        def resized(x: Array, features: int, kernel: int) -> Array:
            if self.scale == "up":
                return ConvNorm(features, self.up_kernel or kernel, up=True)(x, valid=valid)
            return ConvNorm(features, kernel, 2 if self.scale == "down" else 1)(x, valid=valid)

        if self.inner == self.features:
            y = conv(nn.relu(resized(x, self.features, 3)), self.features, 3)
        else:
            y = nn.relu(conv(x, self.inner, 1))
            y = conv(nn.relu(resized(y, self.inner, 3)), self.features, 1)
        return nn.relu(y + (x if self.scale == "same" else resized(x, self.features, 1)))
