"""How a method runs: on which devices, in which portions, with what kept on the way."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from jaxad.driver.embedding import EmbeddingCache

Progress = Callable[[str, int, int], None]
"""(part, images done, images in all), called after every batch; images in all is 0 where there is nothing to count."""


class Checkpoint(NamedTuple):
    """Where a fit keeps its state, so that a killed one, called again with the same arguments, resumes."""

    directory: str | Path
    """Of this fit alone; delete it to start afresh."""
    seconds: float = 60.0
    """Least time between two checkpoints."""


class Execution(NamedTuple):
    """How a fit or a scoring runs; one value from the command line to the driver. It changes no result."""

    mesh: Mesh | None = None
    """Of `make_mesh`: classes are sharded over its axis "class", images and large parts of a state over "data". None:
    one device."""
    classes_per_step: int | None = None
    """Classes in memory at the same time; the next ones follow in the same compiled programs. None: all."""
    batch_size: int = 16
    """Images of each class at a time, where the stage does not ask for its own number; on a mesh the next multiple of
    the devices along "data"."""
    cache: EmbeddingCache | None = None
    """Embedded images, shared between calls."""
    checkpoint: Checkpoint | None = None
    progress: Progress | None = None
