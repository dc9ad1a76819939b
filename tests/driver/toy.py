"""A toy gradient method, whose every number a hand-written loop gives as well, and its data."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxad.base import Method, Scores, Stage, keep_state
from jaxad.data import Dataset, Preprocess, open_data
from jaxad.driver.execution import Checkpoint, Execution

KEY = jax.random.key(3)
N = 21
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


class ToyState(NamedTuple):
    weight: jax.Array
    optimizer: optax.OptState
    seen: jax.Array
    """How often every training image was learned from."""


class ToyModel(NamedTuple):
    weight: jax.Array
    noise: jax.Array


def mean_color(frozen, image):
    return {"color": image.astype(jnp.float32).mean((1, 2)) / 255 * frozen}


def toy(*, epochs=3, batch_size: int | None = 4, shuffle=True, rate=1.0) -> Method:
    """Counts images in one stage, then learns a weight by noisy gradient steps in another."""

    def init(key, state, frozen, spec):
        n = spec["color"].shape[0]
        weight = jax.random.normal(key, (3,))
        return ToyState(weight, OPTIMIZER.init(weight), jnp.zeros(n, jnp.int32))

    def count(key, state, frozen, batch):
        row = jnp.where(batch.valid, batch.index, len(state.seen))
        return state._replace(seen=state.seen.at[row].add(1, mode="drop")), {}

    def loss(weight, key, batch):
        noise = jax.random.normal(key, (3,)) * 0.01
        error = (batch.x["color"] @ (weight + noise) - 1.0) ** 2
        return jnp.where(batch.valid, error, 0).sum() / batch.valid.sum().astype(jnp.float32)

    def train(key, state, frozen, batch):
        value, gradient = jax.value_and_grad(loss)(state.weight, key, batch)
        updates, optimizer = OPTIMIZER.update(gradient * rate, state.optimizer)
        row = jnp.where(batch.valid, batch.index, len(state.seen))
        seen = state.seen.at[row].add(1, mode="drop")
        new = ToyState(optax.apply_updates(state.weight, updates), optimizer, seen)
        return new, {"loss": value, "valid": batch.valid.sum()}

    def finalize(key, state, frozen):
        return ToyModel(state.weight, jax.random.normal(key, (2,)))

    def score(state, frozen, x):
        return Scores((x["color"] @ state.weight - 1.0) ** 2, None)

    stages = (
        Stage("count", init, count),
        Stage("train", carry_on, train, finalize, epochs=epochs, batch_size=batch_size, shuffle=shuffle),
    )
    return Method(mean_color, stages, score)


def carry_on(key, state, frozen, spec):
    """The `init` of a stage that begins with what the one before left."""
    return keep_state(key, state, frozen)


def photographs(n=N, seed=0) -> Dataset:
    images = np.random.default_rng(seed).integers(0, 256, (n, 6, 5, 3), np.uint8)
    return open_data(images, preprocess=Preprocess(None))["arrays"].train


def execution(checkpoint_dir: Path | None = None, checkpoint_seconds: float = 60.0, **options: Any) -> Execution:
    """An `Execution`, with a checkpoint where a directory is given."""
    checkpoint = checkpoint_dir and Checkpoint(checkpoint_dir, checkpoint_seconds)
    return Execution(checkpoint=checkpoint, **options)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


class Stop(Exception):
    """Raised in the middle of a fit."""


def stopping_after(calls):
    """A progress callback that raises at that call."""
    count = iter(range(calls))

    def progress(part, done, total):
        if next(count, None) is None:
            raise Stop

    return progress


TOY = toy()
LONG = toy(epochs=12)
FROZEN = jnp.float32(2.0)
DATA = photographs()
CLASSES = [photographs(n, seed) for seed, n in enumerate((21, 9, 3))]
"""Of 5, 2 and 1 steps an epoch; the last has fewer images than a batch."""
