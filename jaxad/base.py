"""The contract: a method is a NamedTuple of pure functions, in the manner of `optax.GradientTransformation`.

Nothing here touches files, devices or epochs; the driver (`jaxad.driver`) does. This module imports nothing of the
rest.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

PyTree = Any
"""Any nesting of arrays."""
Key = jax.Array
"""A JAX random key."""
State = Any
"""What a method has learned: a NamedTuple of arrays, of fixed shape within a stage."""
Frozen = Any
"""Pretrained weights: an explicit argument, shared by all classes, never part of the state."""
Metrics = dict[str, Array]
"""Diagnostics of one update; the driver watches an entry named `loss` for values that are not finite."""


class Batch(NamedTuple):
    """What `Stage.update` sees of the data. All leaves but `progress` and `auxiliary` lead with the batch axis `b`."""

    x: PyTree
    """What `Method.embed` made of the images."""
    valid: Bool[Array, "b"]
    """False marks padding, which never changes a result; in a stage with `shuffle` all are True."""
    label: Int[Array, "b"]
    """0 normal, 1 anomalous; only semi-supervised methods read it."""
    mask: Bool[Array, "b h w"] | None
    """Defect pixels, or None where the data have no masks."""
    index: Int[Array, "b"]
    """Position of the image in the training set; smaller than the leading size of `spec`."""
    progress: Any = None
    """Float[Array, ""], always given by the driver: the share of the stage's steps that are done, in [0, 1)."""
    auxiliary: UInt8[Array, "n _ _ 3"] | None = None
    """Photographs of other things, where the method asks for them (`Method.auxiliary`) and they are given."""


class Scores(NamedTuple):
    """Anomaly scores of a batch: higher is more anomalous, float32, never normalized."""

    image: Float[Array, "b"]
    pixel: Float[Array, "b h w"] | None


Ignored = Bool[Array, "b H W"] | None
"""Pixels of images that no image score may come from; None: all count."""
EmbedFn = Callable[[Frozen, Array], PyTree]
InitFn = Callable[[Key, State, Frozen, PyTree], State]
UpdateFn = Callable[[Key, State, Frozen, Batch], tuple[State, Metrics]]
FinalizeFn = Callable[[Key, State, Frozen], State]
VaryFn = Callable[[State, Array], State]
ScoreFn = Callable[..., Scores]


def keep_state(key: Key, state: State, frozen: Frozen) -> State:
    """The `finalize` of a stage that leaves its state as it is."""
    del key, frozen
    return state


class Stage(NamedTuple):
    """One part of learning: `init` once, `update` for every batch, `finalize` once."""

    name: str
    init: InitFn
    """(key, state, frozen, spec) -> the state of this stage, made from what the stage before left (None before the
    first one). `spec` holds `jax.ShapeDtypeStruct`s of the whole embedded training set: the leaves of `x` with the
    number of training images, padding included, as their leading axis."""
    update: UpdateFn
    """(key, state, frozen, batch) -> the state after the batch, of the same shapes and types, and diagnostics."""
    finalize: FinalizeFn = keep_state
    """(key, state, frozen) -> what the next stage, or scoring, starts from; nothing else."""
    epochs: int = 1
    """Passes over the training set."""
    batch_size: int | None = None
    """Images per update where the result depends on it (gradient stages); None leaves it to the driver."""
    shuffle: bool = False
    """Draw every epoch in a fresh random order, in full batches of real images (gradient stages). Only a stage without
    it ever sees padding."""
    rows: Callable[[int], np.ndarray] = np.arange
    """Number of training images -> the positions of those that the stage sees, at least one; all, unless a stage holds
    some out for another."""


class Auxiliary(NamedTuple):
    """That a method learns from photographs of other things too, at the size of the images."""

    needed: bool = False
    """Whether it cannot do without; otherwise it makes up what it needs."""
    inner_half: bool = False
    """Whether a photograph is enlarged to twice the size, of which the inner half is cut out; else it is resized."""


class Method(NamedTuple):
    """A published method, bound to its hyperparameters by its factory.

    Where a part of the state grows with the training images, rows for images that are not there lie at the end of its
    axes: the state for fewer images is the leading corner of that for more.
    """

    embed: EmbedFn
    """(frozen, image) -> x. All that happens to an image (b h w 3, uint8 or float in [0, 1]) before anything is
    learned; computed once, cacheable, and shared between methods that use the same function."""
    stages: tuple[Stage, ...]
    score: ScoreFn
    """(state, frozen, x) -> Scores. Deterministic and per image: no key, no batch statistics.

    Where image scores are made from scores of positions, a fourth argument, `ignore: Ignored = None`, says which pixels
    must not enter. What the pixels hold never does: the driver has filled them."""
    vary: tuple[tuple[str, VaryFn], ...] = ()
    """Hyperparameters that a fitted state can still change, by name: (state, value) -> the state of a fit with that
    value, for values up to the method's own. A sweep over them is one more mapped axis."""
    auxiliary: Auxiliary | None = None
    """What it asks of auxiliary photographs; None: it never looks at any."""
    labels: bool = False
    """Whether it learns from labeled anomalies (`Batch.label`, `Batch.mask`) too."""
    pretrained: bool = True
    """Whether it reads `frozen` at all; without, no backbone is loaded, stored or checked."""


class MonotoneMethod(Method):
    """A method whose scores never rise when normal images are added to the fit, as distances to the nearest of all."""
