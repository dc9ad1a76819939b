"""Steps of a stage on given batches, with weights that torch's module has too."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxad.base import Batch, Stage
from tests.parity.golden import synthetic

KEY = jax.random.key(0)
ADAM = optax.ScaleByAdamState, optax.ScaleByAmsgradState


def batch_of(x: Any, progress: float = 0.0, **fields: Any) -> Batch:
    """A full batch of normal images."""
    n = len(jax.tree.leaves(x)[0])
    index = jnp.arange(n, dtype=jnp.int32)
    batch = Batch(x, jnp.ones(n, bool), jnp.zeros(n, jnp.int32), None, index, jnp.float32(progress))
    return batch._replace(**fields)


def shapes_of(stage: Stage, x: Any, state: Any = None, frozen: Any = None) -> Any:
    """The state of a stage before its first step, as zeros: nothing is compiled to draw it.

    Args:
        stage: The stage.
        x: Embedded images.
        state: What the stage before has left.
        frozen: Weights of the backbone.
    """
    spec = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), x)
    shapes = jax.eval_shape(lambda state, frozen: stage.init(KEY, state, frozen, spec), state, frozen)
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def follow(stage: Stage, training: Any, batches: Sequence[Batch], frozen: Any = None) -> tuple[list[Any], list[float]]:
    """The states after a step on each batch, and the losses."""
    update, states, losses = jax.jit(stage.update), [], []
    for batch in batches:
        training, metrics = update(KEY, training, frozen, batch)
        states.append(training)
        losses.append(float(metrics["loss"]))
    return states, losses


def gradient(training: Any, decay: float = 0.9) -> Any:
    """The gradient of the first step, with weight decay if that is added to it: from Adam's first moment, or momentum.

    Args:
        training: The state after that step.
        decay: Adam's first.
    """
    moments = [
        jax.tree.map(lambda leaf: np.asarray(leaf) / np.float32(1 - decay), state.mu)
        if isinstance(state, ADAM)
        else state.trace
        for state in jax.tree.leaves(training.optimizer, is_leaf=_has_moment)
        if _has_moment(state)
    ]
    return moments[0] if len(moments) == 1 else moments


def _has_moment(state: Any) -> bool:
    return isinstance(state, (*ADAM, optax.TraceState))


def unbiased(after: Any, before: Any, count: Callable[[str], int], steps: int = 3, decay: float = 0.9) -> Any:
    """Running statistics as torch's batch norm has them, whose variances of batches are unbiased.

    Args:
        after: Ours.
        before: The same before those steps.
        count: (path) -> how many values of a batch a variance is of.
        steps: Batches.
        decay: What a batch leaves of the statistics before.
    """

    def one(path: Any, new: Any, old: Any) -> Any:
        name, rest = _text(path), decay**steps * np.asarray(old)
        factor = count(name) / (count(name) - 1) if name.endswith("var") else 1
        return (rest + (np.asarray(new) - rest) * factor).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, after, before)


def nhwc(x: Any) -> jax.Array:
    """b c h w -> b h w c."""
    return jnp.moveaxis(jnp.asarray(x), 1, -1)


def nchw(x: Any) -> np.ndarray:
    """b h w c -> b c h w."""
    return np.moveaxis(np.asarray(x), -1, 1)


AXES = {4: (3, 2, 0, 1), 3: (2, 0, 1), 2: (1, 0)}
"""Rank -> the axes of torch's tensor among flax's: kernels h w in out, affine layer norms h w c, matrices in out."""
NameOf = Callable[[str], str | Sequence[str]]
"""A leaf's path, such as "blocks/0/kernel" -> the name of torch's tensor; several for one that is stacked."""


def from_torch(tree: Any, name_of: NameOf, tensor: Callable[[str, tuple[int, ...]], np.ndarray] = synthetic) -> Any:
    """A tree of the same structure and shapes, of tensors that torch's module has.

    Args:
        tree: Arrays.
        name_of: The names of their tensors.
        tensor: (name, torch's shape) -> the tensor.
    """

    def one(name: str, leaf: np.ndarray) -> np.ndarray:
        axes = AXES.get(leaf.ndim, tuple(range(leaf.ndim)))
        return tensor(name, tuple(leaf.shape[axis] for axis in axes)).transpose(np.argsort(axes))

    def whole(path: Any, leaf: np.ndarray) -> np.ndarray:
        names = name_of(_text(path))
        if isinstance(names, str):
            return one(names, leaf)
        return np.stack([one(name, part) for name, part in zip(names, leaf, strict=True)])

    return jax.tree_util.tree_map_with_path(whole, tree)


def to_torch(tree: Any, name_of: NameOf) -> dict[str, np.ndarray]:
    """The arrays of a tree as torch's module has them, by name."""
    tensors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = name_of(_text(path))
        parts = {names: leaf} if isinstance(names, str) else dict(zip(names, leaf, strict=True))
        tensors |= {k: np.asarray(v).transpose(AXES.get(v.ndim, tuple(range(v.ndim)))) for k, v in parts.items()}
    return tensors


def under(quantity: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """The same with names below that of a quantity."""
    return {f"{quantity}/{name}": value for name, value in tensors.items()}


def _text(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
