"""Networks that see one patch feature at a time."""

import jax
from flax import linen as nn
from jaxtyping import Array, Float


class Discriminator(nn.Module):
    """One hidden layer with batch norm, and a logit; the loss decides whether it means anomalous or normal."""

    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w"]:
        """The logit of every patch; `train` as in `jaxad.nn.ConvNorm`."""
        xavier = nn.initializers.xavier_normal()
        y = nn.Dense(self.hidden, use_bias=False, kernel_init=xavier, name="hidden")(x)
        y = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, name="norm")(y)
        y = jax.nn.leaky_relu(y, 0.2)
        return nn.Dense(1, use_bias=False, kernel_init=xavier, name="head")(y)[..., 0]
