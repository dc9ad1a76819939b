"""Networks that look at one patch feature at a time."""

import jax
from flax import linen as nn
from jaxtyping import Array, Bool, Float


class Discriminator(nn.Module):
    """One hidden layer with batch norm, and the logit of being anomalous or normal, as its loss has it."""

    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, valid: Bool[Array, "b"] | None) -> Float[Array, "b h w"]:
        """A number for every patch, by the statistics of the valid images; None: by the running ones."""
        draw = nn.initializers.xavier_normal()
        y = nn.Dense(self.hidden, use_bias=False, kernel_init=draw, name="hidden")(x)
        mask = None if valid is None else (valid | ~valid.any())[:, None, None, None]
        y = nn.BatchNorm(valid is None, momentum=0.9, epsilon=1e-5, name="norm")(y, mask=mask)
        y = jax.nn.leaky_relu(y, 0.2)
        return nn.Dense(1, use_bias=False, kernel_init=draw, name="head")(y)[..., 0]
