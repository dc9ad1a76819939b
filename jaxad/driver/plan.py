"""The memory that a fit needs, before it starts: the driver's own programs, compiled for abstract arrays.

The results and temporaries of a program are what the compiler reports (`Compiled.memory_analysis`); what lies beside
them (weights, state, images) follows from the way the driver works.
"""

import inspect
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxad.base import Batch, Frozen, Method, PyTree
from jaxad.data import Dataset
from jaxad.driver.embedding import embed_program, embeddings
from jaxad.driver.execution import Execution
from jaxad.driver.fit import check_images, group_size
from jaxad.driver.memory import available
from jaxad.driver.mesh import Layout
from jaxad.driver.program import Program
from jaxad.driver.programs import fit_programs, score_program
from jaxad.driver.schedule import Schedule, next_multiple

EMBED = "embed for "
RECYCLED = 2 * (32 << 20)
"""Freed memory that glibc keeps for the process, in blocks of up to 32 MiB: on a CPU one to three of them lie idle."""


class Need(NamedTuple):
    """Bytes in use while one program of a fit runs: on each device, and in the memory of the host."""

    name: str
    weights: int
    state: int
    """What the program reads of the state and, unless it writes into the same memory, what it returns."""
    batch: int
    """Images, embedded images and scores."""
    temporaries: int
    host: int
    """Decoded images and cached embeddings; of this process, whatever the number of devices."""

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
    """What the host needs besides while a checkpoint is written: the largest state, of all devices."""
    loaded: int
    """What is in memory already: weights that have been read, and cached embeddings."""
    classes: int
    """Classes at the same time."""
    devices: tuple[Any, ...]
    """Those of this process."""

    @property
    def shared(self) -> bool:
        """Whether the devices are CPUs, so that they and the host share one memory."""
        return self.devices[0].platform == "cpu"

    def total(self, need: Need) -> int:
        """What must fit into one memory: that of a device, or of the machine where it is shared."""
        return need.device * len(self.devices) + need.host if self.shared else need.device

    @property
    def peak(self) -> Need:
        """The program that needs most."""
        return max(self.needs, key=self.total)


def estimate(
    method: Method,
    frozen: Frozen,
    datasets: Sequence[Dataset],
    execution: Execution = Execution(),
    *,
    auxiliary: Any = None,
    scoring: bool = True,
) -> Plan:
    """The memory that `fit_classes`, or for one data set `fit`, and scoring afterwards will take.

    Nothing is decoded or computed. The programs that are compiled for it are those of the fit, which finds them ready.
    On a mesh of virtual CPU devices the numbers are those of as many accelerators, except where the compilers differ:
    temporaries, and padding of arrays.

    Args:
        method: As for `fit_classes`.
        frozen: Pretrained weights, or their `jax.ShapeDtypeStruct`s.
        datasets: The training images; only their number and size matter.
        execution: As for `fit_classes`.
        auxiliary: Photographs, or their `jax.ShapeDtypeStruct`.
        scoring: Whether images are scored afterwards.

    Raises:
        ValueError: There are no images, or the method refuses them.
    """
    check_images(datasets)
    return _Estimate(method, frozen, datasets, execution, auxiliary).plan(scoring)


SMALLER = {
    "coreset_size": "a (smaller) --coreset-size",
    "coreset_sampling_ratio": "a lower --coreset-sampling-ratio",
    "n_features": "a smaller --n-features",
    "projection_dim": "a smaller --projection-dim",
    "layers": "fewer --layers",
}
"""Hyperparameters that save memory, by the names that they have in all methods, and the advice."""


def shortage(
    plan: Plan, factory: Callable[..., Method], hyperparameters: Mapping[str, Any], precision: str
) -> str | None:
    """Why a fit does not fit into memory, and what would help; None if it fits, or if the free memory is not known.

    Args:
        plan: Of `estimate`.
        factory: Of the method; its signature says what could be smaller.
        hyperparameters: Those that are set.
        precision: What the backbone computes in.
    """
    memory, need = available(plan.devices), plan.peak
    most = plan.total(need)
    if memory is None or most - plan.loaded <= memory.free:
        return None
    where = "" if plan.shared else " on each device"
    return (
        f'fitting needs {size(most)} of memory{where} at the step "{need.name}", {memory.owner} has '
        f"{size(memory.free + plan.loaded)} for it: try {', '.join(_advice(plan, factory, hyperparameters, precision))}"
    )


def _advice(
    plan: Plan, factory: Callable[..., Method], hyperparameters: Mapping[str, Any], precision: str
) -> Iterator[str]:
    need, names = plan.peak, dict.fromkeys(name for name in SMALLER if name in inspect.signature(factory).parameters)
    if hyperparameters.get("coreset_size") is not None:
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
    """Compiles the programs of a fit in their order, for abstract arrays."""

    def __init__(
        self, method: Method, frozen: Frozen, datasets: Sequence[Dataset], execution: Execution, auxiliary: Any
    ) -> None:
        layout = Layout(execution.mesh)
        self._method, self._layout, self._datasets, self._execution = method, layout, datasets, execution
        self._frozen = _placed(frozen, layout.replicated())
        self._auxiliary = _placed(auxiliary if method.auxiliary else None, layout.replicated())
        self._frozen_local = _placed(frozen, layout.local().replicated())
        self._weights = _bytes((self._frozen, self._auxiliary))
        loaded = (self._frozen, frozen), (self._auxiliary, auxiliary)
        self._loaded = sum(_bytes(there) for there, value in loaded if _is_loaded(value))
        mesh = layout.local().mesh
        self._devices = tuple(jax.devices()[:1] if mesh is None else mesh.devices.flat)
        self._size = datasets[0].image_size
        self._needs: list[Need] = []
        several = sum(stage.epochs for stage in method.stages) > 1
        sources = embeddings(method.embed, frozen, datasets, layout, execution.batch_size, execution.cache, several)
        distinct = {id(source): source for source in sources}
        self._cached, filled = (sum(column) for column in zip(*(s.room for s in distinct.values()), strict=True))
        self._cached_on_device = math.ceil(self._cached / layout.data_shards) if sources[0].on_device else 0
        self._cached_on_host = 0 if sources[0].on_device else self._cached
        self._loaded += filled
        height, width = datasets[0].original_size(0)
        self._decoding = (os.cpu_count() or 1) * 2 * 3 * height * width  # each thread: an image, original and resized

    def plan(self, scoring: bool) -> Plan:
        """Compiles all programs of the fit and, if wanted, of scoring."""
        method, layout, sizes = self._method, self._layout, list(map(len, self._datasets))
        classes = group_size(len(sizes), self._execution.classes_per_step, layout)
        groups = math.ceil(len(sizes) / classes)
        programs = fit_programs(method, layout, next_multiple(max(sizes), layout.data_shards), self._size)
        key = jax.ShapeDtypeStruct((classes,), jax.eval_shape(jax.random.key, 0).dtype, sharding=layout.named())
        state = self._run("start", programs.start, key, self._frozen)
        largest = _whole(state)
        older, x_before = 0, 0  # the driver still holds the state before `finish`, and the last embedded images
        for stage, update, finish in zip(method.stages, programs.updates, programs.finishes, strict=True):
            state = self._state(state)
            held = _bytes(state)
            keys = jax.random.key(0)[None]  # of the order of images, which does not matter here
            schedule = Schedule(stage, sizes, keys, self._execution.batch_size, layout.data_shards)
            blocks = math.ceil(schedule.total / schedule.chunk)
            for steps in sorted({min(schedule.chunk, schedule.total), (schedule.total - 1) % schedule.chunk + 1}):
                cube = classes, steps, schedule.batch_size
                x = self._embed(f"{EMBED}{stage.name}", cube, blocks, held + older, x_before)
                again = 2 * _whole(x) if self._cached and stage.epochs > 1 else 0  # looked up in the cache and stacked
                batch, counts = self._batch(x, cube)
                number = jax.ShapeDtypeStruct((steps,), jnp.int32)
                arguments = state, key, counts, batch, self._frozen, self._auxiliary, number
                beside: dict[str, Any] = {"batch": _bytes(batch), "host": max(again, self._decoded(cube, blocks))}
                self._run(stage.name, update, *arguments, state=held + older, **beside)
                x_before = _bytes(x)
            state = self._run(f"finish {stage.name}", finish, key, state, self._frozen, state=held, batch=x_before)
            largest, older = max(largest, _whole(state)), held
        model = _bytes(self._state(state))
        if groups > 1:  # the models of the groups before, and in the end all of them side by side
            self._needs = [need._replace(state=need.state + (groups - 1) * model) for need in self._needs]
            model *= groups
            held = 2 * model + self._cached_on_device
            self._needs.append(Need("join classes", self._weights, held, 0, 0, self._cached_on_host))
        if scoring:
            self._score(state, model)
        needs: dict[str, Need] = {}
        for need in self._needs:  # of chunks of two lengths the longer
            needs[need.name] = max(need, needs.get(need.name, need), key=lambda one: one.device)
        return Plan(tuple(needs.values()), model, largest, self._loaded, classes, self._devices)

    def _score(self, state: PyTree, model: int) -> None:
        layout, n = self._layout, len(self._datasets)
        padding = -n % layout.class_shards
        lead = () if n == 1 else (n + padding,)
        state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape[1:]), leaf.dtype), state)
        state = jax.tree.map(_as, state, layout.state(state, n > 1))
        cube = n + padding, 1, next_multiple(self._execution.batch_size, layout.data_shards)
        held = model + _bytes(state) if padding and n > 1 else model
        x = self._embed(f"{EMBED}scoring", cube, 2, held)
        ignored = []
        if any(data.ignores for data in self._datasets):
            ignored = [self._put((*cube, *self._size), bool, None, layout.rows(cube[2]))]
        classes_per_step = self._execution.classes_per_step if n > 1 else None
        program = score_program(self._method, layout, classes_per_step, n > 1, bool(ignored))
        beside: dict[str, Any] = {"batch": _bytes((x, ignored)), "host": self._decoded(cube, 2)}
        scores = self._run("score", program, state, self._frozen, x, *ignored, state=held, learns=False, **beside)
        self._needs[-1] = self._needs[-1]._replace(host=self._needs[-1].host + _whole(scores))

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
        """Compiles a program and notes what is in memory while it runs, its arguments in bytes; returns its result."""
        try:
            executable = program.compile(*args)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            what = f'the step "{name}" must fit into the memory of a device, but the compiler says that it does not'
            raise ValueError(f"{what}: use more --devices, fewer --layers, a smaller --image-size") from error
        memory = executable.memory_analysis()
        result = memory.output_size_in_bytes - memory.alias_size_in_bytes
        state, batch = (state + result, batch) if learns else (state, batch + result)
        temporaries = memory.temp_size_in_bytes
        if self._devices[0].platform == "cpu":
            host += len(self._devices) * _scratch(executable.as_text()) + RECYCLED
        state, host = state + self._cached_on_device, host + self._cached_on_host
        self._needs.append(Need(name, self._weights, state, batch, temporaries, host))
        return executable.out_info

    def _embed(self, name: str, cube: "Cube", blocks: int, state: int, before: int = 0) -> PyTree:
        """Embeds a block of images; the embedded images of the one before are still in memory."""
        layout, (classes, steps, rows) = self._layout, cube
        here, row = layout.block(classes, rows)
        shape = (here.stop - here.start, steps, row.stop - row.start, *self._size, 3)
        axis = layout.rows(rows)
        image = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=layout.local().named(None, axis))
        program = embed_program(self._method.embed, layout, axis)
        beside: dict[str, Any] = {"batch": _bytes(image), "host": self._decoded(cube, blocks)}
        local = self._run(name, program, self._frozen_local, image, state=state, learns=False, **beside)
        x = jax.tree.map(lambda leaf: self._put((*cube, *leaf.shape[3:]), leaf.dtype, None, axis), local)
        need = self._needs[-1]
        copied = _whole(x) if self._cached else 0
        before = max(before, _bytes(x) if blocks > 1 else 0)
        self._needs[-1] = need._replace(batch=need.batch + before, host=need.host + copied)
        return x

    def _decoded(self, cube: "Cube", blocks: int) -> int:
        """The current block of images, the next one meanwhile (it is assembled from parts), and the threads' images."""
        here, row = self._layout.block(cube[0], cube[2])
        block = (here.stop - here.start) * cube[1] * (row.stop - row.start) * math.prod(self._size) * 3
        return (3 * block if blocks > 1 else block) + self._decoding

    def _batch(self, x: PyTree, cube: "Cube") -> tuple[Batch, PyTree]:
        """What the driver gives to `update`: the batch, and which steps count for which class."""
        axis = self._layout.rows(cube[2])
        masks = all(data.has_masks and data.split == "train" for data in self._datasets)
        valid, label, index = (self._put(cube, dtype, None, axis) for dtype in (bool, jnp.int32, jnp.int32))
        mask = self._put((*cube, *self._size), bool, None, axis) if masks else None
        return Batch(x, valid, label, mask, index, self._put(cube[:-1], jnp.float32)), self._put(cube[:-1], bool)

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


def _is_loaded(value: PyTree) -> bool:
    return any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value))


def _scratch(hlo: str) -> int:
    """Scratch memory of a CPU's convolutions, which its compiler does not report: their input twice, padded."""
    shapes = dict(re.findall(r"([\w.-]+)(?: =|:) f32\[([\d,]+)\]", hlo))
    inputs = [shapes.get(name, "0") for name in re.findall(r" convolution\(%([\w.-]+)", hlo)]
    return max((2 * 4 * math.prod(map(int, sizes.split(","))) for sizes in inputs), default=0)


def _bytes(arrays: PyTree) -> int:
    """On each device."""
    return sum(math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize for s in jax.tree.leaves(arrays))


def _whole(arrays: PyTree) -> int:
    """Of all devices, without copies."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))
