"""Rows over devices: what the ops do where the ambient mesh has an axis "data", whose devices share the rows.

The mesh is the one of `jax.set_mesh`, and its axes are automatic. Without it, or with one device on that axis, every
function here does nothing.
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
    """How many devices share the rows here: 1 without a mesh, and inside of `by_rows`."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[DATA] if DATA in mesh.auto_axes else 1


def by_rows(f: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`jax.shard_map` over the automatic axes of the mesh.

    Outputs that are the same on all devices may be declared as `P()`, which is not checked.
    """
    axes = set(jax.sharding.get_abstract_mesh().auto_axes)
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)


def pad_rows(x: Shaped[Array, "n *d"], parts: int, value: Any = 0) -> Shaped[Array, "m *d"]:
    """`x` with rows of `value` appended until `parts` divides their number."""
    missing = -x.shape[0] % parts
    return jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1)), constant_values=value) if missing else x


def own_rows(index: Int[Array, "*k"], shard: Int[Array, ""] | int, rows: int) -> Int[Array, "*k"]:
    """Where a shard, which is one of so many rows, holds the rows of these global indices; `rows` if it does not."""
    local = index - shard * rows
    return jnp.where((local >= 0) & (local < rows), local, rows)


def split(x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
    """Asks the compiler to share this axis among the devices, which must divide it, and no other."""
    if shards() == 1 or x.shape[axis] % shards():
        return x
    return jax.lax.with_sharding_constraint(x, P(*(None,) * axis, DATA))


def exchange(x: Shaped[Array, "b p *d"]) -> Shaped[Array, "b p *d"]:
    """`x` shared by its second axis, where the devices divide it, instead of by its first: all exchange with all."""
    devices = shards()
    if devices == 1 or x.shape[0] % devices or x.shape[1] % devices:
        return split(x, 1)

    parts = functools.partial(jax.lax.all_to_all, axis_name=DATA, split_axis=1, concat_axis=0, tiled=True)
    return by_rows(parts, P(DATA), P(None, DATA))(x)


def share_rows(x: Shaped[Array, "n *d"]) -> Shaped[Array, "m *d"]:
    """`x` shared among the devices by its rows, with rows of zeros appended until their number divides those."""
    return split(pad_rows(x, shards()), 0)


def take_rows(rows: Shaped[Array, "n d"], index: Int[Array, "k"]) -> Shaped[Array, "k d"]:
    """`rows[index]`, of which no device ever holds more than its share.

    The shares go around the devices in a ring; each passes by all devices, which put in what they hold of it, and ends
    at its owner.

    Args:
        rows: Shared among the devices.
        index: Rows wanted, within 0..n-1; every device has all of it.

    Returns:
        The rows in the order of `index`, shared likewise.
    """
    devices, k = shards(), index.shape[0]
    if devices == 1:
        return rows[index]

    def one_shard(rows: Shaped[Array, "r d"], index: Int[Array, "devices s"]) -> Shaped[Array, "s d"]:
        shard = jax.lax.axis_index(DATA)

        def put(step: int | Int[Array, ""], share: Shaped[Array, "s d"]) -> Shaped[Array, "s d"]:
            local = own_rows(index[(shard - step - 1) % devices], shard, rows.shape[0])
            return jnp.where((local < rows.shape[0])[:, None], rows.at[local].get(mode="clip"), share)

        def hop(step: Int[Array, ""], share: Shaped[Array, "s d"]) -> Shaped[Array, "s d"]:
            return put(step, jax.lax.ppermute(share, DATA, [(i, (i + 1) % devices) for i in range(devices)]))

        share = put(0, jnp.zeros((index.shape[1], rows.shape[1]), rows.dtype))
        return jax.lax.fori_loop(1, devices, hop, share)

    shares = pad_rows(index, devices).reshape(devices, -1)
    return by_rows(one_shard, (P(DATA), P()), P(DATA))(pad_rows(rows, devices), shares)[:k]
