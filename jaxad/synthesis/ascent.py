"""Anomalous features: normal features that climb the gradient of a loss and are projected into a shell.

Source: GLASS, ECCV 2024, arXiv:2407.09359, section 3.2.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def project_to_shell(
    x: Float[Array, "*b c"], center: Float[Array, "..."], radius: Float[Array, ""]
) -> Float[Array, "*b c"]:
    """Moves every feature along the line to its center until its distance lies in [radius, 2 * radius]."""
    offset = x - center
    distance = jnp.sqrt(jnp.sum(offset * offset, -1, keepdims=True) + 1e-20)
    return center + offset * jnp.clip(distance, radius, 2 * radius) / distance


def ascend(
    loss: Callable[[Float[Array, "b h w c"]], Float[Array, ""]],
    x: Float[Array, "b h w c"],
    steps: int,
    length: float,
    every: int,
    project: Callable[[Float[Array, "b h w c"]], Float[Array, "b h w c"]],
) -> Float[Array, "b h w c"]:
    """Gradient ascent of features, with a normalized gradient at every position.

    Args:
        loss: A scalar function of all features.
        x: The features to start from.
        steps: Number of steps.
        length: Euclidean length of a step.
        every: Steps from one projection to the next.
        project: Applied to all features after every `every` steps.
    """

    def step(i: Array, x: Array) -> Array:
        gradient = jax.grad(loss)(x)
        x = x + length * gradient / (jnp.linalg.norm(gradient, axis=-1, keepdims=True) + 1e-10)
        return jnp.where((i + 1) % every == 0, project(x), x)

    return jax.lax.fori_loop(0, steps, step, x)
