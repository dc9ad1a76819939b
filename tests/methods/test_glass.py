"""GLASS: a short training, and the shapes of its anomalies."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.backbones import backbone
from jaxad.base import Batch
from jaxad.methods.glass import glass, random_shape

KEY = jax.random.key(0)
LAYERS = ("layer1", "layer2")
IMAGES = np.random.default_rng(0).integers(90, 160, (4, 32, 32, 3), np.uint8)
OPTIONS = dict(backbone="pdn_small", layers=LAYERS, image_size=(32, 32), hidden=8, ascent_steps=5, sigma=1.0)


@pytest.fixture(scope="module")
def frozen():
    return backbone("pdn_small").init(jax.random.key(1))


def batch_of(x):
    index = jnp.arange(4, dtype=jnp.int32)
    return Batch(x, jnp.ones(4, bool), jnp.zeros(4, jnp.int32), None, index, jnp.float32(0))


def train(method, frozen, steps):
    """The loss of every step."""
    x = jax.jit(method.embed)(frozen, IMAGES)
    batch, (measure, train) = batch_of(x), method.stages
    state, _ = jax.jit(measure.update)(KEY, measure.init(KEY, None, frozen, x), frozen, batch)
    mean = measure.finalize(KEY, state, frozen)
    state, losses, update = jax.jit(train.init)(KEY, mean, frozen, None), [], jax.jit(train.update)
    for i in range(steps):
        state, metrics = update(jax.random.key(i), state, frozen, batch)
        losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(hypothesis="manifold", on_foreground=True), dict(hypothesis="hypersphere")])
def test_training_lowers_the_loss(frozen, options):
    method = glass(**OPTIONS, **options, learning_rate=5e-3, noise=0.3)
    losses = train(method, frozen, 25)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])


def test_shapes_lie_where_they_are_allowed():
    left = jnp.zeros((64, 48), bool).at[:, :24].set(True)
    for allowed in (jnp.ones((64, 48), bool), left):
        masks = jax.jit(jax.vmap(lambda key, allowed=allowed: random_shape(key, allowed)))(jax.random.split(KEY, 40))
        share = np.asarray(masks).mean((1, 2))
        assert masks.shape == (40, 64, 48) and share.min() > 0 and share.mean() < 0.4
        assert not (masks & ~allowed).any()


def test_unknown_hypothesis_is_rejected():
    with pytest.raises(ValueError, match="must be manifold or hypersphere, got sphere"):
        inspect.unwrap(glass)(backbone="pdn_small", hypothesis="sphere")
