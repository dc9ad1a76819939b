"""SimpleNet: what its discriminator learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.base import Batch
from jaxad.methods.simplenet import simplenet

KEY = jax.random.key(0)
SHAPES = {"layer1": (8, 8, 3), "layer2": (4, 4, 5)}
OPTIONS = dict(backbone="pdn_small", layers=tuple(SHAPES), image_size=(16, 16), hidden=6, noise=0.5, sigma=1.0)
X = {
    layer: jnp.asarray(np.random.default_rng(i).normal(size=(3, *shape)), jnp.float32)
    for i, (layer, shape) in enumerate(SHAPES.items())
}
BATCH = Batch(X, jnp.ones(3, bool), jnp.zeros(3, jnp.int32), None, jnp.arange(3, dtype=jnp.int32), jnp.float32(0))


@pytest.fixture(scope="module")
def method():
    return simplenet(**OPTIONS, learning_rate=1e-2, adaptor_learning_rate=1e-2)


@pytest.fixture(scope="module")
def state(method):
    return jax.jit(lambda key: method.stages[0].init(key, None, None, X))(KEY)


def test_it_learns_to_tell_normal_features_from_noisy_ones(method, state):
    update = jax.jit(method.stages[0].update)
    for i in range(150):
        state, metrics = update(jax.random.key(i), state, None, BATCH)
    fitted = method.stages[0].finalize(KEY, state, None)
    score = jax.jit(method.score)
    scores = score(fitted, None, X)
    rng = np.random.default_rng(5)
    noisy = {layer: x + rng.normal(size=x.shape).astype(np.float32) * 2 for layer, x in X.items()}
    assert metrics["loss"] < 0.9 and score(fitted, None, noisy).image.min() > scores.image.max()
