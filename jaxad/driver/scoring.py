"""Scoring: batch by batch, so that memory does not grow with the number of images."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxad.base import EmbedFn, Frozen, Method, Scores, State
from jaxad.data import Dataset
from jaxad.driver import fork
from jaxad.driver.embedding import Block, Reader, embed_program, embeddings, place
from jaxad.driver.execution import Execution
from jaxad.driver.mesh import Layout, fetch
from jaxad.driver.program import Program
from jaxad.driver.programs import score_program
from jaxad.driver.schedule import next_multiple


def batch_sizes(execution: Execution) -> list[int]:
    """The numbers of images that scoring compiles programs for: 1, 2, 4, ... on each device, up to the batch size."""
    devices = Layout(execution.mesh).data_shards
    most = next_multiple(execution.batch_size, devices)
    return [*itertools.takewhile(lambda size: size < most, (devices << i for i in itertools.count())), most]


def programs(method: Method, execution: Execution, ignores: bool = False) -> set[Program]:
    """What scores with a method; as long as something refers to them, they stay compiled."""
    layout = Layout(execution.mesh)
    rows = layout.rows(layout.data_shards)
    return {embed_program(method.embed, layout, rows), score_program(method, layout, None, False, ignores)}


def score(
    method: Method,
    state: State,
    frozen: Frozen,
    data: Dataset,
    execution: Execution = Execution(),
    *,
    whole_batches: bool = False,
) -> Iterator[tuple[np.ndarray, Scores]]:
    """Scores a data set batch by batch, in order.

    A data set smaller than a batch takes the smallest of `batch_sizes` that holds it; of a larger one, the last batch
    is filled up.

    Args:
        method: What was fitted.
        state: What `fit` returned.
        frozen: What it was fitted with.
        data: The images.
        execution: Devices, batch size, cache and progress.
        whole_batches: Fill up a smaller data set, too, where a program for whole batches is there already.

    Yields:
        Indices into the data set and the scores of these images, as numpy arrays.

    Raises:
        ValueError: A score is not finite; names the image.
    """
    for _, index, scores in _score(method, state, frozen, [data], execution, whole_batches, classes=False):
        yield index, scores


def score_classes(
    method: Method,
    state: State,
    frozen: Frozen,
    datasets: Sequence[Dataset],
    execution: Execution = Execution(),
    *,
    whole_batches: bool = False,
) -> Iterator[tuple[int, np.ndarray, Scores]]:
    """Scores the data sets of all classes at once.

    Args:
        method: What was fitted.
        state: What `fit_classes` returned, with a leading axis of classes.
        frozen: What it was fitted with, shared by all classes.
        datasets: One for each class, which may be empty.
        execution: As for `score`; progress counts the images of all classes.
        whole_batches: As for `score`.

    Yields:
        The number of a class, indices into its data set, and the scores of these images, as numpy arrays.

    Raises:
        ValueError: A score is not finite; names the image.
    """
    yield from _score(method, state, frozen, datasets, execution, whole_batches, classes=True)


def score_all(
    method: Method, state: State, frozen: Frozen, data: Dataset, execution: Execution = Execution()
) -> Scores:
    """The scores of a whole data set in one `Scores`; arguments as for `score`."""
    parts = [scores for _, scores in score(method, state, frozen, data, execution)]
    if not parts:
        raise ValueError("scoring needs at least one image, got none")
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def embed_all(embed: EmbedFn, frozen: Frozen, datasets: Sequence[Dataset], execution: Execution) -> None:
    """Embeds data sets into a shared cache, where there is room, for calls that see them or parts of them."""
    layout, datasets = Layout(execution.mesh), list(dict.fromkeys(datasets))
    padding = -len(datasets) % layout.class_shards
    sizes = [*map(len, datasets), *[0] * padding]
    datasets += [datasets[-1]] * padding
    sources = embeddings(embed, frozen, datasets, layout, execution.batch_size, execution.cache, True)
    if not all(source.caches for source in sources):
        return
    batch_size = next_multiple(execution.batch_size, layout.data_shards)
    blocks, done = range(0, max(sizes), batch_size), 0
    reader = Reader(embed, place(frozen, layout), sources, layout)
    for _, block, _ in reader.read(blocks, _in_order(sizes, batch_size)):
        done += int(block.valid.sum())
        if execution.progress:
            execution.progress("embed", done, sum(sizes))


def _in_order(sizes: Sequence[int] | np.ndarray, batch_size: int) -> Callable[[int], Block]:
    """The block that begins with an image, for classes of so many; padding repeats their images."""

    def block(first: int) -> Block:
        rows = np.arange(first, first + batch_size)
        valid = rows < np.asarray(sizes)[:, None]
        index = np.stack([np.resize(rows[v] if v.any() else 0, batch_size) for v in valid])
        return Block(index[:, None], valid[:, None])

    return block


def _score(
    method: Method,
    state: State,
    frozen: Frozen,
    datasets: Sequence[Dataset],
    execution: Execution,
    whole_batches: bool,
    classes: bool,
) -> Iterator[tuple[int, np.ndarray, Scores]]:
    fork.check()
    sizes = np.array([len(data) for data in datasets])
    if not sizes.any():
        return
    layout, progress = Layout(execution.mesh), execution.progress
    slots = [*range(len(datasets)), *[len(datasets) - 1] * (-len(datasets) % layout.class_shards)]
    stand_in = datasets[int(sizes.argmax())]  # what an empty class is padded with
    padded = [datasets[i] if sizes[i] else stand_in for i in slots]
    if classes and len(slots) > len(datasets):
        state = jax.tree.map(lambda leaf: leaf[np.asarray(slots)], state)
    n = sizes[slots]
    state = layout.spread(state, classes)
    placed = place(frozen, layout)
    sources = embeddings(method.embed, frozen, padded, layout, execution.batch_size, execution.cache, False)
    ignores = any(data.ignores for data in padded)
    program = score_program(method, layout, execution.classes_per_step if classes else None, classes, ignores)
    *smaller, batch_size = batch_sizes(execution)
    if not whole_batches:
        batch_size = next((size for size in smaller if size >= n.max()), batch_size)

    total, done = int(sizes.sum()), 0
    if progress:
        progress("score", 0, total)
    reader = Reader(method.embed, placed, sources, layout)
    for _, block, x in reader.read(range(0, int(n.max()), batch_size), _in_order(n, batch_size)):
        index, valid = block
        ignored = [_ignored(padded, block, layout)] if ignores else []
        outputs = fetch(program(state, placed.everywhere, x, *ignored))
        for c, data in enumerate(datasets):
            rows = index[c, 0, valid[c, 0]]
            if not rows.size:
                continue
            scores = jax.tree.map(lambda leaf, c=c, n=rows.size: leaf[c, :n], outputs)
            _check_scores(scores, data, rows)
            done += rows.size
            if progress:
                progress("score", done, total)
            yield c, rows, scores


def _ignored(datasets: Sequence[Dataset], block: Block, layout: Layout) -> jax.Array:
    """Which pixels of a block of images do not count, c s b h w, on the devices."""
    classes, steps, size = block.index.shape
    here, rows = layout.block(classes, size)
    index = block.index[here, :, rows]
    local = np.zeros((*index.shape, *datasets[0].image_size), bool)
    for pixels, data, images in zip(local, datasets[here], index, strict=True):
        ignored = data.ignored(images.ravel())
        if ignored is not None:
            pixels[:] = ignored.reshape(pixels.shape)
    return layout.put(local, layout.named(None, layout.rows(size)), (classes, steps, size, *local.shape[3:]))


def _check_scores(scores: Scores, data: Dataset, rows: np.ndarray) -> None:
    values: Any
    for values in (scores.image, scores.image if scores.pixel is None else scores.pixel):
        finite = np.isfinite(values)
        if not finite.all():
            i = int(np.argmin(finite.reshape(len(rows), -1).all(1)))
            bad = values[i][~finite[i]].flat[0]
            raise ValueError(f"scores must be finite, got {bad} for {data.paths[rows[i]]}: the model is degenerate")
