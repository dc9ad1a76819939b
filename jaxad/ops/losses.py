"""The focal loss, of pixels of which few are anomalous."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

SMOOTH = 1e-5
"""Of the labels and the logarithm."""


def focal_loss(
    probability: Float[Array, "*b"], anomalous: Bool[Array, "*b"] | Float[Array, "*b"], gamma: float = 2.0
) -> Float[Array, "*b"]:
    """Cross-entropy that counts the less the better the label is met, of the probability of being anomalous.

    Source: Lin et al., Focal loss for dense object detection, ICCV 2017, Eq. 4; labels are smoothed as in DRAEM's code.
    """
    label = jnp.clip(anomalous.astype(probability.dtype), SMOOTH, 1 - SMOOTH)
    met = label * probability + (1 - label) * (1 - probability) + SMOOTH
    return -((1 - met) ** gamma) * jnp.log(met)
