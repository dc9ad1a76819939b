"""Precise batch norm against numpy's moments of all that the batch norms have seen."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxad.training import statistics_stage
from tests.training.test_gradient import batch_of

KEY = jax.random.key(0)
DATA = np.random.default_rng(0).normal(3, [1, 20], size=(3, 4, 2)).astype(np.float32)
"""Three batches of four vectors."""


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.BatchNorm(not train, momentum=0.9, name="first")(x)
        return nn.BatchNorm(not train, momentum=0.5, name="second")(jax.nn.relu(x))


class Model(NamedTuple):
    params: Any
    stats: Any


def loss(params, model, key, frozen, batch):
    x = batch.x if hasattr(batch, "x") else batch
    variables = {"params": params, "batch_stats": model.stats}
    _, changes = Network().apply(variables, x, train=True, mutable=["batch_stats"])
    _, changes = Network().apply({"params": params, **changes}, x, train=True, mutable=["batch_stats"])
    return jnp.zeros(()), {"stats": changes["batch_stats"]}


def halves(key, model, frozen, batch):
    return batch.x.reshape(2, 2, 2)


@pytest.mark.parametrize("parts", [None, halves])
def test_statistics_are_the_moments_of_all_batches(parts):
    """Of the first batch norm, of all rows; of the second, of what the first has made of each batch."""
    variables = Network().init(KEY, jnp.zeros((1, 2)), train=True)
    model = Model(variables["params"], jax.tree.map(lambda leaf: leaf + 5, variables["batch_stats"]))
    stage = statistics_stage(loss, batch_size=4, parts=parts)
    state, update = stage.init(KEY, model, None, None), jax.jit(stage.update)
    for x in DATA:
        state, metrics = update(KEY, state, None, batch_of(x))
        assert metrics == {}
    precise = stage.finalize(KEY, state, None)
    jax.tree.map(np.testing.assert_array_equal, precise.params, model.params)

    batches = DATA.reshape(-1, 4 if parts is None else 2, 2)
    normalized = (batches - batches.mean(1, keepdims=True)) / np.sqrt(batches.var(1, keepdims=True) + 1e-5)
    for name, seen in (("first", batches), ("second", np.maximum(normalized, 0))):
        np.testing.assert_allclose(precise.stats[name]["mean"], seen.mean((0, 1)), rtol=1e-4)
        np.testing.assert_allclose(precise.stats[name]["var"], seen.var((0, 1)), rtol=1e-4)
