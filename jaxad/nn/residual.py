"""Residual blocks that can halve or double the resolution."""

from flax import linen as nn
from jaxtyping import Array, Float

from jaxad.nn.norm import ConvNorm


class Residual(nn.Module):
    """A residual block of a ResNet; with `scale` "down" or "up" it halves or doubles rows and columns."""

    features: int
    inner: int
    """Channels inside a bottleneck block. Equal to `features`, it makes a basic block."""
    scale: str = "same"
    up_kernel: int | None = 2
    """Kernel of the transposed convolutions; None: as large as the convolutions that they replace."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h2 w2 f"]:
        """The map of the block; `train` as in `ConvNorm`."""

        def conv(x: Array, features: int, kernel: int) -> Array:
            return ConvNorm(features, kernel)(x, train=train)

        def resize(x: Array, features: int, kernel: int) -> Array:
            if self.scale == "up":
                return ConvNorm(features, self.up_kernel or kernel, up=True)(x, train=train)
            return ConvNorm(features, kernel, 2 if self.scale == "down" else 1)(x, train=train)

        if self.inner == self.features:
            y = conv(nn.relu(resize(x, self.features, 3)), self.features, 3)
        else:
            y = nn.relu(conv(x, self.inner, 1))
            y = conv(nn.relu(resize(y, self.inner, 3)), self.features, 1)
        return nn.relu(y + (x if self.scale == "same" else resize(x, self.features, 1)))
