"""SimpleNet: its loss and heat map against numpy, and what its discriminator learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.base import Batch
from jaxad.methods.simplenet import simplenet
from jaxad.ops.heatmap import neighborhood_mean, stack_maps, upsample_blur

KEY = jax.random.key(0)
SHAPES = {"layer1": (8, 8, 3), "layer2": (4, 4, 5)}
OPTIONS = dict(backbone="pdn_small", layers=tuple(SHAPES), image_size=(16, 16), hidden=6, noise=0.5, sigma=1.0)
X = {
    layer: jnp.asarray(np.random.default_rng(i).normal(size=(3, *shape)), jnp.float32)
    for i, (layer, shape) in enumerate(SHAPES.items())
}
PATCHES = np.asarray(stack_maps([neighborhood_mean(x, 3) for x in X.values()]), np.float64)


def numbers(params, mean, var, x):
    """What the discriminator says of features, in float64."""
    hidden = x @ params["discriminator"]["hidden"]["kernel"]
    norm = params["discriminator"]["norm"]
    y = (hidden - mean) / np.sqrt(var + 1e-5) * norm["scale"] + norm["bias"]
    return (np.where(y > 0, y, 0.2 * y) @ params["discriminator"]["head"]["kernel"])[..., 0], hidden


def batch(x, valid):
    index = jnp.arange(3, dtype=jnp.int32)
    return Batch(x, jnp.asarray(valid), jnp.zeros(3, jnp.int32), None, index, jnp.float32(0))


@pytest.fixture(scope="module")
def method():
    return simplenet(**OPTIONS, learning_rate=1e-2, adaptor_learning_rate=1e-2)


@pytest.fixture(scope="module")
def state(method):
    return jax.jit(lambda key: method.init(key, None, X))(KEY)


def test_loss_has_a_margin_on_both_sides(method, state):
    valid = np.array([True, True, False])
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.trained.params)
    normal = PATCHES @ params["adaptor"]
    noisy = normal + 0.5 * np.asarray(jax.random.normal(KEY, PATCHES.shape))
    both = np.concatenate([normal[valid], noisy[valid]])
    _, hidden = numbers(params, 0, 1, both)
    scores, _ = numbers(params, hidden.mean((0, 1, 2)), hidden.var((0, 1, 2)), both)
    expected = np.maximum(0.5 - scores[:2], 0).mean() + np.maximum(0.5 + scores[2:], 0).mean()
    dirty = {layer: jnp.where(valid[:, None, None, None], m, jnp.nan) for layer, m in X.items()}
    after, metrics = jax.jit(method.stages[0].update)(KEY, state, None, batch(dirty, valid))
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
    np.testing.assert_allclose(after.running["norm"]["mean"], 0.1 * hidden.mean((0, 1, 2)), atol=1e-5)


def test_it_learns_to_tell_normal_features_from_noisy_ones(method, state):
    update = jax.jit(method.stages[0].update)
    for i in range(150):
        state, metrics = update(jax.random.key(i), state, None, batch(X, np.ones(3, bool)))
    fitted = method.stages[0].finalize(KEY, state, None)
    score = jax.jit(method.score)
    found = score(fitted, None, X)
    rng = np.random.default_rng(5)
    away = {layer: x + rng.normal(size=x.shape).astype(np.float32) * 2 for layer, x in X.items()}
    assert metrics["loss"] < 0.9 and score(fitted, None, away).image.min() > found.image.max()

    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), fitted.params)
    normal = PATCHES @ params["adaptor"]
    running = fitted.running["norm"]
    scores, _ = numbers(params, np.asarray(running["mean"]), np.asarray(running["var"]), normal)
    pixel = np.asarray(upsample_blur(jnp.asarray(-scores, jnp.float32), (16, 16), 1.0))
    np.testing.assert_allclose(found.pixel, pixel, atol=2e-3)
    np.testing.assert_allclose(found.image, (-scores).max((1, 2)), atol=2e-3)
