"""Recipes in parts, for what does more than fit and score them: detector, weights, images, batches, states."""

import contextlib
import csv
import dataclasses
import inspect
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from experiments.recipes import Recipe, all_recipes
from jaxad.backbones import backbone
from jaxad.base import Batch, Frozen, Method, PyTree, Stage, State
from jaxad.data import Dataset, demo, open_data
from jaxad.data.dataset import Split, unite
from jaxad.driver.execution import Execution, Progress
from jaxad.driver.fit import states
from jaxad.driver.program import Program
from jaxad.learning import load_frozen, load_photographs
from jaxad.methods import METHODS
from jaxad.settings import Settings
from jaxad.training.statistics import STATISTICS

EMBEDDED_AT_ONCE = 16
"""Images that the backbone sees in one call."""


class Opened(NamedTuple):
    """A recipe that is ready to train on its first category."""

    settings: Settings
    method: Method
    frozen: Frozen
    photographs: Any
    """Auxiliary images, uint8 n h w 3; None where the method uses none."""
    train: Dataset
    test: Dataset | None


def settings_of(
    recipe: Recipe,
    *,
    weights: Sequence[Path] = (),
    auxiliary: Path | None = None,
    seed: int = 0,
    smoke: bool = False,
    **hyperparameters: Any,
) -> Settings:
    """The settings of a recipe; those of a smoke run are for small images, a small backbone and one epoch.

    Args:
        recipe: What to run.
        weights: A file for each backbone; none: those of `jaxad weights fetch`, or the embedded ones.
        auxiliary: A folder of photographs of other things.
        seed: Of everything random.
        smoke: Whether this is a smoke run.
        hyperparameters: Those that differ from the recipe's.
    """
    if smoke and "epochs" in inspect.signature(METHODS[recipe.method]).parameters:
        hyperparameters = {"epochs": 1, **hyperparameters}
    return Settings.of(
        recipe.method,
        backbone=recipe.smoke_backbone if smoke else recipe.backbone,
        weights=() if smoke else weights,
        auxiliary=auxiliary,
        image_size=64 if smoke else recipe.image_size,
        center_crop=None if smoke else recipe.center_crop,
        holdout=0,
        seed=seed,
        **{**recipe.hyperparameters, **hyperparameters},
    )


def weights_of(settings: Settings, smoke: bool) -> Frozen:
    """The pretrained weights; random ones in a smoke run."""
    if smoke and settings.backbone:
        return backbone(settings.backbone[0]).init(jax.random.key(0))
    return load_frozen(settings)


def grouped(split: Split, parts: Path) -> Dataset:
    """All images of a category, whatever their split, with their parts as groups.

    Args:
        split: The images of the category.
        parts: A CSV file: the names of the images, without their extensions, and their parts.

    Raises:
        ValueError: The file does not name an image, or there is no test set.
    """
    if split.test is None:
        raise ValueError(f"a split by part needs anomalous images too, got none beside {split.train.name}")
    with parts.open(encoding="utf-8", newline="") as file:
        part_of = dict(list(csv.reader(file))[1:])
    data = unite([split.train, split.test], split.train.category)
    unknown = [path for path in data.paths if Path(path).stem not in part_of]
    if unknown:
        raise ValueError(f"{parts.name} must name the part of every image, got none for {unknown[0]}")
    records = tuple(record._replace(group=part_of[Path(record.path).stem]) for record in data.records)
    return dataclasses.replace(data, records=records)


def split_by_part(data: Dataset, seed: int) -> Split:
    """A split that has no part in both sets: see `Recipe.parts`."""
    normal = sorted({group for group, label in zip(data.groups, data.labels, strict=True) if label == 0})
    tested = np.random.default_rng(seed).permutation(normal)[: max(1, len(normal) // 5)]
    in_test = (data.labels == 1) | np.isin(data.groups, tested)
    return Split(data.subset(~in_test), dataclasses.replace(data.subset(in_test), split="test"))


@contextlib.contextmanager
def smoke_photographs(method: str) -> Iterator[Path | None]:
    """A folder of a few images for the smoke run of a method that uses photographs of other things; else None."""
    if METHODS[method]().auxiliary is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        for i in range(4):
            Image.fromarray(demo.render("fabric", i, size=64)[0]).save(Path(folder) / f"{i}.png")
        yield Path(folder)


def open_recipe(
    name: str,
    *,
    epochs: int | None = None,
    data: str = "demo",
    weights: Path | None = None,
    auxiliary: Path | None = None,
    smoke: bool = False,
) -> Opened:
    """Opens a recipe of a method that has a learning rate.

    Args:
        name: Of the recipe.
        epochs: None: the recipe's.
        data: The data set: a folder, or whatever `jaxad fit` takes. Of several categories the first counts.
        weights: Of the backbone; None: those of `jaxad weights fetch`, or the embedded ones.
        auxiliary: A folder of photographs of other things.
        smoke: Whether this is a smoke run.

    Raises:
        ValueError: There is no such recipe, or its method needs photographs and gets none.
    """
    recipe = all_recipes().get(name)
    if recipe is None or "learning_rate" not in inspect.signature(METHODS[recipe.method]).parameters:
        raise ValueError(f"the recipe must be one of a method with a learning rate, got {name}")
    changed = {} if epochs is None else {"epochs": epochs}
    with smoke_photographs(recipe.method) if smoke else contextlib.nullcontext(auxiliary) as folder:
        files = () if weights is None else (weights,)
        settings = settings_of(recipe, weights=files, auxiliary=folder, smoke=smoke, **changed)
        source = "demo" if smoke else data
        splits = open_data(source, preprocess=settings.preprocess, mask_threshold=recipe.mask_threshold)
        train, test = next(iter(splits.values()))
        assert train is not None
        method = settings.build(train.image_size)
        photographs = load_photographs(settings, method, train.image_size)
    return Opened(settings, method, weights_of(settings, smoke), photographs, train, test)


def embedded(method: Method, frozen: Frozen, data: Dataset) -> PyTree:
    """All images of a data set, embedded, in the memory of the host."""
    embed, n = Program(method.embed), EMBEDDED_AT_ONCE
    parts = [embed(frozen, data.images(range(i, min(i + n, len(data))))) for i in range(0, len(data), n)]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def batch_of(x: PyTree, auxiliary: Any = None, progress: float = 0.5) -> Batch:
    """A batch of normal images without padding, whose embeddings are x."""
    n = len(jax.tree.leaves(x)[0])
    index = jnp.arange(n, dtype=jnp.int32)
    return Batch(x, jnp.ones(n, bool), jnp.zeros(n, jnp.int32), None, index, jnp.float32(progress), auxiliary)


def last_shuffled(method: Method) -> Stage:
    """The last stage that trains by gradient steps."""
    return [stage for stage in method.stages if stage.shuffle and stage.name != STATISTICS][-1]


def initial_state(method: Method, frozen: Frozen, spec: PyTree, stage: Stage) -> State:
    """A state in which a stage may begin: the stages before it have seen no images.

    Args:
        method: Whose state it is.
        frozen: Its pretrained weights.
        spec: Shapes and types of the embedded training images.
        stage: One of the method's.
    """
    key, state = jax.random.key(0), None
    for earlier in method.stages[: method.stages.index(stage)]:
        state = earlier.finalize(key, earlier.init(key, state, frozen, spec), frozen)
    return stage.init(key, state, frozen, spec)


def states_by_epoch(
    method: Method, frozen: Frozen, data: Dataset, *, auxiliary: Any = None, progress: Progress | None = None
) -> Iterator[State]:
    """The state after every epoch of the last stage that trains by gradient steps.

    A state is gone once the next one is asked for. Where one call of a compiled program takes more steps than an epoch
    has, some epochs yield no state.

    Args:
        method: What is trained.
        frozen: Its pretrained weights.
        data: The training images.
        auxiliary: Photographs of other things, uint8 n h w 3.
        progress: As in `Execution`.
    """
    stage, epochs = last_shuffled(method), 0
    execution = Execution(progress=progress)
    for snapshot in states(method, frozen, [data], jax.random.key(0), execution, auxiliary=auxiliary):
        if snapshot.stage is stage and snapshot.epochs > epochs and not snapshot.finished:
            epochs = snapshot.epochs
            yield jax.tree.map(lambda leaf: leaf[0], snapshot.state)
            if epochs == stage.epochs:
                return
