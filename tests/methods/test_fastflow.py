"""FastFlow: what its loss and scores are made of, against numpy."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.base import Batch
from jaxad.methods.fastflow import fastflow

KEY = jax.random.key(0)


def normal(seed: int, *shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def spec_of(x: Any, n: int = 8) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((n, *leaf.shape[1:]), leaf.dtype), x)


def batch_of(x: Any, n: int, progress: float = 0.5) -> Batch:
    zeros = jnp.zeros(n, jnp.int32)
    return Batch(x, jnp.ones(n, bool), zeros, None, jnp.arange(n, dtype=jnp.int32), jnp.float32(progress))


def train(method: Any, x: Any, n: int, steps: int) -> tuple[Any, list[float]]:
    """The state after some steps of the first stage, with their losses."""
    state = method.init(KEY, None, spec_of(x))
    update, losses = jax.jit(method.stages[0].update), []
    for step in range(steps):
        state, metrics = update(jax.random.fold_in(KEY, step), state, None, batch_of(x, n, step / steps))
        losses.append(float(metrics["loss"]))
    return state, losses


def test_fastflow_before_training():
    """A flow near the identity: the loss and the likelihoods are those of the normalized features."""
    method = fastflow(backbone="pdn_small", layers=("layer1",), image_size=(8, 8), flow_steps=2, epochs=1)
    x = {"layer1": 3 * normal(0, 4, 4, 4, 6) + 1}
    state = method.init(KEY, None, spec_of(x))
    quiet = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0 * leaf if "subnet" in jax.tree_util.keystr(path) else leaf, state.trained.params
    )
    state = state._replace(trained=state.trained._replace(params=quiet))
    found = np.asarray(x["layer1"], np.float64)
    mean, std = (f(found, axis=(1, 2, 3), keepdims=True) for f in (np.mean, np.std))
    found = (found - mean) / np.sqrt(std**2 + 1e-5)
    _, metrics = jax.jit(method.stages[0].update)(KEY, state, None, batch_of(x, 4))
    np.testing.assert_allclose(metrics["loss"], 0.5 * (found**2).sum((1, 2, 3)).mean(), rtol=1e-4)
    scores = jax.jit(method.score)(method.stages[0].finalize(KEY, state, None), None, x)
    likelihood = np.exp(-0.5 * (found**2).mean(-1))
    corner = scores.pixel[:, 0, 0]  # bilinear upsampling repeats the border
    np.testing.assert_allclose(corner, 1 - likelihood[:, 0, 0], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(scores.image, scores.pixel.max((1, 2)))


def test_training_raises_the_likelihood():
    method = fastflow(
        backbone="pdn_small", layers=("layer1",), image_size=(8, 8), flow_steps=2, epochs=1, learning_rate=1e-2
    )
    _, losses = train(method, {"layer1": 3 * normal(1, 4, 4, 4, 6)}, 4, 12)
    assert losses[-1] < losses[0] - 0.01 * abs(losses[0])


@pytest.mark.parametrize(
    ("hyperparameter", "rule"),
    [
        ({"flow_steps": 3}, "flow_steps must be even, or conv3x3_only be set, got 3"),
        ({"clamp": 0.0}, "clamp must be above 0, got 0"),
        ({"epochs": 0}, "epochs must be 1 or more, got 0"),
    ],
)
def test_bad_hyperparameters(hyperparameter, rule):
    with pytest.raises(ValueError, match=rule):
        inspect.unwrap(fastflow)(**{"backbone": "pdn_small"} | hyperparameter)
