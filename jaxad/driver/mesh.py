"""Where arrays lie: on one device, or on a mesh with the axes "class" and "data" (of one process or of many).

Everything here is about the driver's arrays, which all have a leading axis of classes, but for the weights. That axis
is sharded over "class"; behind it, images and large parts of the state are sharded over "data".
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

PyTree = Any

CLASS, DATA = "class", "data"
SHARD_BYTES = 1 << 20
"""Smaller parts of a state are replicated."""


def make_mesh(*axes: str, shape: Sequence[int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh for `Execution`, with automatic axes: XLA partitions the functions of a method.

    Args:
        axes: Names; "class" shards product classes, "data" the images, patches and locations of a class. None given:
            both.
        shape: Devices along each axis. None: all along the last axis.
        devices: Devices to use; None: as many as `shape` asks for, of those of all processes.

    Raises:
        ValueError: An axis has another name, or there are not as many devices as the shape wants.
    """
    axes = axes or (CLASS, DATA)
    if not set(axes) <= {CLASS, DATA} or len(set(axes)) < len(axes):
        raise ValueError(f'the axes of a mesh must be "class" and "data", each once at most, got {", ".join(axes)}')
    available = list(jax.devices() if devices is None else devices)
    shape = (1,) * (len(axes) - 1) + (len(available),) if shape is None else tuple(shape)
    wanted = math.prod(shape)
    if (
        len(shape) != len(axes)
        or wanted < 1
        or wanted > len(available)
        or (devices is not None and wanted < len(available))
    ):
        raise ValueError(f"a mesh needs a number of devices for each of {axes}, {len(available)} in all, got {shape}")
    return jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes), devices=available[:wanted])


def mesh_shape(devices: int, classes: int) -> tuple[int, int]:
    """How to split devices between "class" and "data": classes first, since they never communicate."""
    along_class = max(d for d in range(1, devices + 1) if devices % d == 0 and d <= classes)
    return along_class, devices // along_class


class Layout(NamedTuple):
    """How the arrays of one fit lie on devices; hashable."""

    mesh: Mesh | None = None

    @property
    def data_shards(self) -> int:
        """Devices along "data"."""
        return 1 if self.mesh is None else self.mesh.shape.get(DATA, 1)

    @property
    def class_shards(self) -> int:
        """Devices along "class"."""
        return 1 if self.mesh is None else self.mesh.shape.get(CLASS, 1)

    def ambient(self) -> contextlib.AbstractContextManager:
        """The mesh as the ambient one, which the functions in `jaxad.ops` read."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def over_classes(
        self, fn: Callable, in_axes: tuple[int | None, ...], classes_per_step: int | None = None
    ) -> Callable:
        """`fn` for all classes at once, or for so many (on each device) at a time; classes share nothing.

        A single class is squeezed, not mapped: a batched `lax.while_loop` would copy its whole state in every step.
        """

        def per_device(*args: PyTree) -> PyTree:
            mapped = [arg for arg, axis in zip(args, in_axes, strict=True) if axis is not None]

            def one(classes: list[PyTree]) -> PyTree:
                rest = iter(classes)
                return fn(*(arg if axis is None else next(rest) for arg, axis in zip(args, in_axes, strict=True)))

            if jax.tree.leaves(mapped)[0].shape[0] == 1:
                return jax.tree.map(lambda leaf: leaf[None], one(jax.tree.map(lambda leaf: leaf[0], mapped)))
            return (
                jax.vmap(one)(mapped)
                if classes_per_step is None
                else jax.lax.map(one, mapped, batch_size=classes_per_step)
            )

        if self.mesh is None or CLASS not in self.mesh.shape:
            return per_device
        specs = tuple(PartitionSpec() if axis is None else PartitionSpec(CLASS) for axis in in_axes)
        return jax.shard_map(
            per_device, in_specs=specs, out_specs=PartitionSpec(CLASS), axis_names={CLASS}, check_vma=False
        )

    def named(self, *spec: str | None) -> Any:
        """The sharding of an array whose axes behind the classes are sharded so."""
        return self.without_classes(CLASS, *spec)

    def without_classes(self, *spec: str | None) -> Any:
        """The sharding of an array without an axis of classes."""
        if self.mesh is None:
            return SingleDeviceSharding(jax.devices()[0])
        return NamedSharding(self.mesh, PartitionSpec(*(axis if axis in self.mesh.shape else None for axis in spec)))

    def replicated(self) -> Any:
        """The sharding of what every device holds whole."""
        return self.without_classes()

    def rows(self, size: int) -> str | None:
        """The mesh axis that `size` images are sharded over."""
        return DATA if size % self.data_shards == 0 else None

    def state(self, abstract: PyTree, classes: bool = True) -> PyTree:
        """The sharding of every part of a state.

        Of a large part it is the first axis behind the classes that the devices along "data" divide.

        Args:
            abstract: The state, or its shapes and types.
            classes: Whether it has a leading axis of classes.
        """

        def one(leaf: Any) -> Any:
            shape = leaf.shape[1:] if classes else leaf.shape
            large = math.prod(shape) * leaf.dtype.itemsize >= SHARD_BYTES
            axis = next((i for i, n in enumerate(shape) if n and self.rows(n)), None) if large else None
            spec = () if axis is None else (*[None] * axis, DATA)
            return self.named(*spec) if classes else self.without_classes(*spec)

        return jax.tree.map(one, abstract)

    def abstract(self, state: PyTree, classes: int) -> PyTree:
        """Shapes, types and shardings of the states of all classes, from those of one."""

        def stacked(leaf: Any) -> Any:
            return jax.ShapeDtypeStruct((classes, *leaf.shape), leaf.dtype)

        def placed(leaf: Any) -> Any:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.state(leaf))

        return jax.tree.map(placed, jax.tree.map(stacked, state))

    def local(self) -> "Layout":
        """The part on the devices of this process."""
        return self if self.mesh is None or jax.process_count() == 1 else Layout(self.mesh.local_mesh)

    def block(self, classes: int, rows: int) -> tuple[slice, slice]:
        """Which part of (classes, rows) this process has to supply."""
        if self.mesh is None or jax.process_count() == 1:
            return slice(0, classes), slice(0, rows)
        spec = PartitionSpec(CLASS if CLASS in self.mesh.shape else None, self.rows(rows))
        shards = NamedSharding(self.mesh, spec).addressable_devices_indices_map((classes, rows)).values()
        ranges = [[s.indices(n) for s, n in zip(shard or (), (classes, rows), strict=True)] for shard in shards]
        first, second = (slice(min(r[i][0] for r in ranges), max(r[i][1] for r in ranges)) for i in (0, 1))
        return first, second

    def put(self, local: np.ndarray, sharding: Any, shape: tuple[int, ...]) -> jax.Array:
        """An array of that shape from the part that this process supplies."""
        if self.mesh is None:
            return jax.device_put(local, sharding)
        return jax.make_array_from_process_local_data(sharding, local, shape)

    def spread(self, state: PyTree, classes: bool = True) -> PyTree:
        """A state, or random keys, of which every process has the whole, as they lie on the devices."""

        def one(leaf: Any, sharding: Any) -> Any:
            if jax.process_count() == 1 or not leaf.is_fully_addressable:
                return jax.device_put(leaf, sharding)
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                data = jax.device_put(np.asarray(jax.random.key_data(leaf)), sharding)
                return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
            return jax.device_put(np.asarray(leaf), sharding)

        return jax.tree.map(one, state, self.state(state, classes))

    def join(self, local: jax.Array, sharding: Any, shape: tuple[int, ...]) -> jax.Array:
        """An array of that shape from the one on this process's devices; nothing is copied."""
        if self.mesh is None or jax.process_count() == 1:
            return local
        return jax.make_array_from_single_device_arrays(shape, sharding, [s.data for s in local.addressable_shards])


def fetch(arrays: PyTree) -> PyTree:
    """Whole arrays in the memory of every process."""

    def one(leaf: Any) -> np.ndarray:
        spread = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True) if spread else leaf)

    return jax.tree.map(one, arrays)


def broadcast(value: bool) -> bool:
    """The value that the first process has."""
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value))) if jax.process_count() > 1 else value


def is_first() -> bool:
    """Whether this is the process that writes files and messages."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Blocks until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
