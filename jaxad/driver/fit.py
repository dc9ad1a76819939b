"""The driver: the only place with epochs, loops over data, classes, meshes and progress.

Images are decoded in batches, embedded once, and learned from in chunks of steps: one `lax.scan` a chunk. While the
device is at one, the host looks at the loss of the one before, tells the progress and prepares the next; only a
checkpoint, where wanted, waits between two. Several classes are one more axis of every array.
"""

import collections
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxad.base import Batch, Frozen, Key, Method, Metrics, PyTree, Scores, Stage, State
from jaxad.data import Dataset
from jaxad.driver.checkpoint import Saver
from jaxad.driver.embedding import Block, EmbeddingCache, Reader, embeddings, place
from jaxad.driver.mesh import Layout, fetch
from jaxad.driver.program import Program, compile_seconds

Progress = Callable[[str, int, int], None]
"""(what, images done, images in all), called after every batch; images in all is 0 where there is nothing to count."""

CHUNK = 8
"""Steps of one `lax.scan`, in stages that see images more than once; a CPU takes them one by one."""


def chunk() -> int:
    """How many steps one call of a compiled program takes."""
    return 1 if jax.default_backend() == "cpu" else CHUNK


def ahead(layout: Layout) -> int:
    """How many chunks the device still has when the host looks; on meshes of CPUs, whose collectives mix, none."""
    return 0 if jax.default_backend() == "cpu" and layout.mesh is not None else 1


class NonFiniteLoss(ValueError):
    """The loss became NaN or infinite."""


class Fitted(NamedTuple):
    """What `fit` and `fit_classes` return."""

    state: State
    """Of `fit_classes` with a leading axis of classes."""
    compile_seconds: float
    run_seconds: float
    metrics: dict[str, np.ndarray]
    """The diagnostics of the last stage that has any, one entry a step since the run (re)started; of `fit_classes`
    (class, step), NaN where a class has no step left."""


class _Programs(NamedTuple):
    updates: tuple[Program, ...]
    finalizes: tuple[Program, ...]


@functools.lru_cache(maxsize=64)
def _programs(method: Method, layout: Layout) -> _Programs:
    def scan_updates(stage: Stage) -> Callable:
        def run(state: State, key: Key, active: jax.Array, batches: Batch, frozen: Frozen, steps: jax.Array):
            def body(state: State, given: tuple[jax.Array, jax.Array, Batch]):
                step, counts, batch = given
                new, metrics = stage.update(jax.random.fold_in(key, step), state, frozen, batch)
                if layout.stacked and stage.shuffle:  # a class of fewer images has fewer steps
                    new = jax.tree.map(lambda a, b: jnp.where(counts, a, b), new, state)
                return new, metrics

            alone = steps.shape[0] == 1  # unrolled, since XLA's convolutions on a CPU are far slower in loops
            return jax.lax.scan(body, state, (steps, active, batches), unroll=2 if alone else 1)

        return layout.over_classes(run, (0, 0, 0, 0, None, None))

    def shardings(out: tuple[State, dict]) -> Any:
        return layout.state(out[0]), jax.tree.map(lambda _: layout.replicated(), out[1])

    return _Programs(
        tuple(
            Program(scan_updates(stage), active=layout.active, shardings=shardings, donate_argnums=0)
            for stage in method.stages
        ),
        tuple(_state_program(stage.finalize, (0, 0, None), layout) for stage in method.stages),
    )


def _state_program(fn: Callable, in_axes: tuple[int | None, ...], layout: Layout) -> Program:
    """A program whose result is a state."""
    return Program(layout.over_classes(fn, in_axes), active=layout.active, shardings=layout.state)


@functools.lru_cache(maxsize=64)
def _init_program(method: Method, layout: Layout, room: int, image_size: tuple[int, int]) -> Program:
    """Makes the empty state for `room` images (of each class)."""

    def init(key: Key, frozen: Frozen) -> State:
        return method.init(key, frozen, _spec(method, frozen, room, image_size))

    return _state_program(init, (0, None), layout)


def _spec(method: Method, frozen: Frozen, room: int, image_size: tuple[int, int]) -> PyTree:
    """Shapes and types of so many embedded images."""
    return jax.eval_shape(method.embed, frozen, jax.ShapeDtypeStruct((room, *image_size, 3), jnp.uint8))


@functools.lru_cache(maxsize=64)
def _score_program(method: Method, layout: Layout, classes_per_step: int | None) -> Program:
    def shardings(out: Scores) -> Any:
        lead = int(layout.stacked)
        return jax.tree.map(lambda leaf: layout.named(layout.rows(leaf.shape[lead])), out)

    def run(state: State, frozen: Frozen, x: PyTree) -> Scores:
        return method.score(state, frozen, jax.tree.map(lambda leaf: leaf[0], x))  # one step

    return Program(layout.over_classes(run, (0, None, 0), classes_per_step), active=layout.active, shardings=shardings)


def fit(
    method: Method,
    frozen: Frozen,
    data: Dataset,
    key: Key,
    *,
    mesh: Mesh | None = None,
    batch_size: int = 16,
    cache: EmbeddingCache | None = None,
    checkpoint_dir: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    progress: Progress | None = None,
) -> Fitted:
    """Learns a method from a data set.

    Args:
        method: What a factory of `jaxad.methods` returned.
        frozen: Pretrained weights (`jaxad.backbones.load`), None for methods without.
        data: The training images.
        key: A JAX random key; the same key gives the same model.
        mesh: Of `make_mesh`; the images and large parts of the state are sharded over its axis "data". None: one
            device.
        batch_size: Images at a time, where the stage does not ask for its own number; on a mesh the next multiple of
            the devices along "data".
        cache: Embedded images shared between calls.
        checkpoint_dir: Where progress is kept so that a killed run, called again with the same arguments, resumes;
            delete it to start afresh.
        checkpoint_seconds: Least time between two checkpoints.
        progress: Called after every batch.

    Raises:
        ValueError: There are no images, or the checkpoint is damaged or of another fit.
        NonFiniteLoss: The loss became NaN or infinite; names stage, epoch and step.
    """
    options: dict[str, Any] = dict(cache=cache, checkpoint_seconds=checkpoint_seconds, progress=progress)
    return _fit(method, frozen, [data], key[None], Layout(mesh), batch_size, checkpoint_dir=checkpoint_dir, **options)


def fit_classes(
    method: Method,
    frozen: Frozen,
    datasets: Sequence[Dataset],
    key: Key,
    *,
    mesh: Mesh | None = None,
    classes_per_step: int | None = None,
    batch_size: int = 16,
    cache: EmbeddingCache | None = None,
    checkpoint_dir: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    progress: Progress | None = None,
) -> Fitted:
    """Learns a method from several data sets at once, in one program with an axis of classes.

    Every class comes out as `fit` would have it. Smaller ones are padded to the largest; `class_state` cuts one out.

    Args:
        method: As for `fit`, like what is not listed here.
        frozen: Shared by all classes.
        datasets: The training images of each class, of one size; one of them may stand there several times.
        key: One key for all classes, or one for each: the seeds of a sweep, say.
        mesh: Of `make_mesh`: classes are sharded over "class", and what belongs to a class over "data".
        classes_per_step: Classes that are in memory at the same time; the next ones follow in the same compiled
            programs. None: all.
        batch_size: Images of each class at a time.
        cache: As for `fit`.
        checkpoint_dir: As for `fit`.
        checkpoint_seconds: As for `fit`.
        progress: As for `fit`; counts the images of all classes.

    Raises:
        ValueError: As for `fit`; or there are no classes, sizes of images differ, or there are not as many keys.
        NonFiniteLoss: As for `fit`; names the class too.
    """
    n = len(datasets)
    keys = jnp.broadcast_to(key, (n,)) if key.ndim == 0 else key
    _check_images(datasets)
    sizes = sorted({data.image_size for data in datasets})
    if len(sizes) != 1 or keys.shape != (n,):
        raise ValueError(f"classes must have images of one size and a key each, got {n} with {sizes} and {keys.shape}")
    layout = Layout(mesh, True)
    together = _together(n, classes_per_step, layout)
    parts = []
    for first in range(0, n, together):
        chosen = np.minimum(np.arange(first, first + together), n - 1)  # a repeated class fills the last step up
        part = _fit(
            method,
            frozen,
            [datasets[i] for i in chosen],
            keys[chosen],
            layout,
            batch_size,
            room=max(map(len, datasets)),
            cache=cache,
            checkpoint_dir=None if checkpoint_dir is None else Path(checkpoint_dir) / f"classes_{first}",
            checkpoint_seconds=checkpoint_seconds,
            keep=together < n,
            progress=progress,
        )
        real = min(together, n - first)
        state = part.state if real == together else jax.tree.map(lambda leaf, real=real: leaf[:real], part.state)
        parts.append(part._replace(state=state, metrics={k: v[:real] for k, v in part.metrics.items()}))
    if len(parts) == 1:
        return parts[0]
    state = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(part.state for part in parts))
    steps = max((v.shape[1] for part in parts for v in part.metrics.values()), default=0)

    def padded(values: np.ndarray) -> np.ndarray:
        missing = steps - values.shape[1]
        return np.pad(values.astype(float), ((0, 0), (0, missing)), constant_values=np.nan) if missing else values

    metrics = {k: np.concatenate([padded(part.metrics[k]) for part in parts]) for k in parts[0].metrics}
    return Fitted(state, sum(p.compile_seconds for p in parts), sum(p.run_seconds for p in parts), metrics)


def _fit(
    method: Method,
    frozen: Frozen,
    datasets: Sequence[Dataset],
    keys: Key,
    layout: Layout,
    batch_size: int,
    *,
    room: int = 0,
    cache: EmbeddingCache | None,
    checkpoint_dir: str | Path | None,
    checkpoint_seconds: float,
    keep: bool = False,
    progress: Progress | None,
) -> Fitted:
    """One group of classes; `keep` saves the final state, too."""
    _check_images(datasets)
    started, compiled = time.perf_counter(), compile_seconds()
    several = sum(stage.epochs for stage in method.stages) > 1
    sources = embeddings(method.embed, frozen, datasets, layout, batch_size, cache, several)
    room = _multiple(max(room, *map(len, datasets)), layout.data_shards)
    spec = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((room, *leaf.shape[1:]), leaf.dtype), sources[0].spec)
    programs = _programs(method, layout)
    init = _init_program(method, layout, room, datasets[0].image_size)
    placed = place(frozen, layout)
    reader = Reader(method.embed, placed, sources, layout)
    identity = {
        "keys": np.asarray(jax.random.key_data(keys)).tolist(),
        "images": [len(data) for data in datasets],
        "room": room,
        "batch_size": batch_size,
        "stages": [stage.name for stage in method.stages],
    }

    def folded(keys: Key, number: int) -> Key:
        return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)

    def put_keys(keys: Key) -> Key:
        return layout.spread(keys if layout.stacked else keys[0])

    diagnostics: dict[str, np.ndarray] = {}
    # A loss that is not finite tells that the newest checkpoint is broken already: it needs the one before.
    kept = 2 if any(stage.shuffle for stage in method.stages) else 1
    with Saver(checkpoint_dir, checkpoint_seconds, identity, keep=kept) as saver:
        restored = saver.restore(
            lambda stage: layout.abstract(abstract_state(method, frozen, spec, stage), len(datasets))
        )
        first_stage, done, state = restored or (0, 0, init(put_keys(folded(keys, 0)), placed.everywhere))
        for s, stage in enumerate(method.stages):
            if s < first_stage:
                continue
            stage_keys = folded(keys, s + 1)
            key = put_keys(stage_keys)
            schedule = _Schedule(stage, [len(data) for data in datasets], stage_keys, batch_size, layout.data_shards)
            chunks = _Chunks(stage, schedule, datasets, progress, functools.partial(saver.forget, s))
            first = done if s == first_stage else 0
            if progress:
                progress(stage.name, schedule.seen(first), schedule.images)
            for step, block, x in reader.read(range(first, schedule.total, schedule.chunk), schedule.block):
                steps = np.arange(step, step + block.index.shape[1], dtype=np.int32)
                active = steps < schedule.steps[:, None]
                progressed = steps / schedule.steps[:, None]
                batches, active_here = _batches(datasets, block, x, active, progressed, layout)
                state, metrics = programs.updates[s](state, key, active_here, batches, placed.everywhere, steps)
                if not metrics:  # nothing else tells when it is done, and chunks pile up in memory
                    jax.block_until_ready(state)
                chunks.sent.append((steps, active, metrics))
                due = saver.due()
                chunks.look(0 if due else ahead(layout))
                if due:
                    saver.save(s, int(steps[-1]) + 1, state)
            chunks.look(0)
            if progress:
                progress(f"finish {stage.name}", 0, 0)
            state = programs.finalizes[s](put_keys(folded(stage_keys, 1 << 30)), state, placed.everywhere)
            jax.block_until_ready(state)
            if saver.due(keep and s + 1 == len(method.stages)):
                saver.save(s + 1, 0, state)
            if chunks.metrics and chunks.metrics[0]:
                joined = {k: np.concatenate([m[k] for m in chunks.metrics], 1) for k in chunks.metrics[0]}
                diagnostics = joined if layout.stacked else {k: v[0] for k, v in joined.items()}
    compiled = compile_seconds() - compiled
    return Fitted(state, compiled, time.perf_counter() - started - compiled, diagnostics)


def score(
    method: Method,
    state: State,
    frozen: Frozen,
    data: Dataset,
    *,
    mesh: Mesh | None = None,
    batch_size: int = 16,
    cache: EmbeddingCache | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[np.ndarray, Scores]]:
    """Scores a data set batch by batch, in order; memory does not grow with the number of images.

    Yields:
        Indices into the data set and the scores of these images, as numpy arrays.

    Raises:
        ValueError: A score is not finite; names the image.
    """
    options: dict[str, Any] = dict(batch_size=batch_size, cache=cache, progress=progress)
    for _, part, scores in _score(method, state, frozen, [data], Layout(mesh), None, **options):
        yield part, scores


def score_classes(
    method: Method,
    state: State,
    frozen: Frozen,
    datasets: Sequence[Dataset],
    *,
    mesh: Mesh | None = None,
    classes_per_step: int | None = None,
    batch_size: int = 16,
    cache: EmbeddingCache | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[int, np.ndarray, Scores]]:
    """Scores the data sets of all classes at once with the state that `fit_classes` returned for them.

    Args:
        method: As for `fit_classes`, like what is not listed here.
        state: With a leading axis of classes.
        frozen: Shared by all classes.
        datasets: One for each class, which may be empty.
        mesh: As for `fit_classes`.
        classes_per_step: Classes that are computed at the same time (on each device); None: all.
        batch_size: Images of each class at a time.
        cache: Embedded images shared between calls.
        progress: Counts the images of all classes.

    Yields:
        The number of a class, indices into its data set, and the scores of these images, as numpy arrays.

    Raises:
        ValueError: A score is not finite; names the image.
    """
    layout = Layout(mesh, True)
    options: dict[str, Any] = dict(batch_size=batch_size, cache=cache, progress=progress)
    yield from _score(method, state, frozen, datasets, layout, classes_per_step, **options)


def _score(
    method: Method,
    state: State,
    frozen: Frozen,
    datasets: Sequence[Dataset],
    layout: Layout,
    classes_per_step: int | None,
    *,
    batch_size: int,
    cache: EmbeddingCache | None,
    progress: Progress | None,
) -> Iterator[tuple[int, np.ndarray, Scores]]:
    n = np.array([len(data) for data in datasets])
    if not n.any():
        return
    padding = -len(datasets) % layout.class_shards
    spread = [*range(len(datasets)), *[len(datasets) - 1] * padding]
    stand_in = datasets[int(n.argmax())]  # what an empty class is padded with
    some = [datasets[i] if n[i] else stand_in for i in spread]
    n = np.array([n[i] for i in spread])
    if padding:
        state = jax.tree.map(lambda leaf: leaf[np.asarray(spread)], state)
    state = layout.spread(state)
    placed = place(frozen, layout)
    sources = embeddings(method.embed, frozen, some, layout, batch_size, cache, False)
    program = _score_program(method, layout, classes_per_step)
    size = _multiple(batch_size, layout.data_shards)

    def block(first: int) -> Block:
        rows = np.arange(first, first + size)
        valid = rows < n[:, None]
        index = np.stack([np.resize(rows[v] if v.any() else 0, size) for v in valid])
        return Block(index[:, None], valid[:, None])

    total, done = int(n[: len(datasets)].sum()), 0
    if progress:
        progress("score", 0, total)
    reader = Reader(method.embed, placed, sources, layout)
    for _, (index, valid), x in reader.read(range(0, int(n.max()), size), block):
        found = fetch(program(state, placed.everywhere, x))
        for c, data in enumerate(datasets):
            part = index[c, 0, valid[c, 0]]
            if not part.size:
                continue
            scores = jax.tree.map(lambda leaf, c=c, n=part.size: (leaf[c] if layout.stacked else leaf)[:n], found)
            _check_scores(scores, data, part)
            done += part.size
            if progress:
                progress("score", done, total)
            yield c, part, scores


def score_all(method: Method, state: State, frozen: Frozen, data: Dataset, **options: Any) -> Scores:
    """The scores of a whole data set at once; arguments as for `score`."""
    parts = [scores for _, scores in score(method, state, frozen, data, **options)]
    if not parts:
        raise ValueError("scoring needs at least one image, got none")
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def abstract_state(method: Method, frozen: Frozen, spec: PyTree, stage: int | None = None) -> State:
    """Shapes and types of the state as a stage begins, or of the fitted model (`stage` None); nothing is computed."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda k, f: method.init(k, f, spec), key, frozen)
    for done in method.stages[:stage]:
        state = jax.eval_shape(done.finalize, key, state, frozen)
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
    own = abstract_state(method, frozen, _spec(method, frozen, len(data), data.image_size))

    def cut(wanted: Any, leaf: Any) -> Any:
        return None if wanted is None else leaf[(index, *map(slice, wanted.shape))]

    return jax.tree.map(cut, own, state, is_leaf=lambda leaf: leaf is None)


def _together(classes: int, classes_per_step: int | None, layout: Layout) -> int:
    """Classes in one group, which are fitted at the same time."""
    return _multiple(min(classes_per_step or classes, classes), layout.class_shards)


def _check_images(datasets: Sequence[Dataset]) -> None:
    for data in datasets:
        if len(data) == 0:
            raise ValueError(f"fitting needs at least one normal image, got none of {data.category}")


def _multiple(n: int, of: int) -> int:
    """The next multiple."""
    return -(-n // of) * of


class _Schedule:
    """Which images a stage sees when: full shuffled batches, or all of them in order."""

    def __init__(self, stage: Stage, n: Sequence[int], keys: Key, batch_size: int, shards: int) -> None:
        self._stage, self._keys = stage, keys
        self._images = [np.asarray(stage.rows(k)) for k in n]
        n = [len(images) for images in self._images]
        size = stage.batch_size or batch_size
        self._size = size if stage.shuffle else _multiple(size, shards)
        per_epoch = [max(1, k // size) if stage.shuffle else math.ceil(k / self._size) for k in n]
        self.steps_per_epoch = np.array(per_epoch)
        self.steps = self.steps_per_epoch * stage.epochs
        self.total = int(self.steps.max())
        self.images = sum(n) * stage.epochs
        self.chunk = chunk() if stage.epochs > 1 else 1
        self._order = functools.lru_cache(2 * len(n))(self._draw)

    def seen(self, steps: int) -> int:
        """Images seen after so many steps, about."""
        return round(self.images * steps / self.total)

    def block(self, step: int) -> Block:
        """The images of the chunk that begins with that step."""
        steps = range(step, min(step + self.chunk, self.total))
        parts = [[self._rows(c, min(t, last - 1)) for t in steps] for c, last in enumerate(self.steps.tolist())]
        index = np.stack([np.stack([np.resize(rows, self._size) for rows in part]) for part in parts])
        real = np.array([[len(rows) for rows in part] for part in parts])
        active = np.arange(steps.start, steps.stop) < self.steps[:, None]
        return Block(index, (np.arange(self._size) < real[..., None]) & active[..., None])

    def _rows(self, c: int, step: int) -> np.ndarray:
        epoch, step = divmod(step, int(self.steps_per_epoch[c]))
        return self._order(c, epoch)[step * self._size : (step + 1) * self._size]

    def _draw(self, c: int, epoch: int) -> np.ndarray:
        images = self._images[c]
        n = len(images)
        if not self._stage.shuffle:
            return images
        order = np.asarray(jax.random.permutation(jax.random.fold_in(self._keys[c], (1 << 29) + epoch), n))
        return images[np.resize(order, max(n, self._size))]  # fewer images than a batch come several times


class _Chunks:
    """The chunks of a stage: those that the device has, and what the others told.

    Args:
        stage: Of the method.
        schedule: Of the stage.
        datasets: Of the classes.
        progress: As for `fit`.
        forget: Called with a step whose state turns out to be broken.
    """

    def __init__(
        self,
        stage: Stage,
        schedule: _Schedule,
        datasets: Sequence[Dataset],
        progress: Progress | None,
        forget: Callable[[int], None],
    ) -> None:
        self._stage, self._schedule, self._datasets = stage, schedule, datasets
        self._progress, self._forget = progress, forget
        self.sent: collections.deque[tuple[np.ndarray, np.ndarray, Metrics]] = collections.deque()
        """Steps, which of them count for each class, and the metrics that the device will have."""
        self.metrics: list[dict[str, np.ndarray]] = []

    def look(self, most: int) -> None:
        """Waits until the device has no more chunks than that, and looks at the loss of the others."""
        while len(self.sent) > most:
            steps, active, metrics = self.sent.popleft()
            first, after = int(steps[0]), int(steps[-1]) + 1
            metrics = {k: np.asarray(v).reshape(active.shape) for k, v in metrics.items()}
            if "loss" in metrics and not np.isfinite(metrics["loss"][active[:, 0], 0]).all():
                self._forget(first)
            _check_loss(metrics, active, self._stage, first, self._schedule, self._datasets)
            self.metrics.append({k: v if active.all() else np.where(active, v, np.nan) for k, v in metrics.items()})
            if self._progress:
                self._progress(self._stage.name, self._schedule.seen(after), self._schedule.images)


def _batches(
    datasets: Sequence[Dataset], block: Block, x: PyTree, active: np.ndarray, progress: np.ndarray, layout: Layout
) -> tuple[Batch, jax.Array]:
    """The stacked batches of a block, and which of its steps count for each class; on the devices."""
    own, rows = layout.block(block.index.shape[0], block.index.shape[2])
    index, valid = (part[own, :, rows] for part in block)
    axis = layout.rows(block.index.shape[2])

    def put(local: np.ndarray, behind: tuple[int, ...] = (), *spec: str | None) -> jax.Array:
        shape = (*block.index.shape[: local.ndim - len(behind)], *behind)
        local, shape = (local, shape) if layout.stacked else (local[0], shape[1:])
        return layout.put(local, layout.named(*spec), shape)

    labels = np.stack([data.labels[i] for data, i in zip(datasets[own], index, strict=True)])
    masks = None
    if all(data.has_masks and data.split == "train" for data in datasets):
        read = [data.masks(i.ravel()) for data, i in zip(datasets[own], index, strict=True)]
        masks = np.stack(read)  # pyright: ignore[reportCallIssue, reportArgumentType] (they have masks)
        masks = masks.reshape(*index.shape, *masks.shape[2:])
    batch = Batch(
        x,
        put(valid, (), None, axis),
        put(labels.astype(np.int32), (), None, axis),
        None if masks is None else put(masks, masks.shape[3:], None, axis),
        put(index.astype(np.int32), (), None, axis),
        put(progress[own].astype(np.float32)),
    )
    return batch, put(active[own])


def _check_loss(
    metrics: dict[str, np.ndarray],
    active: np.ndarray,
    stage: Stage,
    step: int,
    schedule: _Schedule,
    datasets: Sequence[Dataset],
) -> None:
    loss = metrics.get("loss")
    if loss is None:
        return
    broken = ~np.isfinite(loss) & active
    if not broken.any():
        return
    c, offset = (int(i) for i in np.unravel_index(np.argmax(broken), broken.shape))
    bad, per_epoch = step + offset, int(schedule.steps_per_epoch[c])
    which = f" of {datasets[c].category}" if len(datasets) > 1 else ""
    raise NonFiniteLoss(
        f"the loss must stay finite, got {loss[c, offset]} in stage {stage.name}{which}, epoch {bad // per_epoch + 1}, "
        f"step {bad + 1}: lower the learning rate or look for broken images"
    )


def _check_scores(scores: Scores, data: Dataset, part: np.ndarray) -> None:
    values: Any
    for values in (scores.image, scores.image if scores.pixel is None else scores.pixel):
        finite = np.isfinite(values)
        if not finite.all():
            i = int(np.argmin(finite.reshape(len(part), -1).all(1)))
            bad = values[i][~finite[i]].flat[0]
            raise ValueError(f"scores must be finite, got {bad} for {data.paths[part[i]]}: the model is degenerate")
