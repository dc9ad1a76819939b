"""Where arrays lie: on one device, or on a mesh with the axes "class" and "data" (of one process or of many).

Everything here is about the driver's arrays. A leading axis of classes is sharded over "class". Behind it, images and
large parts of the state are sharded over "data".
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
"""A part of the state that is smaller is kept whole on every device."""


def make_mesh(*axes: str, shape: Sequence[int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh for `fit_classes` and its like, with Auto axes: XLA decides what the functions of a method do with it.

    Args:
        axes: Names; "class" shards product classes, "data" the images, patches and locations of a class. None: both.
        shape: Devices along each axis. None: all along the last axis.
        devices: Devices to use; None: as many as `shape` asks for, of those of all processes.

    Raises:
        ValueError: An axis has another name, or there are not as many devices as the shape wants.
    """
    axes = axes or (CLASS, DATA)
    if not set(axes) <= {CLASS, DATA} or len(set(axes)) < len(axes):
        raise ValueError(f'the axes of a mesh must be "class" and "data", each once at most, got {", ".join(axes)}')
    there = list(jax.devices() if devices is None else devices)
    shape = (1,) * (len(axes) - 1) + (len(there),) if shape is None else tuple(shape)
    wanted = math.prod(shape)
    if len(shape) != len(axes) or wanted < 1 or wanted > len(there) or (devices is not None and wanted < len(there)):
        raise ValueError(f"a mesh needs a number of devices for each of {axes}, {len(there)} together, got {shape}")
    return jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes), devices=there[:wanted])


def mesh_shape(devices: int, classes: int) -> tuple[int, int]:
    """How to split devices between "class" and "data": classes first, since they never communicate."""
    along_class = max(d for d in range(1, devices + 1) if devices % d == 0 and d <= classes)
    return along_class, devices // along_class


class Layout(NamedTuple):
    """How the arrays of one fit lie on devices; hashable."""

    mesh: Mesh | None = None
    stacked: bool = False
    """Whether all arrays but the weights have a leading axis of classes."""

    @property
    def data_shards(self) -> int:
        """Devices along "data"."""
        return 1 if self.mesh is None else self.mesh.shape.get(DATA, 1)

    @property
    def class_shards(self) -> int:
        """Devices along "class"."""
        return 1 if self.mesh is None else self.mesh.shape.get(CLASS, 1)

    def active(self) -> contextlib.AbstractContextManager:
        """The mesh as the ambient one, which the functions in `jaxad.ops` look at."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def over_classes(
        self, fn: Callable, in_axes: tuple[int | None, ...], classes_per_step: int | None = None
    ) -> Callable:
        """`fn` for all classes at once, or for so many (on each device) at a time; no class knows of another."""
        if not self.stacked:
            return fn

        def share(*args: PyTree) -> PyTree:
            if classes_per_step is None:
                return jax.vmap(fn, in_axes)(*args)

            def one(classes: list[PyTree]) -> PyTree:
                given = iter(classes)
                return fn(*(arg if axis is None else next(given) for arg, axis in zip(args, in_axes, strict=True)))

            mapped = [arg for arg, axis in zip(args, in_axes, strict=True) if axis is not None]
            return jax.lax.map(one, mapped, batch_size=classes_per_step)

        if self.mesh is None or CLASS not in self.mesh.shape:
            return share
        specs = tuple(PartitionSpec() if axis is None else PartitionSpec(CLASS) for axis in in_axes)
        return jax.shard_map(share, in_specs=specs, out_specs=PartitionSpec(CLASS), axis_names={CLASS}, check_vma=False)

    def named(self, *spec: str | None) -> Any:
        """The sharding of an array whose axes behind the classes are sharded so."""
        if self.mesh is None:
            return SingleDeviceSharding(jax.devices()[0])
        spec = (CLASS, *spec) if self.stacked else spec
        return NamedSharding(self.mesh, PartitionSpec(*(axis if axis in self.mesh.shape else None for axis in spec)))

    def replicated(self) -> Any:
        """The sharding of what every device has whole."""
        return self.named() if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def rows(self, size: int) -> str | None:
        """The mesh axis that `size` images are sharded over."""
        return DATA if size % self.data_shards == 0 else None

    def state(self, abstract: PyTree) -> PyTree:
        """The sharding of every part of a state.

        Of a large one the first axis behind the classes that the devices along "data" divide.
        """
        behind = int(self.stacked)

        def one(leaf: Any) -> Any:
            shape = leaf.shape[behind:]
            large = math.prod(shape) * leaf.dtype.itemsize >= SHARD_BYTES
            axis = next((i for i, n in enumerate(shape) if n and self.rows(n)), None) if large else None
            return self.named(*([None] * axis + [DATA] if axis is not None else []))

        return jax.tree.map(one, abstract)

    def abstract(self, tree: PyTree, classes: int) -> PyTree:
        """Shapes, types and shardings of the states of all classes, from those of one."""
        lead = (classes,) if self.stacked else ()

        def whole(leaf: Any) -> Any:
            return jax.ShapeDtypeStruct((*lead, *leaf.shape), leaf.dtype)

        def placed(leaf: Any) -> Any:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.state(leaf))

        return jax.tree.map(placed, jax.tree.map(whole, tree))

    def local(self) -> "Layout":
        """The part on the devices of this process."""
        return self if self.mesh is None or jax.process_count() == 1 else self._replace(mesh=self.mesh.local_mesh)

    def block(self, classes: int, rows: int) -> tuple[slice, slice]:
        """Which part of (classes, rows) this process has to supply."""
        if self.mesh is None or jax.process_count() == 1:
            return slice(0, classes), slice(0, rows)
        spec = PartitionSpec(CLASS if CLASS in self.mesh.shape and self.stacked else None, self.rows(rows))
        shards = NamedSharding(self.mesh, spec).addressable_devices_indices_map((classes, rows)).values()
        ranges = [[s.indices(n) for s, n in zip(shard or (), (classes, rows), strict=True)] for shard in shards]
        first, second = (slice(min(r[i][0] for r in ranges), max(r[i][1] for r in ranges)) for i in (0, 1))
        return first, second

    def put(self, local: np.ndarray, sharding: Any, shape: tuple[int, ...]) -> jax.Array:
        """An array of that shape from the part that this process supplies."""
        if self.mesh is None:
            return jax.device_put(local, sharding)
        return jax.make_array_from_process_local_data(sharding, local, shape)

    def spread(self, tree: PyTree) -> PyTree:
        """States, or random keys, of which every process has all, as they lie on the devices."""

        def one(leaf: Any, sharding: Any) -> Any:
            if jax.process_count() == 1 or not leaf.is_fully_addressable:
                return jax.device_put(leaf, sharding)
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                data = jax.device_put(np.asarray(jax.random.key_data(leaf)), sharding)
                return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
            return jax.device_put(np.asarray(leaf), sharding)

        return jax.tree.map(one, tree, self.state(tree))

    def join(self, local: jax.Array, sharding: Any, shape: tuple[int, ...]) -> jax.Array:
        """An array of that shape from the one on this process's devices; nothing is copied."""
        if self.mesh is None or jax.process_count() == 1:
            return local
        return jax.make_array_from_single_device_arrays(shape, sharding, [s.data for s in local.addressable_shards])


def fetch(tree: PyTree) -> PyTree:
    """Whole arrays in the memory of every process."""

    def one(leaf: Any) -> np.ndarray:
        spread = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True) if spread else leaf)

    return jax.tree.map(one, tree)


def agreed(value: bool) -> bool:
    """What the first process says."""
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value))) if jax.process_count() > 1 else value


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns once every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
