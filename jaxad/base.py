"""The contract: a method is a NamedTuple of pure functions, in the manner of `optax.GradientTransformation`.

Nothing here touches files, devices or epochs; the driver (`jaxad.fit`) does. This module imports nothing of the rest.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

PyTree = Any
"""Any nesting of arrays."""
Key = jax.Array
"""A JAX random key."""
State = Any
"""What a method has learned: a NamedTuple of arrays, of fixed shape within a stage."""
Frozen = Any
"""Pretrained weights: an explicit argument, shared by all classes, never part of the state."""
Metrics = dict[str, Array]
"""Diagnostics of one update; an entry named `loss` is watched for non-finite values by the driver."""


class Batch(NamedTuple):
    """What `Stage.update` sees of the data. All leaves but `progress` lead with the batch axis `b`."""

    x: PyTree
    """What `Method.embed` made of the images."""
    valid: Bool[Array, "b"]
    """False marks padding, which never changes any result."""
    label: Int[Array, "b"]
    """0 normal, 1 anomalous; only semi-supervised methods read it."""
    mask: Bool[Array, "b h w"] | None
    """Defect pixels, or None where the data have no masks."""
    index: Int[Array, "b"]
    """Position of the image in the training set; smaller than the leading size of `spec`."""
    progress: Any = None
    """Float[Array, ""], always given by the driver: the share of the stage's steps that are done, in [0, 1)."""


class Scores(NamedTuple):
    """Anomaly scores of a batch: higher is more anomalous, float32, never normalized."""

    image: Float[Array, "b"]
    pixel: Float[Array, "b h w"] | None


EmbedFn = Callable[[Frozen, Array], PyTree]
InitFn = Callable[[Key, Frozen, PyTree], State]
UpdateFn = Callable[[Key, State, Frozen, Batch], tuple[State, Metrics]]
FinalizeFn = Callable[[Key, State, Frozen], State]
VaryFn = Callable[[State, Array], State]
ScoreFn = Callable[[State, Frozen, PyTree], Scores]


def keep_state(key: Key, state: State, frozen: Frozen) -> State:
    """The `finalize` of a stage that hands its state on as it is."""
    del key, frozen
    return state


class Stage(NamedTuple):
    """One part of learning: `update` for every batch, then `finalize` once (whose result may have another type)."""

    name: str
    update: UpdateFn
    finalize: FinalizeFn = keep_state
    epochs: int = 1
    """Passes over the training set."""
    batch_size: int | None = None
    """Images per update where the result depends on it (gradient stages); None leaves it to the driver."""
    shuffle: bool = False
    """Draw every epoch in a fresh random order, from valid rows only and in full batches (gradient stages)."""
    rows: Callable[[int], np.ndarray] = np.arange
    """Number of training images -> the positions of those that the stage sees, at least one; all, unless a stage holds
    some out for another."""


class Method(NamedTuple):
    """A published method, bound to its hyper-parameters by its factory.

    Where a part of the state grows with the training images, rows for images that are not there lie at the end of its
    axes: the state for fewer images is the leading corner of that for more.
    """

    embed: EmbedFn
    """(frozen, image) -> x. All that happens to an image (b h w 3, uint8 or float in [0, 1]) before anything is
    learned; computed once, cacheable, and shared between methods that use the same function."""
    init: InitFn
    """(key, frozen, spec) -> state. `spec` holds `jax.ShapeDtypeStruct`s of the whole embedded training set: the leaves
    of `x` with the number of training images, padding included, as their leading axis."""
    stages: tuple[Stage, ...]
    score: ScoreFn
    """(state, frozen, x) -> Scores. Deterministic and per image: no key, no batch statistics."""
    vary: tuple[tuple[str, VaryFn], ...] = ()
    """Hyper-parameters that a fitted state can still change, by name: (state, value) -> the state of a fit with that
    value, for values up to the method's own. A sweep over them is one more mapped axis."""
    auxiliary: Literal["none", "optional", "needed"] = "none"
    """Whether it learns from photographs of other things too: uint8 n h w 3 in `frozen["auxiliary"]`."""
