"""Training of recipes on what they embedded, epoch by epoch, for experiments that look at the states on the way."""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxad
import run
from jaxad.base import Batch, Frozen, Method, PyTree
from jaxad.data import Dataset, Split, open_data
from jaxad.methods import METHODS
from jaxad.driver.program import Program

PART = 16
"""Images of a step of a stage that does not say how many."""


def opened(
    name: str, epochs: int | None, data: str, weights: Path | None, smoke: bool, auxiliary: Path | None = None
) -> tuple[jaxad.Detector, Frozen, Split]:
    """The detector of a recipe that learns at a rate, its weights, and its first category.

    Raises:
        ValueError: There is no such recipe.
    """
    recipe = run.all_recipes().get(name)
    if recipe is None or "learning_rate" not in inspect.signature(METHODS[recipe.method]).parameters:
        raise ValueError(f"the recipe must be one of a method with a learning rate, got {name}")
    hyperparameters: dict[str, Any] = dict(recipe.hyperparameters) | ({} if epochs is None else {"epochs": epochs})
    detector = jaxad.Detector(
        recipe.method,
        backbone=recipe.smoke_backbone if smoke else recipe.backbone,
        weights=None if smoke else weights,
        auxiliary=auxiliary,
        image_size=64 if smoke else recipe.image_size,
        center_crop=None if smoke else recipe.center_crop,
        **hyperparameters,
    )
    splits = open_data("demo" if smoke else data, preprocess=detector.preprocess, mask_threshold=recipe.mask_threshold)
    if smoke:
        detector.frozen = run.random_weights(recipe, splits)
    return detector, detector.load_frozen(learning=True), next(iter(splits.values()))


def embedded(method: Method, frozen: Frozen, data: Dataset) -> PyTree:
    """What the method makes of all images, on the host."""
    embed = Program(method.embed)
    parts = [embed(frozen, data.images(range(i, min(i + PART, len(data))))) for i in range(0, len(data), PART)]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def length(x: PyTree) -> int:
    """How many images were embedded."""
    return len(jax.tree.leaves(x)[0])


def batch_of(x: PyTree, rows: np.ndarray | range, progress: float = 0.0) -> Batch:
    """Some of the images, all of them valid."""
    index = jnp.asarray(rows, jnp.int32)
    taken = jax.tree.map(lambda leaf: jnp.asarray(leaf[np.asarray(rows)]), x)
    n = len(index)
    return Batch(taken, jnp.ones(n, bool), jnp.zeros(n, jnp.int32), None, index, jnp.float32(progress))


def after_epochs(
    method: Method, frozen: Frozen, x: PyTree, progress: Callable[[int, int], None], seed: int = 0
) -> Iterator[PyTree]:
    """The state after every epoch of the last stage that shuffles; the stages before it are run first.

    Args:
        method: What is trained.
        frozen: Its weights that are not.
        x: What it embedded.
        progress: Told of the images done and all of them.
        seed: Of the state and of the order of images.
    """
    order = np.random.default_rng(seed)
    spec = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), x)
    state = method.init(jax.random.key(seed), frozen, spec)
    last = max(i for i, stage in enumerate(method.stages) if stage.shuffle)
    for i, stage in enumerate(method.stages[: last + 1]):
        seen = np.asarray(stage.rows(length(x)))
        update, size = Program(stage.update), min(stage.batch_size or PART, len(seen))
        steps = len(seen) // size
        for epoch in range(stage.epochs):
            rows = order.permutation(seen) if stage.shuffle else seen
            for step in range(steps):
                at = epoch * steps + step
                batch = batch_of(x, rows[step * size : (step + 1) * size], at / steps / stage.epochs)
                state, _ = update(jax.random.key(at), state, frozen, batch)
                progress((at + 1) * size, stage.epochs * steps * size)
            if i == last:
                yield state
        if i < last:
            state = stage.finalize(jax.random.key(seed), state, frozen)
