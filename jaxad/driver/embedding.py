"""Images to arrays on devices: decoded ahead of the device, embedded once, cached where that pays."""

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
from jaxad.driver.program import Program, weak_cache

CACHE_BYTES = 4 << 30
"""Most that a fit caches of embedded images; beyond, they are computed anew."""


class Embedding:
    """The embedded images of one data set: their shapes, and those that are cached.

    One instance serves all stages and epochs of a fit, and all methods whose `embed` is the same function.
    """

    def __init__(
        self, embed: EmbedFn, frozen: Frozen, data: Dataset, layout: Layout, most_bytes: float, storage: "Storage"
    ) -> None:
        self.data, self.on_device = data, storage.place == "device"
        self.frozen = frozen  # the cache's key has its id, which is unique as long as it is referenced
        self._embed, self._bytes, self._stored = embed, 0, None
        rows = len(data) + -len(data) % layout.data_shards if self.on_device else len(data)
        if most_bytes:
            stored = jax.tree.map(lambda leaf: storage.stored(leaf, rows), self.spec)
            self._bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(stored))
            self._stored = stored if self._bytes <= most_bytes else None
        self._done = np.zeros(len(data), bool)
        self._cached: PyTree = None
        self._sharding = layout.local().without_classes(layout.rows(rows))

    @functools.cached_property
    def spec(self) -> PyTree:
        """Their shapes and types."""
        shape = len(self.data), *self.data.image_size, 3
        return jax.eval_shape(self._embed, self.frozen, jax.ShapeDtypeStruct(shape, jnp.uint8))

    @property
    def caches(self) -> bool:
        """Whether there is room to cache them."""
        return self._stored is not None

    @property
    def room(self) -> tuple[int, int]:
        """Bytes when all are cached, and those that are filled by now."""
        full = self._bytes if self.caches else 0
        return full, round(full * self._done.mean())

    def has(self, rows: np.ndarray) -> bool:
        """Whether all these images are there."""
        return bool(self._done[rows].all())

    def get(self, rows: np.ndarray) -> PyTree:
        """The cached images at `rows`, in the type and place of the cache."""
        return _take(self._cached, rows) if self.on_device else jax.tree.map(lambda cached: cached[rows], self._cached)

    def put(self, rows: np.ndarray, valid: np.ndarray, x: PyTree) -> None:
        """Caches the valid ones of embedded images (of the process's devices)."""
        if self.on_device:
            if self._cached is None:
                self._cached = jax.tree.map(
                    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=self._sharding), self._stored
                )
            self._cached = _set(self._cached, np.where(valid, rows, len(self.data)), x)
        else:
            if self._cached is None:
                self._cached = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), self._stored)
            for cached, leaf in zip(jax.tree.leaves(self._cached), jax.tree.leaves(x), strict=True):
                cached[rows[valid]] = np.asarray(leaf)[valid]
        self._done[rows[valid]] = True

    def rounded(self, x: PyTree) -> PyTree:
        """Embedded images as the cache will give them back."""
        return jax.tree.map(lambda leaf, cached: leaf.astype(cached.dtype).astype(leaf.dtype), x, self._stored)


@jax.jit
def _take(cached: PyTree, rows: Array) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[rows], cached)


@functools.partial(jax.jit, donate_argnums=0)
def _set(cached: PyTree, rows: Array, x: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf, new: leaf.at[rows].set(new.astype(leaf.dtype), mode="drop"), cached, x)


class Part(Embedding):
    """Some images of another embedding, under numbers of their own."""

    def __init__(self, whole: Embedding, data: Dataset) -> None:
        number = {id(record): i for i, record in enumerate(whole.data.records)}
        self._whole, self._rows = whole, np.array([number[id(record)] for record in data.records])
        self.data, self.on_device, self.frozen = data, whole.on_device, whole.frozen
        self.spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(data), *x.shape[1:]), x.dtype), whole.spec)

    @property
    def caches(self) -> bool:
        """As of the whole."""
        return self._whole.caches

    @property
    def room(self) -> tuple[int, int]:
        """No bytes but those of the whole."""
        return 0, 0

    def has(self, rows: np.ndarray) -> bool:
        """Whether all these images are there."""
        return self._whole.has(self._rows[rows])

    def get(self, rows: np.ndarray) -> PyTree:
        """As of the whole."""
        return self._whole.get(self._rows[rows])

    def put(self, rows: np.ndarray, valid: np.ndarray, x: PyTree) -> None:
        """As of the whole."""
        self._whole.put(self._rows[rows], valid, x)

    def rounded(self, x: PyTree) -> PyTree:
        """As of the whole."""
        return self._whole.rounded(x)


class Storage(NamedTuple):
    """How embedded images are cached."""

    place: Literal["host", "device"] = "host"
    """In the memory of the host, or on the devices (sharded over "data"), which then wait for no copy."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """"bfloat16" rounds floats to half their size."""

    def check(self) -> None:
        """Raises ValueError for a field with another value."""
        for name, value, choices in (
            ("cache", self.place, ("host", "device")),
            ("cache_dtype", self.dtype, ("float32", "bfloat16")),
        ):
            if value not in choices:
                raise ValueError(f'{name} must be "{choices[0]}" or "{choices[1]}", got "{value}"')

    def stored(self, leaf: Any, rows: int) -> jax.ShapeDtypeStruct:
        """The shape and type in which so many images are cached."""
        dtype = jnp.dtype(self.dtype) if leaf.dtype == jnp.float32 else leaf.dtype
        return jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), dtype)


class EmbeddingCache(dict[tuple[Hashable, Hashable], Embedding]):
    """Embedded images by data set; several calls of `fit` and `score` that share one compute shared features once.

    A part of a data set that is known already shares its images.

    Args:
        storage: How they are cached.
        shared: Cache also what a call needs only once, for the other calls.
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
    several: bool,
) -> list[Embedding]:
    """The embeddings of data sets, from the cache where it has them.

    Args:
        embed: Of a method.
        frozen: Its pretrained weights.
        datasets: One a class.
        layout: Where arrays lie.
        batch_size: Images at a time; results of another batch size may be rounded differently.
        cache: Shared between calls; None: one for this call.
        several: Whether the call needs the images more than once.
    """
    cache = EmbeddingCache(shared=False) if cache is None else cache
    known: dict[tuple[Hashable, Hashable], Embedding] = cache if cache.shared else {}
    wholes = [data for data in datasets if not (cache.shared and any(_is_part(data, other) for other in datasets))]
    most = CACHE_BYTES / len(wholes) if several or cache.shared else 0
    result = []
    for data in datasets:
        images = tuple(map(id, data.records))  # subsets of one data set share their records
        terms = (embed, id(frozen), data.preprocess, batch_size, layout.local().mesh)
        if (terms, images) not in known:
            others = (other for (same, _), other in known.items() if cache.shared and same == terms)
            whole = next((other for other in others if _is_part(data, other.data)), None)
            embedding = Part(whole, data) if whole else Embedding(embed, frozen, data, layout, most, cache.storage)
            known[terms, images] = embedding
        result.append(known[terms, images])
    return result


def _is_part(data: Dataset, other: Dataset) -> bool:
    """Whether all images of a data set, but not all of the other one, are in both."""
    return len(data) < len(other) and set(map(id, data.records)) <= set(map(id, other.records))


@weak_cache
def embed_program(embed: EmbedFn, layout: Layout, axis: str | None) -> Program:
    """The program that embeds images (c s b h w 3) on a process's devices, each its share.

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
        local = layout.local()
        if local.mesh is None:
            return block(frozen, image)
        spec = PartitionSpec(CLASS if CLASS in local.mesh.shape else None, None, axis)
        return jax.shard_map(block, mesh=local.mesh, in_specs=(PartitionSpec(), spec), out_specs=spec, check_vma=False)(
            frozen, image
        )

    return Program(run)


class Block(NamedTuple):
    """Which images to read: one entry for each class, step and row."""

    index: np.ndarray
    """(c, s, b) positions in each class's data set."""
    valid: np.ndarray
    """(c, s, b): False marks padding, whose index is that of any image."""


class Reader:
    """Turns blocks of indices into embedded images on the devices, while the next block is being decoded."""

    def __init__(self, embed: EmbedFn, frozen: "Placed", sources: Sequence[Embedding], layout: Layout) -> None:
        self._embed_fn, self._frozen, self._sources, self._layout = embed, frozen, sources, layout

    def read(self, steps: range, block: Callable[[int], Block]) -> Iterator[tuple[int, Block, PyTree]]:
        """Yields every step with its block and embedded images, leaves c s b ....

        Each process decodes its own share of a block.
        """

        def decoded(step: int) -> tuple[int, Block, np.ndarray | None]:
            rows = block(step)
            return step, rows, self._decode(rows)

        blocks = map(decoded, steps)
        if len(steps) > 1:
            options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)  # decoding one block uses all cores
            blocks = grain.MapDataset.range(steps.start, steps.stop, steps.step).map(decoded).to_iter_dataset(options)
        for step, rows, images in blocks:
            yield step, rows, self._embed(rows, images)

    def _share(self, block: Block) -> tuple[Sequence[Embedding], Block]:
        """This process's classes, and its part of the block."""
        classes, _, rows = block.index.shape
        here, row = self._layout.block(classes, rows)
        return self._sources[here], Block(*(part[here, :, row] for part in block))

    def _decode(self, block: Block) -> np.ndarray | None:
        sources, (index, valid) = self._share(block)
        if all(source.has(rows) for source, rows in zip(sources, index, strict=True)):
            return None
        images = np.zeros((*index.shape, *sources[0].data.image_size, 3), np.uint8)  # padding may be anything
        for image, source, rows, real in zip(images, sources, index, valid, strict=True):
            if real.any():
                distinct, position = np.unique(rows[real], return_inverse=True)
                image[real] = source.data.images(distinct)[position]
        return images

    def _embed(self, block: Block, images: np.ndarray | None) -> PyTree:
        layout = self._layout
        sources, (index, valid) = self._share(block)
        axis = layout.rows(block.index.shape[2])
        sharding = layout.named(None, axis)
        local = layout.local().named(None, axis)
        if images is None:
            cached = [source.get(rows) for source, rows in zip(sources, index, strict=True)]
            stack = jnp.stack if sources[0].on_device else np.stack
            x = jax.tree.map(lambda *leaves: stack(leaves) if len(leaves) > 1 else next(iter(leaves))[None], *cached)
            x = jax.tree.map(lambda leaf, spec: leaf.astype(spec.dtype), jax.device_put(x, local), sources[0].spec)
        else:
            x = embed_program(self._embed_fn, layout, axis)(self._frozen.local, jax.device_put(images, local))
            for c, source in enumerate(sources):
                if source.caches:
                    source.put(index[c], valid[c], jax.tree.map(lambda leaf, c=c: leaf[c], x))
            if sources[0].caches:
                x = sources[0].rounded(x)
        return jax.tree.map(lambda leaf: layout.join(leaf, sharding, (*block.index.shape, *leaf.shape[3:])), x)


class Placed(NamedTuple):
    """Weights, or photographs, on all devices."""

    everywhere: Frozen
    """For the programs over all devices."""
    local: Frozen
    """For those over this process's devices; the same memory."""


def place(frozen: Frozen, layout: Layout) -> Placed:
    """Copies weights to every device."""
    if layout.mesh is None:
        return Placed(frozen, frozen)
    local = jax.device_put(frozen, layout.local().replicated())
    whole = jax.tree.map(lambda leaf: layout.join(leaf, layout.replicated(), leaf.shape), local)
    return Placed(whole, local)
