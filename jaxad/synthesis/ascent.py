"""Anomalous features: normal features that climb the gradient of a loss and are projected into a shell.

Source: GLASS, ECCV 2024, arXiv:2407.09359, section 3.2.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxad.base import PyTree


def project_to_shell(
    x: Float[Array, "*b c"], center: Float[Array, "..."], radius: Float[Array, ""]
) -> Float[Array, "*b c"]:
    """Moves every feature along the line to its center until its distance lies in [radius, 2 * radius]."""
    offset = x - center
    distance = jnp.sqrt(jnp.sum(offset * offset, -1, keepdims=True) + 1e-20)
    return center + offset * jnp.clip(distance, radius, 2 * radius) / distance


def ascend(
    loss: Callable[[Float[Array, "b h w c"], PyTree], tuple[Float[Array, ""], PyTree]],
    x: Float[Array, "b h w c"],
    carried: PyTree,
    steps: int,
    length: float,
    every: int,
    project: Callable[[Float[Array, "b h w c"]], Float[Array, "b h w c"]],
) -> tuple[Float[Array, "b h w c"], PyTree]:
    """Gradient ascent of features, with a normalized gradient at every position.

    The result has a gradient with respect to the features to start from, to which the steps are constants.

    Args:
        loss: (features, carried) -> a scalar, and what the next step is given.
        x: The features to start from.
        carried: What the first step is given: statistics of batch norms.
        steps: Number of steps.
        length: Euclidean length of a step.
        every: Steps from one projection to the next.
        project: Applied to all features after every `every` steps.

    Returns:
        The features, and what the last step has left.
    """

    def step(_: Array, state: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
        x, carried = state
        gradient, carried = jax.grad(loss, has_aux=True)(x, carried)
        return x + length * gradient / (jnp.linalg.norm(gradient, axis=-1, keepdims=True) + 1e-10), carried

    def climb(x: Array, carried: PyTree, count: int) -> tuple[Array, PyTree]:
        start = jax.lax.stop_gradient(x)
        moved, carried = jax.lax.fori_loop(0, count, step, jax.lax.stop_gradient((start, carried)))
        return x + jax.lax.stop_gradient(moved - start), jax.lax.stop_gradient(carried)

    def round_(state: tuple[Array, PyTree], _: None) -> tuple[tuple[Array, PyTree], None]:
        x, carried = climb(*state, every)
        return (project(x), carried), None

    (x, carried), _ = jax.lax.scan(round_, (x, carried), length=steps // every)
    return climb(x, carried, steps % every)
