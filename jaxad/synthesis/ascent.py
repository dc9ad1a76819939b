"""Features made anomalous: they climb the gradient of a loss, and are projected into a shell.

Source: GLASS, ECCV 2024, arXiv:2407.09359, section 3.2.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def into_shell(x: Float[Array, "*b c"], center: Float[Array, "..."], radius: Float[Array, ""]) -> Float[Array, "*b c"]:
    """Features moved along the line to their centers until they are `radius` to twice that away ."""
    apart = x - center
    distance = jnp.sqrt(jnp.sum(apart * apart, -1, keepdims=True) + 1e-20)
    return center + apart * jnp.clip(distance, radius, 2 * radius) / distance


def ascend(
    loss: Callable[[Float[Array, "b h w c"]], Float[Array, ""]],
    x: Float[Array, "b h w c"],
    steps: int,
    length: float,
    every: int,
    project: Callable[[Float[Array, "b h w c"]], Float[Array, "b h w c"]],
) -> Float[Array, "b h w c"]:
    """Steps of every feature up the gradient of the loss, each of that length, and a projection after some.

    Args:
        loss: Of all features.
        x: Where they begin.
        steps: Number of steps.
        length: Of a step.
        every: Steps from one projection to the next.
        project: What they are moved by.
    """

    def step(i: Array, x: Array) -> Array:
        gradient = jax.grad(loss)(x)
        x = x + length * gradient / (jnp.linalg.norm(gradient, axis=-1, keepdims=True) + 1e-10)
        return jnp.where((i + 1) % every == 0, project(x), x)

    return jax.lax.fori_loop(0, steps, step, x)
