"""Which images a stage sees when."""

import functools
import math
from collections.abc import Sequence

import jax
import numpy as np

from jaxad.base import Key, Stage
from jaxad.driver.embedding import Block
from jaxad.driver.mesh import Layout

CHUNK = 8
"""Steps of one `lax.scan`, in stages that see images more than once; a CPU takes them one by one."""


def chunk_steps() -> int:
    """How many steps one call of a compiled program takes."""
    return 1 if jax.default_backend() == "cpu" else CHUNK


def chunks_in_flight(layout: Layout) -> int:
    """Chunks that the device still computes while the host reads the losses of earlier ones.

    None on meshes of CPU devices, whose collective operations would get mixed up.
    """
    return 0 if jax.default_backend() == "cpu" and layout.mesh is not None else 1


def next_multiple(n: int, of: int) -> int:
    """The smallest multiple of `of` that is at least n."""
    return -(-n // of) * of


class Schedule:
    """The images of every step of a stage, for each class: full shuffled batches, or all images in order.

    The last batch of a stage that does not shuffle is filled up with its own images, marked as not valid. A stage that
    shuffles gets full batches of real images; a class of fewer images than a batch sees them several times in one.

    Args:
        stage: Of a method.
        sizes: Number of training images of each class.
        keys: One a class, for the order of images.
        batch_size: Images of a step, where the stage does not say.
        shards: Devices that share the images of a step.
    """

    def __init__(self, stage: Stage, sizes: Sequence[int], keys: Key, batch_size: int, shards: int) -> None:
        self._shuffle, self._keys = stage.shuffle, keys
        self._images = [np.asarray(stage.rows(n)) for n in sizes]
        counts = [len(images) for images in self._images]
        size = stage.batch_size or batch_size
        self.batch_size = size if stage.shuffle else next_multiple(size, shards)
        per_epoch = [max(1, n // size) if stage.shuffle else math.ceil(n / self.batch_size) for n in counts]
        self.steps_per_epoch = np.array(per_epoch)
        """Of each class."""
        self.steps = self.steps_per_epoch * stage.epochs
        """Of each class."""
        self.total = int(self.steps.max())
        self.images = sum(counts) * stage.epochs
        self.chunk = chunk_steps() if stage.epochs > 1 else 1
        self._order = functools.lru_cache(2 * len(counts))(self._draw)

    def seen(self, steps: int) -> int:
        """Images seen after so many steps, rounded."""
        return round(self.images * steps / self.total)

    def block(self, step: int) -> Block:
        """The images of the chunk that begins with that step."""
        steps = range(step, min(step + self.chunk, self.total))
        parts = [[self._rows(c, min(t, last - 1)) for t in steps] for c, last in enumerate(self.steps.tolist())]
        index = np.stack([np.stack([np.resize(rows, self.batch_size) for rows in part]) for part in parts])
        real = np.array([[len(rows) for rows in part] for part in parts])
        active = np.arange(steps.start, steps.stop) < self.steps[:, None]
        return Block(index, (np.arange(self.batch_size) < real[..., None]) & active[..., None])

    def _rows(self, c: int, step: int) -> np.ndarray:
        epoch, step = divmod(step, int(self.steps_per_epoch[c]))
        return self._order(c, epoch)[step * self.batch_size : (step + 1) * self.batch_size]

    def _draw(self, c: int, epoch: int) -> np.ndarray:
        images = self._images[c]
        n = len(images)
        if not self._shuffle:
            return images
        order = np.asarray(jax.random.permutation(jax.random.fold_in(self._keys[c], (1 << 29) + epoch), n))
        return images[np.resize(order, max(n, self.batch_size))]
