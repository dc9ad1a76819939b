"""Fitting: the only place with epochs and loops over data.

Images are decoded in batches, embedded once, and learned from in chunks of steps: one `lax.scan` a chunk. While the
device computes one chunk, the host reads the loss of the one before, reports progress and prepares the next; only a
checkpoint waits for the device. Several classes are one more axis of every array; a single class has it, too.
"""

import collections
import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxad.base import Batch, Frozen, Key, Method, PyTree, Stage, State
from jaxad.data import Dataset
from jaxad.driver import fork
from jaxad.driver.checkpoint import Saver
from jaxad.driver.embedding import Block, Reader, embeddings, place
from jaxad.driver.execution import Checkpoint, Execution
from jaxad.driver.mesh import Layout
from jaxad.driver.program import compile_seconds
from jaxad.driver.programs import abstract_state, fit_programs
from jaxad.driver.record import Record
from jaxad.driver.schedule import Schedule, chunks_in_flight, next_multiple


class Fitted(NamedTuple):
    """What `fit` and `fit_classes` return."""

    state: State
    """Of `fit_classes` with a leading axis of classes."""
    compile_seconds: float
    run_seconds: float
    metrics: dict[str, np.ndarray]
    """The diagnostics of the last stage that has any, one entry a step since the run (re)started; of `fit_classes`
    (class, step), NaN where a class has no step left."""


class Snapshot(NamedTuple):
    """A fit on its way."""

    stage: Stage
    steps: int
    """Steps of the stage that are done, of the class that has most."""
    epochs: int
    """Whole passes over the images that are done, of the class that has most images."""
    state: State
    """With a leading axis of classes. The next step writes into the same memory: use it, or copy it, before."""
    finished: bool = False
    """Whether the stage is over and `state` is what the next one begins with, or the fitted model."""


def fit(
    method: Method,
    frozen: Frozen,
    data: Dataset,
    key: Key,
    execution: Execution = Execution(),
    *,
    auxiliary: Any = None,
) -> Fitted:
    """Fits a method to a data set.

    Args:
        method: What a factory of `jaxad.methods` returned.
        frozen: Pretrained weights (`jaxad.backbones.load`); None for methods without.
        data: The training images.
        key: A JAX random key; the same key gives the same model.
        execution: Devices, batch size, cache, checkpoint and progress.
        auxiliary: Photographs of other things, uint8 n h w 3, for methods that learn from such (`Method.auxiliary`).

    Raises:
        ValueError: There are no images, the method needs photographs that are not given, or the checkpoint is damaged
            or of another fit.
        NonFiniteLoss: The loss became NaN or infinite; names stage, epoch and step.
    """
    fitted = fit_classes(method, frozen, [data], key[None], execution, auxiliary=auxiliary)
    metrics = {name: values[0] for name, values in fitted.metrics.items()}
    return fitted._replace(state=_squeezed(fitted.state), metrics=metrics)


def _squeezed(states: State) -> State:
    """The state of the only class, leaf by leaf, so that never more than one leaf is in memory twice."""
    leaves, structure = jax.tree.flatten(states)
    squeezed = []
    for i, leaf in enumerate(leaves):
        squeezed.append(jax.block_until_ready(leaf[0]))
        leaves[i] = None
        leaf.delete()
    return jax.tree.unflatten(structure, squeezed)


def fit_classes(
    method: Method,
    frozen: Frozen,
    datasets: Sequence[Dataset],
    key: Key,
    execution: Execution = Execution(),
    *,
    auxiliary: Any = None,
) -> Fitted:
    """Fits a method to several data sets at once, in one program with an axis of classes.

    Every class comes out as `fit` would have it. Smaller ones are padded to the largest; `class_state` cuts one out.

    Args:
        method: As for `fit`.
        frozen: Shared by all classes.
        datasets: The training images of each class, of one size; a data set may occur several times.
        key: One key for all classes, or one for each: the seeds of a sweep, say.
        execution: As for `fit`; progress counts the images of all classes.
        auxiliary: As for `fit`; shared by all classes.

    Raises:
        ValueError: As for `fit`; or there are no classes, the image sizes differ, or there are not as many keys.
        NonFiniteLoss: As for `fit`; names the class, too.
    """
    n, layout, parts = len(datasets), Layout(execution.mesh), []
    keys = _check_classes(datasets, key)
    size = group_size(n, execution.classes_per_step, layout)
    for first in range(0, n, size):
        members = np.minimum(np.arange(first, first + size), n - 1)  # a repeated class fills the last group
        checkpoint = execution.checkpoint and _below(execution.checkpoint, f"classes_{first}")
        options = execution._replace(checkpoint=checkpoint)
        started, compiled = time.perf_counter(), compile_seconds()
        group = Group(method, frozen, [datasets[i] for i in members], keys[members], options, auxiliary)
        state = group.run(room=max(map(len, datasets)), keep_fitted=size < n)
        compiled = compile_seconds() - compiled
        seconds = time.perf_counter() - started - compiled
        real = min(size, n - first)
        if real < size:
            state = jax.tree.map(lambda leaf, real=real: leaf[:real], state)
        metrics = {name: values[:real] for name, values in group.diagnostics.items()}
        parts.append(Fitted(state, compiled, seconds, metrics))
    return parts[0] if len(parts) == 1 else _concatenated(parts)


def states(
    method: Method,
    frozen: Frozen,
    datasets: Sequence[Dataset],
    key: Key,
    execution: Execution = Execution(),
    *,
    auxiliary: Any = None,
) -> Iterator[Snapshot]:
    """A fit step by step: yields a `Snapshot` after every call of a compiled program; all classes are one group.

    On a CPU a call takes one step, elsewhere up to eight. Arguments and errors as for `fit_classes`.
    """
    keys = _check_classes(datasets, key)
    yield from Group(method, frozen, datasets, keys, execution, auxiliary).snapshots()


def group_size(classes: int, classes_per_step: int | None, layout: Layout) -> int:
    """Classes that are fitted at the same time: a multiple of the devices along "class"."""
    return next_multiple(min(classes_per_step or classes, classes), layout.class_shards)


def _below(checkpoint: Checkpoint, name: str) -> Checkpoint:
    return checkpoint._replace(directory=Path(checkpoint.directory) / name)


def _check_classes(datasets: Sequence[Dataset], key: Key) -> Key:
    """The keys of the classes, which are checked."""
    fork.check()
    keys = jnp.broadcast_to(key, (len(datasets),)) if key.ndim == 0 else key
    check_images(datasets)
    sizes = sorted({data.image_size for data in datasets})
    if len(sizes) != 1 or keys.shape != (len(datasets),):
        raise ValueError(
            f"classes must have images of one size and a key each, got {len(datasets)} classes with the sizes {sizes} "
            f"and {keys.shape[0]} keys"
        )
    return keys


def check_images(datasets: Sequence[Dataset]) -> None:
    """Raises ValueError for a data set without images."""
    for data in datasets:
        if len(data) == 0:
            raise ValueError(f"fitting needs at least one normal image, got none of {data.category}")


def _concatenated(parts: Sequence[Fitted]) -> Fitted:
    """The groups of classes in one."""
    state = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(part.state for part in parts))
    steps = max((values.shape[1] for part in parts for values in part.metrics.values()), default=0)

    def padded(values: np.ndarray) -> np.ndarray:
        missing = steps - values.shape[1]
        return np.pad(values.astype(float), ((0, 0), (0, missing)), constant_values=np.nan) if missing else values

    metrics = {name: np.concatenate([padded(part.metrics[name]) for part in parts]) for name in parts[0].metrics}
    return Fitted(state, sum(p.compile_seconds for p in parts), sum(p.run_seconds for p in parts), metrics)


class Group:
    """The fit of some classes in one program each stage; arguments as for `fit_classes`."""

    def __init__(
        self,
        method: Method,
        frozen: Frozen,
        datasets: Sequence[Dataset],
        keys: Key,
        execution: Execution,
        auxiliary: Any,
    ) -> None:
        declared = method.auxiliary
        if declared and declared.needed and auxiliary is None:
            raise ValueError("this method learns from photographs of other things too: give them as auxiliary")
        self._method, self._frozen, self._datasets, self._keys = method, frozen, datasets, keys
        self._execution, self._layout = execution, Layout(execution.mesh)
        self._auxiliary = auxiliary if declared else None
        self.diagnostics: dict[str, np.ndarray] = {}
        """As in `Fitted.metrics`."""

    def run(self, room: int = 0, keep_fitted: bool = False) -> State:
        """The fitted states; arguments as for `snapshots`."""
        snapshot = collections.deque(self.snapshots(room, keep_fitted), maxlen=1).pop()
        return snapshot.state

    def snapshots(self, room: int = 0, keep_fitted: bool = False) -> Iterator[Snapshot]:
        """Fits, and yields every state on the way; the last one is the fitted one.

        Args:
            room: Images of the largest class of all groups.
            keep_fitted: Keep the fitted state as a checkpoint, too.
        """
        method, layout, execution = self._method, self._layout, self._execution
        sizes = [len(data) for data in self._datasets]
        room = next_multiple(max(room, *sizes), layout.data_shards)
        several = sum(stage.epochs for stage in method.stages) > 1
        sources = embeddings(
            method.embed, self._frozen, self._datasets, layout, execution.batch_size, execution.cache, several
        )
        spec = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((room, *leaf.shape[1:]), leaf.dtype), sources[0].spec)
        programs = fit_programs(method, layout, room, self._datasets[0].image_size)
        placed, auxiliary = place(self._frozen, layout), place(self._auxiliary, layout).everywhere
        reader = Reader(method.embed, placed, sources, layout)
        identity = {
            "keys": np.asarray(jax.random.key_data(self._keys)).tolist(),
            "images": sizes,
            "room": room,
            "batch_size": execution.batch_size,
            "stages": [stage.name for stage in method.stages],
        }
        # A loss that is not finite means that the newest checkpoint is broken already: the one before is needed.
        keep = 2 if any(stage.shuffle for stage in method.stages) else 1
        with Saver(execution.checkpoint, identity, keep=keep) as saver:
            restored = saver.restore(
                lambda stage: layout.abstract(abstract_state(method, self._frozen, spec, stage), len(sizes))
            )
            if restored is None:
                restored = 0, 0, programs.start(layout.spread(_folded(self._keys, 0)), placed.everywhere)
            first_stage, done, state = restored
            del restored  # the first step donates the state
            for number in range(first_stage, len(method.stages)):
                stage, stage_keys = method.stages[number], _folded(self._keys, number + 1)
                keys = layout.spread(stage_keys)
                schedule = Schedule(stage, sizes, stage_keys, execution.batch_size, layout.data_shards)
                forget = functools.partial(saver.forget, number)
                record = Record(stage, schedule, self._datasets, execution.progress, forget)
                first = done if number == first_stage else 0
                record.begin(first)
                for step, block, x in reader.read(range(first, schedule.total, schedule.chunk), schedule.block):
                    steps = np.arange(step, step + block.index.shape[1], dtype=np.int32)
                    active = steps < schedule.steps[:, None]
                    progress = steps / schedule.steps[:, None]
                    batches, counts = _batches(self._datasets, block, x, active, progress, layout)
                    arguments = (keys, counts, batches, placed.everywhere, auxiliary, steps)
                    state, metrics = programs.updates[number](state, *arguments)
                    if not metrics:  # else chunks would pile up in memory
                        jax.block_until_ready(state)
                    record.submit(steps, active, metrics)
                    due, next_step = saver.due(), int(steps[-1]) + 1
                    record.collect(0 if due else chunks_in_flight(layout))
                    if due:
                        saver.save(number, next_step, state)
                    yield Snapshot(stage, next_step, next_step // int(schedule.steps_per_epoch.max()), state)
                record.collect(0)
                record.end()
                keys = layout.spread(_folded(stage_keys, 1 << 30))
                state = programs.finishes[number](keys, state, placed.everywhere)
                jax.block_until_ready(state)
                if saver.due(keep_fitted and number + 1 == len(method.stages)):
                    saver.save(number + 1, 0, state)
                self.diagnostics = record.metrics() or self.diagnostics
                yield Snapshot(stage, schedule.total, stage.epochs, state, finished=True)
            if first_stage == len(method.stages):
                yield Snapshot(method.stages[-1], 0, method.stages[-1].epochs, state, finished=True)


def _folded(keys: Key, number: int) -> Key:
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def _batches(
    datasets: Sequence[Dataset], block: Block, x: PyTree, active: np.ndarray, progress: np.ndarray, layout: Layout
) -> tuple[Batch, jax.Array]:
    """The stacked batches of a block, and which of its steps count for each class; on the devices."""
    classes, steps, size = block.index.shape
    here, rows = layout.block(classes, size)
    index, valid = (part[here, :, rows] for part in block)
    axis = layout.rows(size)

    def of_images(local: np.ndarray) -> jax.Array:
        return layout.put(local, layout.named(None, axis), (classes, steps, size, *local.shape[3:]))

    def of_steps(local: np.ndarray) -> jax.Array:
        return layout.put(local, layout.named(), (classes, steps))

    labels = np.stack([data.labels[i] for data, i in zip(datasets[here], index, strict=True)])
    masks = None
    if all(data.has_masks and data.split == "train" for data in datasets):
        parts = [data.masks(i.ravel()) for data, i in zip(datasets[here], index, strict=True)]
        masks = np.stack(parts)  # pyright: ignore[reportCallIssue, reportArgumentType] (they have masks)
        masks = of_images(masks.reshape(*index.shape, *masks.shape[2:]))
    batch = Batch(
        x,
        of_images(valid),
        of_images(labels.astype(np.int32)),
        masks,
        of_images(index.astype(np.int32)),
        of_steps(progress[here].astype(np.float32)),
    )
    return batch, of_steps(active[here])
