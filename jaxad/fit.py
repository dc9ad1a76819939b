"""The driver: the only place with epochs, loops over data, checkpoints and progress.

Images are decoded in batches, embedded once, and learned from in chunks of steps: one `lax.scan` a chunk, with
progress, a look at the loss and, where wanted, a checkpoint between two chunks.
"""

import functools
import math
import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxad.base import Batch, EmbedFn, Frozen, Key, Method, PyTree, Scores, Stage, State
from jaxad.data import Dataset

Progress = Callable[[str, int, int], None]
"""(what, images done, images in all), called after every batch; images in all is 0 where there is nothing to count."""

CHUNK = 8
"""Steps of one `lax.scan`."""
CACHE_BYTES = 4 << 30
"""Embedded images kept in host memory at most; beyond, they are computed anew."""


class NonFiniteLoss(ValueError):
    """The loss became NaN or infinite."""


class Fitted(NamedTuple):
    """What `fit` returns."""

    state: State
    compile_seconds: float
    run_seconds: float
    metrics: dict[str, np.ndarray]
    """The diagnostics of the last stage that has any, one entry a step since the run (re)started."""


class Program:
    """A jitted function that compiles ahead of time, so that compile time is told apart from run time."""

    def __init__(self, fn: Callable, **options: Any) -> None:
        self._jit = jax.jit(fn, **options)
        self._executables: dict[Hashable, Callable] = {}
        self.compile_seconds = 0.0

    def __call__(self, *args: PyTree) -> Any:
        """The function's result; compiles where the arguments have new shapes or types."""
        leaves, tree = jax.tree.flatten(args)
        kinds = ((jnp.shape(leaf), jnp.result_type(leaf), bool(getattr(leaf, "weak_type", False))) for leaf in leaves)
        key = (tree, tuple(kinds))
        if key not in self._executables:
            started = time.perf_counter()
            self._executables[key] = self._jit.lower(*args).compile()
            self.compile_seconds += time.perf_counter() - started
        return self._executables[key](*args)


class _Programs(NamedTuple):
    updates: tuple[Program, ...]
    finalizes: tuple[Program, ...]
    score: Program


@functools.lru_cache(maxsize=64)
def _embed_program(embed: EmbedFn) -> Program:
    return Program(embed)


@functools.lru_cache(maxsize=64)
def _programs(method: Method) -> _Programs:
    def scan_updates(stage: Stage) -> Callable:
        def run(state: State, frozen: Frozen, key: Key, first: jax.Array, batches: Batch):
            steps = first + jnp.arange(batches.valid.shape[0])

            def body(state: State, step_and_batch):
                step, batch = step_and_batch
                return stage.update(jax.random.fold_in(key, step), state, frozen, batch)

            return jax.lax.scan(body, state, (steps, batches))

        return run

    return _Programs(
        tuple(Program(scan_updates(stage), donate_argnums=0) for stage in method.stages),
        tuple(Program(lambda key, state, frozen, f=stage.finalize: f(key, state, frozen)) for stage in method.stages),
        Program(method.score),
    )


class Embedding:
    """The embedded images of one data set, computed on demand and kept where they fit into `CACHE_BYTES`.

    One instance serves all stages and epochs of a fit, and all methods whose `embed` is the same function.
    """

    def __init__(self, embed: EmbedFn, frozen: Frozen, data: Dataset, batch_size: int, keep: bool) -> None:
        self._program, self._frozen, self._data, self._batch_size = _embed_program(embed), frozen, data, batch_size
        image = jax.ShapeDtypeStruct((len(data), *data.image_size, 3), jnp.uint8)
        self.spec = jax.eval_shape(embed, frozen, image)
        bytes_needed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.spec))
        self._kept: PyTree | None = None
        self._done = np.zeros(len(data), bool)
        if keep and bytes_needed <= CACHE_BYTES:
            self._kept = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), self.spec)

    def batches(self, order: np.ndarray) -> Iterator[tuple[np.ndarray, PyTree]]:
        """Yields (indices, x) batch by batch; the last batch may be short, its `x` is padded by repetition.

        The next batch is decoded while the current one is worked on.
        """
        parts = [order[i : i + self._batch_size] for i in range(0, len(order), self._batch_size)]
        with ThreadPoolExecutor(1) as decoder:
            pending = decoder.submit(self._images, parts[0])
            for i, part in enumerate(parts):
                images = pending.result()
                if i + 1 < len(parts):
                    pending = decoder.submit(self._images, parts[i + 1])
                padded = np.resize(part, self._batch_size)
                if images is None:
                    yield part, jax.tree.map(lambda kept, rows=padded: jnp.asarray(kept[rows]), self._kept)
                    continue
                x = self._program(self._frozen, jnp.asarray(images[np.resize(np.arange(len(part)), self._batch_size)]))
                if self._kept is not None:
                    for kept, leaf in zip(jax.tree.leaves(self._kept), jax.tree.leaves(x), strict=True):
                        kept[part] = np.asarray(leaf)[: len(part)]
                    self._done[part] = True
                yield part, x

    def _images(self, part: np.ndarray) -> np.ndarray | None:
        return None if self._done[part].all() else self._data.images(part)


EmbeddingCache = dict[Hashable, Embedding]
"""Give the same dictionary to several calls of `fit` and `score` to compute shared features once."""


def embedding(
    method: Method, frozen: Frozen, data: Dataset, batch_size: int, cache: EmbeddingCache | None, keep: bool
) -> Embedding:
    """The embedding of a data set, from the cache where it is there."""
    if cache is None:
        return Embedding(method.embed, frozen, data, batch_size, keep)
    images = tuple(map(id, data.records))  # subsets of one data set share their records
    key = (method.embed, id(frozen), images, data.preprocess, batch_size)
    if key not in cache:
        cache[key] = Embedding(method.embed, frozen, data, batch_size, True)
    return cache[key]


def fit(
    method: Method,
    frozen: Frozen,
    data: Dataset,
    key: Key,
    *,
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
        batch_size: Images at a time, where the stage does not ask for its own number.
        cache: Embedded images shared between calls.
        checkpoint_dir: Where progress is kept so that a killed run, called again with the same arguments, resumes;
            delete it to start afresh.
        checkpoint_seconds: Least time between two checkpoints.
        progress: Called after every batch.

    Raises:
        ValueError: There are no images, or the checkpoint is damaged or of another fit.
        NonFiniteLoss: The loss became NaN or infinite; names stage, epoch and step.
    """
    if len(data) == 0:
        raise ValueError("fitting needs at least one normal image, got none")
    started = time.perf_counter()
    programs = _programs(method)
    several = sum(stage.epochs for stage in method.stages) > 1
    embedded = embedding(method, frozen, data, batch_size, cache, several)
    before = compile_seconds(method)
    init = Program(lambda key, frozen: method.init(key, frozen, embedded.spec))
    identity = {
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "images": len(data),
        "batch_size": batch_size,
        "stages": [stage.name for stage in method.stages],
    }
    diagnostics: dict[str, np.ndarray] = {}
    with _Saver(checkpoint_dir, checkpoint_seconds, identity) as saver:
        restored = saver.restore(lambda stage: abstract_state(method, frozen, embedded.spec, stage))
        first_stage, done, state = restored or (0, 0, init(jax.random.fold_in(key, 0), frozen))
        for s, stage in enumerate(method.stages):
            if s < first_stage:
                continue
            stage_key = jax.random.fold_in(key, s + 1)
            first_step = done if s == first_stage else 0
            collected: list[dict[str, np.ndarray]] = []
            tick = _ticker(progress, stage, len(data), batch_size)
            for step, chunk in _chunks(stage, embedded, data, stage_key, batch_size, first_step, tick):
                result = programs.updates[s](state, frozen, stage_key, jnp.int32(step), chunk)
                state, metrics = jax.block_until_ready(result)  # else chunks pile up in memory ahead of the device
                metrics = jax.tree.map(np.asarray, metrics)
                _check_loss(metrics, stage, step, _steps_per_epoch(stage, len(data), batch_size))
                collected.append(metrics)
                saver.save(s, step + chunk.valid.shape[0], state)
            if progress:
                progress(f"finish {stage.name}", 0, 0)
            state = programs.finalizes[s](jax.random.fold_in(stage_key, 1 << 30), state, frozen)
            jax.block_until_ready(state)
            saver.save(s + 1, 0, state)
            if collected and collected[0]:
                diagnostics = {k: np.concatenate([m[k] for m in collected]) for k in collected[0]}
    compiled = compile_seconds(method) - before + init.compile_seconds
    return Fitted(state, compiled, time.perf_counter() - started - compiled, diagnostics)


def score(
    method: Method,
    state: State,
    frozen: Frozen,
    data: Dataset,
    *,
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
    if len(data) == 0:
        return
    program = _programs(method).score
    embedded = embedding(method, frozen, data, batch_size, cache, False)
    done = 0
    if progress:
        progress("score", 0, len(data))
    for part, x in embedded.batches(np.arange(len(data))):
        scores = jax.tree.map(lambda leaf, n=len(part): np.asarray(leaf)[:n], program(state, frozen, x))
        for values in (scores.image, scores.image if scores.pixel is None else scores.pixel):
            finite = np.isfinite(values)
            if not finite.all():
                i = int(np.argmin(finite.reshape(len(part), -1).all(1)))
                bad = values[i][~finite[i]].flat[0]
                raise ValueError(f"scores must be finite, got {bad} for {data.paths[part[i]]}: the model is degenerate")
        done += len(part)
        if progress:
            progress("score", done, len(data))
        yield part, scores


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


def compile_seconds(method: Method) -> float:
    """Seconds spent so far on compiling a method and its `embed`, which other methods may share."""
    programs = _programs(method)
    compiled = (*programs.updates, *programs.finalizes, programs.score, _embed_program(method.embed))
    return sum(program.compile_seconds for program in compiled)


def _steps_per_epoch(stage: Stage, n: int, batch_size: int) -> int:
    size = stage.batch_size or batch_size
    return max(1, n // min(size, n)) if stage.shuffle else math.ceil(n / size)


def _ticker(progress: Progress | None, stage: Stage, n: int, batch_size: int) -> Callable[[int, Batch], None] | None:
    """What `_chunks` calls with the steps done and the last batch, which is waited for."""
    if progress is None:
        return None
    steps, images = _steps_per_epoch(stage, n, batch_size) * stage.epochs, n * stage.epochs

    def tick(done: int, batch: Batch) -> None:
        jax.block_until_ready(batch)
        progress(stage.name, round(images * done / steps), images)

    progress(stage.name, 0, images)
    return tick


def _chunks(
    stage: Stage,
    embedded: Embedding,
    data: Dataset,
    key: Key,
    batch_size: int,
    first_step: int,
    tick: Callable[[int, Batch], None] | None,
) -> Iterator[tuple[int, Batch]]:
    """Stacked batches of up to `CHUNK` steps, from `first_step` on, which begins a chunk."""
    n = len(data)
    size = min(stage.batch_size or batch_size, n) if stage.shuffle else stage.batch_size or batch_size
    steps = _steps_per_epoch(stage, n, batch_size)
    for epoch in range(stage.epochs):
        if (epoch + 1) * steps <= first_step:
            continue
        order = np.arange(n)
        if stage.shuffle:
            order = np.asarray(jax.random.permutation(jax.random.fold_in(key, (1 << 29) + epoch), n))[: steps * size]
        begin = max(0, first_step - epoch * steps)
        rows = _rows(embedded.batches(order[begin * size :]), size)
        for start in range(begin, steps, CHUNK):
            batches = []
            for step in range(start, min(start + CHUNK, steps)):
                batches.append(_batch(data, *next(rows), size))
                if tick:
                    tick(epoch * steps + step + 1, batches[-1])
            yield epoch * steps + start, jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)


def _rows(batches: Iterator[tuple[np.ndarray, PyTree]], size: int) -> Iterator[tuple[np.ndarray, PyTree]]:
    """Cuts the embedding's batches anew into `size` rows; the last may have fewer indices but is padded as well."""
    indices, x = np.empty(0, int), None
    for part, more in batches:
        real = jax.tree.map(lambda leaf, n=len(part): leaf[:n], more)
        indices = np.concatenate([indices, part])
        x = real if x is None else jax.tree.map(lambda a, b: jnp.concatenate([a, b]), x, real)
        while len(indices) >= size:
            yield indices[:size], jax.tree.map(lambda leaf: leaf[:size], x)
            indices = indices[size:]
            x = jax.tree.map(lambda leaf: leaf[size:], x) if len(indices) else None
    if len(indices):
        repeat = np.resize(np.arange(len(indices)), size)
        yield indices, jax.tree.map(lambda leaf: leaf[repeat], x)


def _batch(data: Dataset, indices: np.ndarray, x: PyTree, size: int) -> Batch:
    padded = np.resize(indices, size)
    masks = data.masks(padded) if data.has_masks and data.split == "train" else None
    return Batch(
        x,
        jnp.arange(size) < len(indices),
        jnp.asarray(data.labels[padded], jnp.int32),
        None if masks is None else jnp.asarray(masks),
        jnp.asarray(padded, jnp.int32),
    )


def _check_loss(metrics: dict[str, np.ndarray], stage: Stage, step: int, steps_per_epoch: int) -> None:
    loss = metrics.get("loss")
    if loss is None or np.isfinite(loss).all():
        return
    bad = step + int(np.argmin(np.isfinite(loss)))
    raise NonFiniteLoss(
        f"the loss must stay finite, got {loss[bad - step]} in stage {stage.name}, epoch {bad // steps_per_epoch + 1}, "
        f"step {bad + 1}: lower the learning rate or look for broken images"
    )


class _Saver:
    """Keeps the newest checkpoint of a fit in a directory; does nothing without one."""

    STRIDE = 1 << 32
    """Orbax numbers checkpoints by one integer: stage * STRIDE + step."""

    def __init__(self, directory: str | Path | None, seconds: float, identity: dict[str, Any]) -> None:
        self._directory = None if directory is None else Path(directory).absolute()
        self._seconds, self._identity, self._saved = seconds, identity, time.monotonic()

    def __enter__(self) -> "_Saver":
        if self._directory is not None:
            policy = ocp.training.preservation_policies.LatestN(1)
            self._checkpoints = ocp.training.Checkpointer(
                str(self._directory),
                preservation_policy=policy,  # pyright: ignore[reportArgumentType] (orbax's own types disagree)
                cleanup_tmp_directories=True,
            )
        return self

    def __exit__(self, *error: object) -> None:
        if self._directory is not None:
            self._checkpoints.close()

    def restore(self, abstract: Callable[[int], State]) -> tuple[int, int, State] | None:
        """The stage, step and state to go on from, if any; `abstract` gives the type of the state of a stage."""
        latest = None if self._directory is None else self._checkpoints.latest
        if latest is None:
            return None
        stage, step = divmod(latest.step, self.STRIDE)
        again = f"delete {self._directory} to start afresh"
        try:
            identity = self._checkpoints.metadata(latest.step).custom_metadata
        except (LookupError, OSError, ValueError) as error:
            raise ValueError(f"the checkpoint {latest.path} is damaged: {again}") from error
        if identity != self._identity:
            raise ValueError(f"a checkpoint must be of the same fit {self._identity}, got one of {identity}: {again}")
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), abstract(stage))
        try:
            return stage, step, self._checkpoints.load(latest.step, target)
        except (LookupError, OSError, ValueError) as error:
            raise ValueError(f"the checkpoint {latest.path} is damaged or of another method: {again}") from error

    def save(self, stage: int, step: int, state: State) -> None:
        """Saves, unless the last save was a moment ago."""
        if self._directory is None or time.monotonic() - self._saved < self._seconds:
            return
        self._checkpoints.save(stage * self.STRIDE + step, state, custom_metadata=self._identity)
        self._saved = time.monotonic()
