"""The focal loss: for pixels of which few are anomalous."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

SMOOTH = 1e-5
"""Smoothing of the labels and inside the logarithm."""


def focal_loss(
    probability: Float[Array, "*b"], anomalous: Bool[Array, "*b"] | Float[Array, "*b"], gamma: float = 2.0
) -> Float[Array, "*b"]:
    """Cross-entropy of anomaly probabilities, with small weights where the label is already predicted.

    Source: Lin et al., Focal loss for dense object detection, ICCV 2017, Eq. 4; smoothed labels as in DRAEM's code.
    """
    label = jnp.clip(anomalous.astype(probability.dtype), SMOOTH, 1 - SMOOTH)
    label_probability = label * probability + (1 - label) * (1 - probability) + SMOOTH
    return -((1 - label_probability) ** gamma) * jnp.log(label_probability)
