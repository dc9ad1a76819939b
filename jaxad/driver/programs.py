"""The compiled programs of a method: those that fit it, and the one that scores. `fit` and `plan` share them."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxad.base import Batch, EmbedFn, Frozen, Key, Method, PyTree, Scores, Stage, State
from jaxad.data import Dataset
from jaxad.driver.mesh import Layout
from jaxad.driver.program import Program, weak_cache


class FitPrograms(NamedTuple):
    """What a fit runs; every function is over all classes at once."""

    start: Program
    """(keys, frozen) -> the states with which the first stage begins."""
    updates: tuple[Program, ...]
    """Of each stage: (states, keys, active, batches, frozen, auxiliary, steps) -> states and metrics, for a chunk."""
    finishes: tuple[Program, ...]
    """Of each stage: (keys, states, frozen) -> the states with which the next stage begins, or the fitted ones."""


@functools.lru_cache(maxsize=64)
def fit_programs(method: Method, layout: Layout, room: int, image_size: tuple[int, int]) -> FitPrograms:
    """The programs of a fit.

    Args:
        method: What is fitted.
        layout: Where arrays lie.
        room: Images of the largest class, padding included.
        image_size: (height, width).
    """

    def spec(frozen: Frozen) -> PyTree:
        return embedded_spec(method.embed, frozen, room, image_size)

    def start(key: Key, frozen: Frozen) -> State:
        return method.stages[0].init(key, None, frozen, spec(frozen))

    def finish(number: int) -> Callable:
        """Ends a stage and begins the next in one program."""

        def run(key: Key, state: State, frozen: Frozen) -> State:
            state = method.stages[number].finalize(key, state, frozen)
            if number + 1 == len(method.stages):
                return state
            return method.stages[number + 1].init(jax.random.fold_in(key, 1), state, frozen, spec(frozen))

        return run

    def shardings(out: tuple[State, dict]) -> Any:
        return layout.state(out[0]), jax.tree.map(lambda _: layout.replicated(), out[1])

    return FitPrograms(
        _state_program(start, (0, None), layout),
        tuple(
            Program(_chunk_of(stage, layout), ambient=layout.ambient, shardings=shardings, donate_argnums=0)
            for stage in method.stages
        ),
        tuple(_state_program(finish(i), (0, 0, None), layout) for i in range(len(method.stages))),
    )


def _state_program(fn: Callable, in_axes: tuple[int | None, ...], layout: Layout) -> Program:
    return Program(layout.over_classes(fn, in_axes), ambient=layout.ambient, shardings=layout.state)


def _chunk_of(stage: Stage, layout: Layout) -> Callable:
    """A `lax.scan` over the steps of a chunk."""

    def run(states: State, keys: Key, active: jax.Array, batches: Batch, *shared: Any) -> tuple[State, dict]:
        uneven = stage.shuffle and active.shape[0] > 1  # a class of fewer images has fewer steps

        def one_class(
            state: State, key: Key, active: jax.Array, batches: Batch, frozen: Frozen, auxiliary: Any, steps: jax.Array
        ) -> tuple[State, dict]:
            def body(state: State, inputs: tuple[jax.Array, jax.Array, Batch]) -> tuple[State, dict]:
                step, counts, batch = inputs
                batch = batch._replace(auxiliary=auxiliary)
                new, metrics = stage.update(jax.random.fold_in(key, step), state, frozen, batch)
                if uneven:
                    new = jax.tree.map(lambda a, b: jnp.where(counts, a, b), new, state)
                return new, metrics

            single = steps.shape[0] == 1  # unrolled: XLA's convolutions on a CPU are far slower in loops
            return jax.lax.scan(body, state, (steps, active, batches), unroll=2 if single else 1)

        return layout.over_classes(one_class, (0, 0, 0, 0, None, None, None))(states, keys, active, batches, *shared)

    return run


@weak_cache
def score_program(
    method: Method, layout: Layout, classes_per_step: int | None, classes: bool, ignores: bool = False
) -> Program:
    """(states, frozen, x) -> scores, leaves c b ...; x has one step, c 1 b ....

    Args:
        method: What was fitted.
        layout: Where arrays lie.
        classes_per_step: Classes that are computed at the same time (on each device); None: all.
        classes: Whether the state has a leading axis of classes; without, there is one class.
        ignores: Whether a last argument, Bool c 1 b h w, says which pixels do not count. In the heat map, they get the
            smallest score of the others.
    """
    takes = "ignore" in inspect.signature(method.score).parameters

    def shardings(scores: Scores) -> Any:
        return jax.tree.map(lambda leaf: layout.named(layout.rows(leaf.shape[1])), scores)

    def run(state: State, frozen: Frozen, x: PyTree, *ignored: jax.Array) -> Scores:
        x, ignored = jax.tree.map(lambda leaf: leaf[0], (x, ignored))
        scores = method.score(state, frozen, x, **({"ignore": ignored[0]} if takes and ignores else {}))
        if not ignores or scores.pixel is None:
            return scores
        smallest = jnp.where(ignored[0], jnp.inf, scores.pixel).min((1, 2), keepdims=True)
        return scores._replace(pixel=jnp.where(ignored[0], smallest, scores.pixel))

    in_axes = (0 if classes else None, None, 0, *([0] if ignores else []))
    return Program(layout.over_classes(run, in_axes, classes_per_step), ambient=layout.ambient, shardings=shardings)


def embedded_spec(embed: EmbedFn, frozen: Frozen, n: int, image_size: tuple[int, int]) -> PyTree:
    """Shapes and types of n embedded images."""
    return jax.eval_shape(embed, frozen, jax.ShapeDtypeStruct((n, *image_size, 3), jnp.uint8))


def abstract_state(method: Method, frozen: Frozen, spec: PyTree, stage: int | None = None) -> State:
    """Shapes and types of the state with which a stage begins, or of the fitted model (`stage` None).

    Nothing is computed.

    Args:
        method: Of `jaxad.methods`.
        frozen: Pretrained weights, or their shapes and types.
        spec: Shapes and types of the embedded training images.
        stage: Number of the stage.
    """
    key, state = jax.eval_shape(lambda: jax.random.key(0)), None
    for number, part in enumerate(method.stages):
        state = jax.eval_shape(lambda k, s, f, init=part.init: init(k, s, f, spec), key, state, frozen)
        if number == stage:
            return state
        state = jax.eval_shape(part.finalize, key, state, frozen)
    return state


def class_state(method: Method, frozen: Frozen, state: State, index: int, data: Dataset) -> State:
    """The state of one of the classes of `fit_classes`, as small as `fit` would have made it.

    Args:
        method: What was fitted.
        frozen: What it was fitted with.
        state: With a leading axis of classes.
        index: The number of the class.
        data: The training images of the class.
    """
    wanted = abstract_state(method, frozen, embedded_spec(method.embed, frozen, len(data), data.image_size))

    def cut(target: Any, leaf: Any) -> Any:
        return None if target is None else leaf[(index, *map(slice, target.shape))]

    return jax.tree.map(cut, wanted, state, is_leaf=lambda leaf: leaf is None)
