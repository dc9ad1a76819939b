"""Buffers with a row for every training image, filled batch by batch; padding is dropped.

There are two layouts: images first, for small rows, and positions first, for large rows. On a mesh, devices share the
first axis of a large buffer. With positions first, every device holds some positions of all images, so that all devices
fill evenly from the first batch on.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from jaxad.base import Batch
from jaxad.ops.sharding import exchange, share_rows, take_rows


def collect(buffer: Shaped[Array, "n *d"], values: Shaped[Array, "b *d"], batch: Batch) -> Shaped[Array, "n *d"]:
    """Writes the values of a batch to the rows of its images.

    Args:
        buffer: A row for every training image.
        values: A row for every image of the batch.
        batch: Its `index` gives the rows; rows that are not `valid` are dropped.
    """
    return buffer.at[_rows(batch, buffer.shape[0])].set(values.astype(buffer.dtype), mode="drop")


def collect_positions(
    buffer: Shaped[Array, "p n *d"], values: Shaped[Array, "b p *d"], batch: Batch
) -> Shaped[Array, "p n *d"]:
    """As `collect`, into a buffer with positions first."""
    values = exchange(values.astype(buffer.dtype)).swapaxes(0, 1)
    return buffer.at[:, _rows(batch, buffer.shape[1])].set(values, mode="drop")


def image_first(buffer: Shaped[Array, "p n *d"]) -> Shaped[Array, "n p *d"]:
    """A buffer with positions first, rearranged so that devices share the images."""
    return exchange(buffer).swapaxes(0, 1)


def all_patches(
    buffer: Shaped[Array, "p n d"], seen: Bool[Array, "n"]
) -> tuple[Shaped[Array, "m d"], Bool[Array, "m"]]:
    """The patches of all images as rows, ordered by position, then by image, and which of them count.

    On a mesh, devices share the rows; patches of zeros that do not count make their number divisible.

    Args:
        buffer: Patches with positions first.
        seen: Images that have been collected.
    """
    positions = buffer.shape[0]
    buffer = share_rows(buffer)
    valid = (jnp.arange(buffer.shape[0]) < positions)[:, None] & seen
    return buffer.reshape(-1, buffer.shape[-1]), valid.reshape(-1)


def valid_first(rows: Shaped[Array, "n d"], valid: Bool[Array, "n"], k: int) -> Shaped[Array, "k d"]:
    """The first k rows after those that count have moved to the front, in their order."""
    return take_rows(rows, jnp.argsort(~valid, stable=True)[:k])


def _rows(batch: Batch, n: int) -> Int[Array, "b"]:
    """The row of every image; n, out of bounds, for padding."""
    return jnp.where(batch.valid, batch.index, n)
