"""Images to arrays on devices: decoded ahead of the device, embedded once, kept where that pays."""

import functools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jaxad.base import EmbedFn, Frozen, PyTree
from jaxad.data import Dataset
from jaxad.driver.mesh import CLASS, Layout
from jaxad.driver.program import Program

CACHE_BYTES = 4 << 30
"""Embedded images kept at most; beyond, they are computed anew."""


class Embedding:
    """The embedded images of one data set: their shapes, and those that were kept.

    One instance serves all stages and epochs of a fit, and all methods whose `embed` is the same function.
    """

    def __init__(
        self, embed: EmbedFn, frozen: Frozen, data: Dataset, layout: Layout, most_bytes: float, storage: "Storage"
    ) -> None:
        self.data, self.on_device = data, storage.place == "device"
        self.frozen = frozen  # a cache knows the weights by their id, which is theirs as long as they are held
        self.spec = jax.eval_shape(embed, frozen, jax.ShapeDtypeStruct((len(data), *data.image_size, 3), jnp.uint8))
        rows = len(data) + -len(data) % layout.data_shards if self.on_device else len(data)
        stored = jax.tree.map(lambda leaf: storage.stored(leaf, rows), self.spec)
        self._bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(stored))
        self._done = np.zeros(len(data), bool)
        self._stored = stored if self._bytes <= most_bytes else None
        self._kept: PyTree = None
        self._sharding = layout.local()._replace(stacked=False).named(layout.rows(rows))

    @property
    def keeps(self) -> bool:
        """Whether there is room to keep them."""
        return self._stored is not None

    @property
    def room(self) -> tuple[int, int]:
        """Bytes when all are kept, and those that are filled by now."""
        full = self._bytes if self.keeps else 0
        return full, round(full * self._done.mean())

    def has(self, rows: np.ndarray) -> bool:
        """Whether all these images are there."""
        return bool(self._done[rows].all())

    def get(self, rows: np.ndarray) -> PyTree:
        """The embedded images at `rows`, in the type that they are kept in, where they are kept."""
        return _take(self._kept, rows) if self.on_device else jax.tree.map(lambda kept: kept[rows], self._kept)

    def keep(self, rows: np.ndarray, valid: np.ndarray, x: PyTree) -> None:
        """Keeps the valid ones of embedded images (of the process's devices)."""
        if self.on_device:
            if self._kept is None:
                self._kept = jax.tree.map(
                    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=self._sharding), self._stored
                )
            self._kept = _set(self._kept, np.where(valid, rows, len(self.data)), x)
        else:
            if self._kept is None:
                self._kept = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), self._stored)
            for kept, leaf in zip(jax.tree.leaves(self._kept), jax.tree.leaves(x), strict=True):
                kept[rows[valid]] = np.asarray(leaf)[valid]
        self._done[rows[valid]] = True

    def rounded(self, x: PyTree) -> PyTree:
        """Embedded images as they will be when they have been kept."""
        return jax.tree.map(lambda leaf, kept: leaf.astype(kept.dtype).astype(leaf.dtype), x, self._stored)


@jax.jit
def _take(kept: PyTree, rows: Array) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[rows], kept)


@functools.partial(jax.jit, donate_argnums=0)
def _set(kept: PyTree, rows: Array, x: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf, new: leaf.at[rows].set(new.astype(leaf.dtype), mode="drop"), kept, x)


class Storage(NamedTuple):
    """How embedded images are kept."""

    place: Literal["host", "device"] = "host"
    """In the memory of the host, or on the devices (shared among those along "data"), which no copy then delays."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """"bfloat16" rounds floats to half their size."""

    def check(self) -> None:
        """Raises ValueError where a field is none of those above."""
        for name, value, known in (
            ("cache", self.place, ("host", "device")),
            ("cache_dtype", self.dtype, ("float32", "bfloat16")),
        ):
            if value not in known:
                raise ValueError(f'{name} must be "{known[0]}" or "{known[1]}", got "{value}"')

    def stored(self, leaf: Any, rows: int) -> jax.ShapeDtypeStruct:
        """What is kept of so many images."""
        dtype = jnp.dtype(self.dtype) if leaf.dtype == jnp.float32 else leaf.dtype
        return jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), dtype)


class EmbeddingCache(dict[Hashable, Embedding]):
    """Give the same one to several calls of `fit` and `score` to compute shared features once.

    Args:
        storage: How they are kept.
        shared: Keep what one call needs once only, for the other calls.
    """

    def __init__(self, storage: Storage = Storage(), *, shared: bool = True) -> None:
        super().__init__()
        storage.check()
        self.storage, self.shared = storage, shared


def embeddings(
    embed: EmbedFn,
    frozen: Frozen,
    datasets: Sequence[Dataset],
    layout: Layout,
    batch_size: int,
    cache: EmbeddingCache | None,
    keep: bool,
) -> list[Embedding]:
    """The embeddings of data sets, from the cache where they are there."""
    cache = EmbeddingCache(shared=False) if cache is None else cache
    made: dict[Hashable, Embedding] = cache if cache.shared else {}
    most = CACHE_BYTES / len(datasets) if keep or cache.shared else -1
    found = []
    for data in datasets:
        images = tuple(map(id, data.records))  # subsets of one data set share their records
        key = (embed, id(frozen), images, data.preprocess, batch_size, layout.local().mesh)
        if key not in made:
            made[key] = Embedding(embed, frozen, data, layout, most, cache.storage)
        found.append(made[key])
    return found


@functools.lru_cache(maxsize=64)
def embed_program(embed: EmbedFn, layout: Layout, axis: str | None) -> Program:
    """The program that embeds images (class step row h w 3) on a process's devices, each its own share.

    Args:
        embed: Of a method.
        layout: Where arrays lie.
        axis: The mesh axis that rows are sharded over.
    """

    def block(frozen: Frozen, image: jax.Array) -> PyTree:
        classes, _, rows = image.shape[:3]

        def step(image: jax.Array) -> PyTree:
            x = embed(frozen, image.reshape(-1, *image.shape[2:]))
            return jax.tree.map(lambda leaf: leaf.reshape(classes, rows, *leaf.shape[1:]), x)

        if image.shape[1] == 1:
            return jax.tree.map(lambda leaf: leaf[:, None], step(image[:, 0]))
        return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), jax.lax.map(step, jnp.moveaxis(image, 1, 0)))

    def run(frozen: Frozen, image: jax.Array) -> PyTree:
        local, image = layout.local(), image if layout.stacked else image[None]
        if local.mesh is None:
            x = block(frozen, image)
        else:
            along = CLASS if layout.stacked and CLASS in local.mesh.shape else None
            spec = PartitionSpec(along, None, axis)
            x = jax.shard_map(
                block, mesh=local.mesh, in_specs=(PartitionSpec(), spec), out_specs=spec, check_vma=False
            )(frozen, image)
        return x if layout.stacked else jax.tree.map(lambda leaf: leaf[0], x)

    return Program(run)


class Block(NamedTuple):
    """Which images to read: one entry a class, a step and a row."""

    index: np.ndarray
    """(c, s, b) positions in each class's data set."""
    valid: np.ndarray
    """(c, s, b): False marks padding, whose index is that of any image."""


class Reader:
    """Turns blocks of indices into embedded images on the devices; the next block is decoded meanwhile."""

    def __init__(self, embed: EmbedFn, frozen: "Placed", sources: Sequence[Embedding], layout: Layout) -> None:
        self._embed_fn, self._frozen, self._sources, self._layout = embed, frozen, sources, layout

    def read(self, steps: range, block: Callable[[int], Block]) -> Iterator[tuple[int, Block, PyTree]]:
        """Yields every step with its block and embedded images, leaves (c s b ...), without c for a single class.

        Each process decodes its own share of a block.
        """

        def decoded(step: int) -> tuple[int, Block, np.ndarray | None]:
            wanted = block(step)
            return step, wanted, self._decode(wanted)

        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)  # decoding one block uses all cores
        dataset = grain.MapDataset.range(steps.start, steps.stop, steps.step).map(decoded).to_iter_dataset(ahead)
        for step, wanted, images in dataset:
            yield step, wanted, self._embed(wanted, images)

    def _share(self, block: Block) -> tuple[Sequence[Embedding], Block]:
        """This process's classes, and its part of the block."""
        classes, _, rows = block.index.shape
        own, row = self._layout.block(classes, rows)
        return self._sources[own], Block(*(part[own, :, row] for part in block))

    def _decode(self, block: Block) -> np.ndarray | None:
        sources, (index, valid) = self._share(block)
        if all(source.has(rows) for source, rows in zip(sources, index, strict=True)):
            return None
        images = np.zeros((*index.shape, *sources[0].data.image_size, 3), np.uint8)  # padding may be anything
        for image, source, rows, real in zip(images, sources, index, valid, strict=True):
            if real.any():
                once, where = np.unique(rows[real], return_inverse=True)
                image[real] = source.data.images(once)[where]
        return images

    def _embed(self, block: Block, images: np.ndarray | None) -> PyTree:
        layout = self._layout
        sources, (index, valid) = self._share(block)
        axis = layout.rows(block.index.shape[2])
        sharding = layout.named(None, axis)
        lead = block.index.shape if layout.stacked else block.index.shape[1:]
        local = layout.local().named(None, axis)
        if images is None:
            kept = [source.get(rows) for source, rows in zip(sources, index, strict=True)]
            stack = jnp.stack if sources[0].on_device else np.stack
            x = jax.tree.map(lambda *leaves: stack(leaves) if layout.stacked else leaves[0], *kept)
            x = jax.tree.map(lambda leaf, spec: leaf.astype(spec.dtype), jax.device_put(x, local), sources[0].spec)
        else:
            here = jax.device_put(images if layout.stacked else images[0], local)
            x = embed_program(self._embed_fn, layout, axis)(self._frozen.local, here)
            for c, source in enumerate(sources):
                if source.keeps:
                    own = jax.tree.map(lambda leaf, c=c: leaf[c], x) if layout.stacked else x
                    source.keep(index[c], valid[c], own)
            if sources[0].keeps:
                x = sources[0].rounded(x)
        return jax.tree.map(lambda leaf: layout.join(leaf, sharding, (*lead, *leaf.shape[len(lead) :])), x)


class Placed(NamedTuple):
    """The weights on all devices."""

    everywhere: Frozen
    """For the programs over all devices."""
    local: Frozen
    """For those over this process's devices; the same memory."""


def place(frozen: Frozen, layout: Layout) -> Placed:
    """Copies the weights to every device."""
    if layout.mesh is None:
        return Placed(frozen, frozen)
    local = jax.device_put(frozen, layout.local().replicated())
    whole = jax.tree.map(lambda leaf: layout.join(leaf, layout.replicated(), leaf.shape), local)
    return Placed(whole, local)
