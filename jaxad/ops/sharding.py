"""Arrays whose rows devices share: what the ops use where the ambient mesh has an axis "data".

The mesh is the one of `jax.set_mesh`, and its axes are automatic. Without it, or with one device on that axis, every
function here leaves its argument where it is.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Shaped

DATA = "data"


def shards() -> int:
    """How many devices share the rows here: 1 without a mesh and inside `map_shards`."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[DATA] if DATA in mesh.auto_axes else 1


def map_shards(f: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`jax.shard_map` over the automatic axes of the mesh.

    Outputs that are the same on all devices may be declared as `P()`, which is not checked.
    """
    axes = set(jax.sharding.get_abstract_mesh().auto_axes)
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)


def pad_rows(x: Shaped[Array, "n *d"], parts: int, value: Any = 0) -> Shaped[Array, "m *d"]:
    """`x` with rows of `value` appended until `parts` divides their number."""
    missing = -x.shape[0] % parts
    return jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1)), constant_values=value) if missing else x


def local_rows(index: Int[Array, "*k"], shard: Int[Array, ""] | int, rows: int) -> Int[Array, "*k"]:
    """The rows of a shard that hold these global indices; `rows`, the size of every shard, where it does not."""
    local = index - shard * rows
    return jnp.where((local >= 0) & (local < rows), local, rows)


def split(x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
    """Asks the compiler to shard only this axis, if the number of devices divides it."""
    if shards() == 1 or x.shape[axis] % shards():
        return x
    return jax.lax.with_sharding_constraint(x, P(*(None,) * axis, DATA))


def exchange(x: Shaped[Array, "b p *d"]) -> Shaped[Array, "b p *d"]:
    """`x` sharded by its second axis instead of its first, if the number of devices divides it: one all-to-all."""
    devices = shards()
    if devices == 1 or x.shape[0] % devices or x.shape[1] % devices:
        return split(x, 1)

    all_to_all = functools.partial(jax.lax.all_to_all, axis_name=DATA, split_axis=1, concat_axis=0, tiled=True)
    return map_shards(all_to_all, P(DATA), P(None, DATA))(x)


def share_rows(x: Shaped[Array, "n *d"]) -> Shaped[Array, "m *d"]:
    """`x` sharded by its rows, with rows of zeros appended until the devices divide their number."""
    return split(pad_rows(x, shards()), 0)


def take_rows(rows: Shaped[Array, "n d"], index: Int[Array, "k"]) -> Shaped[Array, "k d"]:
    """`rows[index]` without collecting the rows on one device.

    The shards of the result go around the devices in a ring. Every device fills in the rows that it holds, and each
    shard ends at its owner.

    Args:
        rows: Sharded by rows.
        index: Rows wanted, within 0..n-1; every device has all of it.

    Returns:
        The rows in the order of `index`, sharded likewise.
    """
    devices, k = shards(), index.shape[0]
    if devices == 1:
        return rows[index]

    def one_shard(rows: Shaped[Array, "r d"], index: Int[Array, "devices s"]) -> Shaped[Array, "s d"]:
        shard = jax.lax.axis_index(DATA)

        def fill(step: int | Int[Array, ""], part: Shaped[Array, "s d"]) -> Shaped[Array, "s d"]:
            local = local_rows(index[(shard - step - 1) % devices], shard, rows.shape[0])
            return jnp.where((local < rows.shape[0])[:, None], rows.at[local].get(mode="clip"), part)

        def hop(step: Int[Array, ""], part: Shaped[Array, "s d"]) -> Shaped[Array, "s d"]:
            return fill(step, jax.lax.ppermute(part, DATA, [(i, (i + 1) % devices) for i in range(devices)]))

        part = fill(0, jnp.zeros((index.shape[1], rows.shape[1]), rows.dtype))
        return jax.lax.fori_loop(1, devices, hop, part)

    parts = pad_rows(index, devices).reshape(devices, -1)
    return map_shards(one_shard, (P(DATA), P()), P(DATA))(pad_rows(rows, devices), parts)[:k]
