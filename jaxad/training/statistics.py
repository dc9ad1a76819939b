"""Precise batch norm: the running statistics are computed anew, over all training images, when training has ended.

Source: Wu and Johnson, Rethinking "Batch" in BatchNorm, 2021, arXiv:2105.07576, section 3.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxad.base import Batch, Frozen, Key, Metrics, PyTree, Stage, State
from jaxad.training.gradient import LossFn, Model, PartsFn

STATISTICS = "statistics"
"""The name of the stage."""
PROBE = 2.0**20
"""Far larger than statistics are."""


class Moments(NamedTuple):
    """The model, and the moments that its batch norms have seen."""

    model: Model
    total: PyTree
    """First and second moments, of the structure of the statistics, summed over batches."""
    count: Float[Array, ""]
    """Batches."""


def statistics_stage(loss: LossFn, *, batch_size: int, parts: PartsFn | None = None) -> Stage:
    """A stage that follows a gradient stage whose loss changes a field `stats`, flax's collection `batch_stats`.

    In one more pass over the training images, the parameters stay as they are. What the stage leaves is the model with
    the mean and the variance that every batch norm has seen, in place of the running averages of the last few batches.

    Args:
        loss: Of the gradient stage.
        batch_size: Images at a time; batch norms that see what others have normalized depend on it.
        parts: Of the loss, as in `Descent`.
    """

    def init(key: Key, model: State, frozen: Frozen, spec: PyTree) -> Moments:
        del key, frozen, spec
        return Moments(model, jax.tree.map(jnp.zeros_like, model.stats), jnp.zeros(()))

    def update(key: Key, state: Moments, frozen: Frozen, batch: Batch) -> tuple[Moments, Metrics]:
        def moments(key: Key, part: PyTree) -> PyTree:
            return _raw(_of_batch(loss, state.model, key, frozen, part), 1)

        if parts is None:
            seen = moments(key, batch)
        else:
            several = parts(key, state.model, frozen, batch)
            keys = jax.random.split(key, len(jax.tree.leaves(several)[0]))
            seen = jax.tree.map(lambda leaf: leaf.mean(0), jax.lax.map(lambda one: moments(*one), (keys, several)))
        return Moments(state.model, jax.tree.map(jnp.add, state.total, seen), state.count + 1), {}

    def finalize(key: Key, state: Moments, frozen: Frozen) -> State:
        del key, frozen
        return state.model._replace(stats=_raw(jax.tree.map(lambda leaf: leaf / state.count, state.total), -1))

    return Stage(STATISTICS, init, update, finalize, batch_size=batch_size, shuffle=True)


def _of_batch(loss: LossFn, model: Model, key: Key, frozen: Frozen, batch: PyTree) -> PyTree:
    """The statistics that the running ones settle at if the same batch comes again and again.

    What a loss leaves of statistics s is a s + b, whatever the momentum and however often it calls a network.
    """

    def after(value: float) -> PyTree:
        stats = jax.tree.map(lambda leaf: jnp.full_like(leaf, value), model.stats)
        return loss(model.params, model._replace(stats=stats), key, frozen, batch)[1]["stats"]

    return jax.tree.map(lambda b, probed: b / (1 - (probed - b) / PROBE), after(0.0), after(PROBE))


def _raw(stats: PyTree, sign: int) -> PyTree:
    """Variances to second moments, or back with a sign of -1."""
    if "var" in stats:
        return {"mean": stats["mean"], "var": stats["var"] + sign * stats["mean"] ** 2}
    return {name: _raw(part, sign) for name, part in stats.items()}
