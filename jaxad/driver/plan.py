"""How much memory a fit will take, before it starts: the driver's own programs, compiled for shapes alone.

What a program takes while it runs (its results and its temporaries) is what the compiler says
(`Compiled.memory_analysis`); what lies beside it (weights, state, images) follows from the way the driver works.
"""

import inspect
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import jaxad.driver.fit as driver
from jaxad.base import Batch, Frozen, Method, PyTree
from jaxad.data import Dataset
from jaxad.driver.embedding import EmbeddingCache, embed_program, embeddings
from jaxad.driver.memory import available
from jaxad.driver.mesh import Layout
from jaxad.driver.program import Program

EMBED = "embed for "
RECYCLED = 2 * (32 << 20)
"""A process keeps freed memory in blocks of up to 32 MiB (glibc's largest threshold) for itself: beside the arrays of a
CPU one to three of them lie idle."""


class Need(NamedTuple):
    """Bytes in use while one program of a fit runs: on each device, and in the memory of the host."""

    name: str
    weights: int
    state: int
    """What is learned: what the program reads, and beside it what it makes unless it writes into the same memory."""
    batch: int
    """Images, embedded images and scores."""
    temporaries: int
    host: int
    """Decoded images and kept embeddings; of this process, whatever the number of devices."""

    @property
    def device(self) -> int:
        """On each device."""
        return self.weights + self.state + self.batch + self.temporaries


class Plan(NamedTuple):
    """The memory of a fit, in bytes."""

    needs: tuple[Need, ...]
    """In the order in which the programs run."""
    model: int
    """The fitted state, on each device."""
    checkpoint: int
    """What the host takes besides while a checkpoint is written: the largest state, of all devices."""
    loaded: int
    """What is in memory already: weights that have been read, and kept embeddings."""
    classes: int
    """Classes at the same time."""
    devices: tuple[Any, ...]
    """Those of this process."""

    @property
    def shared(self) -> bool:
        """Whether the devices are processors, so that all of them and the host have one memory together."""
        return self.devices[0].platform == "cpu"

    def total(self, need: Need) -> int:
        """What must fit into one memory: that of a device, or where it is shared that of the machine."""
        return need.device * len(self.devices) + need.host if self.shared else need.device

    @property
    def peak(self) -> Need:
        """The program that needs most."""
        return max(self.needs, key=self.total)


def estimate(
    method: Method,
    frozen: Frozen,
    data: Dataset | Sequence[Dataset],
    *,
    mesh: Mesh | None = None,
    classes_per_step: int | None = None,
    batch_size: int = 16,
    cache: EmbeddingCache | None = None,
    scoring: bool = True,
) -> Plan:
    """The memory that `jaxad.fit.fit` or, for several data sets, `fit_classes` and scoring afterwards will take.

    Nothing is decoded or computed. The programs that are compiled for it are those of the fit, which finds them ready.
    On a mesh of virtual CPU devices the numbers are those of as many accelerators, but for what the compilers do
    differently: temporaries, and padding of arrays.

    Args:
        method: As for `fit`, like what is not listed here.
        frozen: Pretrained weights, or their `jax.ShapeDtypeStruct`s.
        data: The training images; only their number and size matter.
        mesh: As for `fit`.
        classes_per_step: As for `fit_classes`.
        batch_size: As for `fit`.
        cache: As for `fit`.
        scoring: Whether images are scored afterwards.

    Raises:
        ValueError: There are no images, or the method refuses them.
    """
    stacked = not isinstance(data, Dataset)
    datasets = list(data) if stacked else [data]
    driver._check_images(datasets)
    return _Estimate(method, frozen, datasets, Layout(mesh, stacked), classes_per_step, batch_size, cache).plan(scoring)


SMALLER = {
    "coreset_size": "a (smaller) --coreset-size",
    "coreset_sampling_ratio": "a lower --coreset-sampling-ratio",
    "n_features": "a smaller --n-features",
    "projection_dim": "a smaller --projection-dim",
    "layers": "fewer --layers",
}
"""Hyper-parameters that save memory, by the names that they have in all methods, and the advice."""


def shortage(plan: Plan, make: Callable[..., Method], given: Mapping[str, Any], precision: str) -> str | None:
    """What is missing for a fit and what would help; None if it fits, or if nothing tells how much memory there is.

    Args:
        plan: Of `estimate`.
        make: The method's factory, whose signature says what could be smaller.
        given: Hyper-parameters.
        precision: What the backbone computes in.
    """
    memory, need = available(plan.devices), plan.peak
    most = plan.total(need)
    if memory is None or most - plan.loaded <= memory.free:
        return None
    where = "" if plan.shared else " on each device"
    return (
        f'fitting needs {size(most)} of memory{where} at the step "{need.name}", {memory.what} has '
        f"{size(memory.free + plan.loaded)} for it: try {', '.join(_advice(plan, make, given, precision))}"
    )


def _advice(plan: Plan, make: Callable[..., Method], given: Mapping[str, Any], precision: str) -> Iterator[str]:
    need, names = plan.peak, dict.fromkeys(name for name in SMALLER if name in inspect.signature(make).parameters)
    if given.get("coreset_size") is not None:
        names.pop("coreset_sampling_ratio", None)  # which it replaces
    yield from map(SMALLER.__getitem__, names)
    if plan.classes > 1:
        yield "a smaller --classes-per-step"
    if not plan.shared:
        yield f"more --devices than {len(plan.devices)}"
    embedding = need.name.startswith(EMBED)
    if precision == "float32" and (embedding or 10 * need.weights > need.device):
        yield "--precision bfloat16"
    if embedding or 10 * need.batch > need.device:
        yield "a smaller --batch-size"
    yield "a smaller --image-size"


def size(n: float) -> str:
    """A number of bytes to read: 1.23 GB, 45.6 MB."""
    unit, name = next(step for step in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (0, "B")) if n >= step[0])
    value = n / (unit or 1)
    decimals = 0 if value >= 100 or not unit else 1 if value >= 10 else 2
    return f"{value:.{decimals}f} {name}" if n else "0"


class _Estimate:
    """Lets the programs of a fit pass in their order, on arrays that have a shape only."""

    def __init__(
        self,
        method: Method,
        frozen: Frozen,
        datasets: Sequence[Dataset],
        layout: Layout,
        classes_per_step: int | None,
        batch_size: int,
        cache: EmbeddingCache | None,
    ) -> None:
        self._method, self._layout, self._datasets = method, layout, datasets
        self._classes_per_step, self._batch_size = classes_per_step, batch_size
        self._frozen = _placed(frozen, layout.replicated())
        self._frozen_local = _placed(frozen, layout.local().replicated())
        self._loaded = _bytes(self._frozen) * any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(frozen))
        mesh = layout.local().mesh
        self._devices = tuple(jax.devices()[:1] if mesh is None else mesh.devices.flat)
        self._size = datasets[0].image_size
        self._needs: list[Need] = []
        several = sum(stage.epochs for stage in method.stages) > 1
        found = embeddings(method.embed, frozen, datasets, layout, batch_size, cache, several)
        sources = {id(one): one for one in found}
        self._kept, filled = (sum(column) for column in zip(*(one.room for one in sources.values()), strict=True))
        self._kept_there = math.ceil(self._kept / layout.data_shards) if found[0].on_device else 0
        self._kept_here = 0 if found[0].on_device else self._kept
        self._loaded += filled
        height, width = datasets[0].original_size(0)
        self._decoding = (os.cpu_count() or 1) * 2 * 3 * height * width  # each thread: an image and what becomes of it

    def plan(self, scoring: bool) -> Plan:
        """Compiles whatever runs."""
        method, layout, datasets = self._method, self._layout, self._datasets
        together = driver._together(len(datasets), self._classes_per_step, layout)
        groups = math.ceil(len(datasets) / together)
        room = driver._multiple(max(map(len, datasets)), layout.data_shards)
        shape = (together,) if layout.stacked else ()
        key = jax.ShapeDtypeStruct(shape, jax.eval_shape(jax.random.key, 0).dtype, sharding=layout.named())
        state = self._run("start", driver._init_program(method, layout, room, self._size), key, self._frozen)
        largest = _whole(state)
        older, x_before = 0, 0  # the driver still holds the state before `finalize`, and the last embedded images
        for stage, update, finalize in zip(method.stages, *driver._programs(method, layout), strict=True):
            state, held = self._state(state), _bytes(self._state(state))
            keys = jax.random.key(0)[None]  # of the order of images, which is not looked at
            schedule = driver._Schedule(stage, list(map(len, datasets)), keys, self._batch_size, layout.data_shards)
            blocks = math.ceil(schedule.total / schedule.chunk)
            for steps in sorted({min(schedule.chunk, schedule.total), (schedule.total - 1) % schedule.chunk + 1}):
                cube = together, steps, schedule._size
                x = self._embed(f"{EMBED}{stage.name}", cube, blocks, held + older, x_before)
                again = 2 * _whole(x) if self._kept and stage.epochs > 1 else 0  # kept ones are looked up and stacked
                batch, counts = self._batch(x, cube)
                given = state, key, counts, batch, self._frozen, jax.ShapeDtypeStruct((steps,), jnp.int32)
                beside: dict[str, Any] = {"batch": _bytes(batch), "host": max(again, self._decoded(cube, blocks))}
                self._run(stage.name, update, *given, state=held + older, **beside)
                x_before = _bytes(x)
            name = f"finish {stage.name}"
            state = self._run(name, finalize, key, state, self._frozen, state=held, batch=x_before)
            largest, older = max(largest, _whole(state)), held
        model = _bytes(self._state(state))
        if groups > 1:  # the models of the groups before, and in the end all of them side by side
            self._needs = [need._replace(state=need.state + (groups - 1) * model) for need in self._needs]
            model *= groups
            held = 2 * model + self._kept_there
            self._needs.append(Need("join classes", _bytes(self._frozen), held, 0, 0, self._kept_here))
        if scoring:
            self._score(state, model)
        needs: dict[str, Need] = {}
        for need in self._needs:  # of chunks of two lengths the longer
            needs[need.name] = max(need, needs.get(need.name, need), key=lambda one: one.device)
        return Plan(tuple(needs.values()), model, largest, self._loaded, together, self._devices)

    def _score(self, state: PyTree, model: int) -> None:
        layout, n = self._layout, len(self._datasets)
        padding = -n % layout.class_shards if layout.stacked else 0
        lead = (n + padding,) if layout.stacked else ()
        state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape[len(lead) :]), leaf.dtype), state)
        cube = n + padding, 1, driver._multiple(self._batch_size, layout.data_shards)
        held = model + _bytes(self._state(state)) if padding else model
        x = self._embed(f"{EMBED}scoring", cube, 2, held)
        program = driver._score_program(self._method, layout, self._classes_per_step if layout.stacked else None)
        beside: dict[str, Any] = {"batch": _bytes(x), "host": self._decoded(cube, 2)}
        found = self._run("score", program, self._state(state), self._frozen, x, state=held, learns=False, **beside)
        self._needs[-1] = self._needs[-1]._replace(host=self._needs[-1].host + _whole(found))

    def _run(
        self,
        name: str,
        program: Program,
        *args: PyTree,
        state: int = 0,
        batch: int = 0,
        host: int = 0,
        learns: bool = True,
    ) -> PyTree:
        """Compiles a program and notes what is in memory while it runs, its arguments given in bytes; its result."""
        try:
            executable = program.compile(*args)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            what = f'the step "{name}" must fit into the memory of a device, the compiler says that it does not'
            raise ValueError(f"{what}: use more --devices, fewer --layers, a smaller --image-size") from error
        told = executable.memory_analysis()
        made = told.output_size_in_bytes - told.alias_size_in_bytes
        state, batch = (state + made, batch) if learns else (state, batch + made)
        weights, temporaries = _bytes(self._frozen), told.temp_size_in_bytes
        if self._devices[0].platform == "cpu":
            host += len(self._devices) * _scratch(executable.as_text()) + RECYCLED
        self._needs.append(Need(name, weights, state + self._kept_there, batch, temporaries, self._kept_here + host))
        return executable.out_info

    def _embed(self, name: str, cube: "Cube", blocks: int, state: int, before: int = 0) -> PyTree:
        """Embeds a block of images; the embedded images of the one before are still there."""
        layout, (classes, steps, rows) = self._layout, cube
        own, row = layout.block(classes, rows)
        shape = (own.stop - own.start, steps, row.stop - row.start, *self._size, 3)
        axis = layout.rows(rows)
        sharding = layout.local().named(None, axis)
        image = jax.ShapeDtypeStruct(shape if layout.stacked else shape[1:], jnp.uint8, sharding=sharding)
        program = embed_program(self._method.embed, layout, axis)
        beside: dict[str, Any] = {"batch": _bytes(image), "host": self._decoded(cube, blocks)}
        made = self._run(name, program, self._frozen_local, image, state=state, learns=False, **beside)
        lead = cube if layout.stacked else cube[1:]
        x = jax.tree.map(lambda leaf: self._put((*lead, *leaf.shape[len(lead) :]), leaf.dtype, None, axis), made)
        need = self._needs[-1]
        copied = _whole(x) if self._kept else 0
        before = max(before, _bytes(x) if blocks > 1 else 0)
        self._needs[-1] = need._replace(batch=need.batch + before, host=need.host + copied)
        return x

    def _decoded(self, cube: "Cube", blocks: int) -> int:
        """The block of images in work, the next one meanwhile (it is put together from parts), and what threads do."""
        own, row = self._layout.block(cube[0], cube[2])
        block = (own.stop - own.start) * cube[1] * (row.stop - row.start) * math.prod(self._size) * 3
        return (3 * block if blocks > 1 else block) + self._decoding

    def _batch(self, x: PyTree, cube: "Cube") -> tuple[Batch, PyTree]:
        """What `jaxad.fit` gives to `update`: the batch, and which steps count for which class."""
        axis, lead = self._layout.rows(cube[2]), cube if self._layout.stacked else cube[1:]
        masks = all(data.has_masks and data.split == "train" for data in self._datasets)
        valid, label, index = (self._put(lead, dtype, None, axis) for dtype in (bool, jnp.int32, jnp.int32))
        mask = self._put((*lead, *self._size), bool, None, axis) if masks else None
        return Batch(x, valid, label, mask, index, self._put(lead[:-1], jnp.float32)), self._put(lead[:-1], bool)

    def _put(self, shape: tuple[int, ...], dtype: Any, *spec: str | None) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._layout.named(*spec))

    def _state(self, state: PyTree) -> PyTree:
        return jax.tree.map(_as, state, self._layout.state(state))


Cube = tuple[int, int, int]
"""Classes, steps and images of a block."""


def _as(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf), sharding=sharding)


def _placed(frozen: Frozen, sharding: Any) -> Frozen:
    return jax.tree.map(lambda leaf: _as(leaf, sharding), frozen)


def _scratch(hlo: str) -> int:
    """What a CPU's convolutions take for themselves, which its compiler does not tell: their input twice, padded."""
    shapes = dict(re.findall(r"([\w.-]+)(?: =|:) f32\[([\d,]+)\]", hlo))
    inputs = [shapes.get(name, "0") for name in re.findall(r" convolution\(%([\w.-]+)", hlo)]
    return max((2 * 4 * math.prod(map(int, sizes.split(","))) for sizes in inputs), default=0)


def _bytes(tree: PyTree) -> int:
    """On each device."""
    return sum(math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize for s in jax.tree.leaves(tree))


def _whole(tree: PyTree) -> int:
    """Of all devices together, without copies."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
