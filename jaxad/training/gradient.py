"""Gradient stages: all the boilerplate of training, once.

A method writes its networks, its loss and its score; `gradient_stage` keeps the state of the optimizer, replaces what
changes without a gradient (the statistics of batch norms, centers, queues), follows the schedule and reports the loss.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxad.base import Batch, Frozen, Key, Metrics, PyTree, Stage, State

Model = Any
"""A NamedTuple of arrays with a field `params`, which the optimizer changes; the loss may replace the other fields."""
LossFn = Callable[[PyTree, Model, Key, Frozen, Any], tuple[Float[Array, ""], dict[str, PyTree]]]
"""(params, model, key, frozen, batch) -> (value, changes). `model` has the parameters before the step, too. `changes`
holds new values of other fields of the model by name; an entry `metrics` is added to the diagnostics."""
PartsFn = Callable[[Key, Model, Frozen, Batch], PyTree]
"""(key, model, frozen, batch) -> parts of the batch, stacked along a leading axis."""
Schedule = Callable[[Float[Array, ""]], Float[Array, ""]]
"""Share of the steps that are done -> what the optimizer's steps are multiplied by."""


class Training(NamedTuple):
    """The state of a gradient stage."""

    model: Model
    optimizer: PyTree
    """The state of the optimizer; of several, a tuple."""


class Descent(NamedTuple):
    """One of several losses that are descended in turn within an update."""

    loss: LossFn
    optimizer: optax.GradientTransformation
    params: str | None = None
    """The entry of `model.params` that it changes, which the loss is then given alone; None: all of them."""
    parts: PartsFn | None = None
    """The loss is given one part in place of the batch, and takes a step for each. None: one step for the whole
    batch."""


def constant(progress: Float[Array, ""]) -> Float[Array, ""]:
    """The schedule of a rate that stays as it is."""
    return jnp.ones_like(progress)


def cosine(progress: Float[Array, ""], least: float = 0.0) -> Float[Array, ""]:
    """The schedule of a rate that falls to a share of itself as a cosine does."""
    return least + (1 - least) * 0.5 * (1 + jnp.cos(jnp.pi * progress))


def shuffled_parts(key: Key, rows: PyTree, size: int) -> PyTree:
    """Rows in a random order, in parts of so many: leaves n ... become s size ..., for `Descent.parts`.

    Rows that fill no part are left out; fewer rows than `size` are one part.
    """
    n = jax.tree.leaves(rows)[0].shape[0]
    size = min(size, n)
    order = jax.random.permutation(key, n)[: n // size * size].reshape(-1, size)
    return jax.tree.map(lambda leaf: leaf[order], rows)


def gradient_stage(
    name: str,
    init: Callable[[Key, State, Frozen, PyTree], Model],
    loss: LossFn | Sequence[Descent],
    optimizer: optax.GradientTransformation | None = None,
    *,
    epochs: int,
    batch_size: int,
    schedule: Schedule = constant,
    after_step: Callable[[Key, Model, Frozen, Batch], Model] | None = None,
    finish: Callable[[Key, Model, Frozen], State] | None = None,
    rows: Callable[[int], np.ndarray] = np.arange,
) -> Stage:
    """A stage that trains a model by gradient descent, in shuffled full batches.

    Args:
        name: Of the stage.
        init: (key, state, frozen, spec) -> the model before the first step; arguments as for `Stage.init`.
        loss: What is descended; or several, in turn, each with an optimizer of its own (`optimizer` is None then) and,
            folded from the stage's, a key of its own. Each sees what the ones before it have changed.
        optimizer: Of the loss.
        epochs: Passes over the training images.
        batch_size: Images of an update.
        schedule: The learning rate over time, as a share of the optimizer's.
        after_step: (key, model, frozen, batch) -> the model, called at the end of an update: moving averages of
            parameters, queues, proximal steps.
        finish: (key, model, frozen) -> what the stage leaves; None: the model.
        rows: As in `Stage`.
    """
    several = not callable(loss)
    if several == (optimizer is not None):
        raise ValueError("one loss needs an optimizer; several bring their own")
    descents = tuple(loss) if several else (Descent(loss, optimizer),)  # pyright: ignore[reportArgumentType]

    def begin(key: Key, state: State, frozen: Frozen, spec: PyTree) -> Training:
        model = init(key, state, frozen, spec)
        return Training(model, tuple(d.optimizer.init(_learned(model, d.params)) for d in descents))

    def update(key: Key, training: Training, frozen: Frozen, batch: Batch) -> tuple[Training, Metrics]:
        model, optimizers, parts = training.model, [], []
        rate = schedule(batch.progress)
        for i, (descent, state) in enumerate(zip(descents, training.optimizer, strict=True)):
            descent_key = jax.random.fold_in(key, i) if several else key
            model, state, metrics = _descend(descent, descent_key, model, state, frozen, batch, rate)
            optimizers.append(state)
            parts.append(metrics)
        metrics = {k: v for part in parts for k, v in part.items()}
        if several:
            losses = {
                descent.params or str(i): part["loss"]
                for i, (descent, part) in enumerate(zip(descents, parts, strict=True))
            }
            metrics["loss"] = sum(losses.values(), jnp.zeros(())) / len(losses)
            metrics |= {f"{name}_loss": value for name, value in losses.items()}
        if after_step is not None:
            model = after_step(key, model, frozen, batch)
        return Training(model, tuple(optimizers)), metrics

    def leave(key: Key, training: Training, frozen: Frozen) -> State:
        return training.model if finish is None else finish(key, training.model, frozen)

    return Stage(name, begin, update, leave, epochs=epochs, batch_size=batch_size, shuffle=True, rows=rows)


def _learned(model: Model, part: str | None) -> PyTree:
    return model.params if part is None else model.params[part]


def _descend(
    descent: Descent, key: Key, model: Model, optimizer: PyTree, frozen: Frozen, batch: Batch, rate: Float[Array, ""]
) -> tuple[Model, PyTree, Metrics]:
    """One step of a descent for the batch, or one for each of its parts, whose diagnostics are averaged."""

    def step(key: Key, model: Model, optimizer: PyTree, batch: Any) -> tuple[Model, PyTree, Metrics]:
        params = _learned(model, descent.params)
        value_and_gradient = jax.value_and_grad(descent.loss, has_aux=True)
        (value, changes), gradient = value_and_gradient(params, model, key, frozen, batch)
        metrics = {"loss": value} | changes.get("metrics", {})
        fields = {name: value for name, value in changes.items() if name != "metrics"}
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies integers by floats
            updates, optimizer = descent.optimizer.update(gradient, optimizer, params)
        params = optax.apply_updates(params, jax.tree.map(lambda leaf: rate * leaf, updates))
        whole = params if descent.params is None else model.params | {descent.params: params}
        return model._replace(params=whole, **fields), optimizer, metrics

    if descent.parts is None:
        return step(key, model, optimizer, batch)

    def inner(carry: tuple[Model, PyTree], numbered: tuple[Array, PyTree]) -> tuple[tuple[Model, PyTree], Metrics]:
        number, part = numbered
        model, optimizer, metrics = step(jax.random.fold_in(key, number), *carry, part)
        return (model, optimizer), metrics

    parts = descent.parts(key, model, frozen, batch)
    count = jnp.arange(len(jax.tree.leaves(parts)[0]))
    (model, optimizer), metrics = jax.lax.scan(inner, (model, optimizer), (count, parts))
    return model, optimizer, jax.tree.map(lambda values: values.mean(0), metrics)
