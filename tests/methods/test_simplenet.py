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
BATCH = Batch(X, jnp.ones(3, bool), jnp.zeros(3, jnp.int32), None, jnp.arange(3, dtype=jnp.int32), jnp.float32(0))


def discriminate(params, mean, var, x):
    """The discriminator's outputs and hidden units for given features and statistics, in float64."""
    hidden = x @ params["discriminator"]["hidden"]["kernel"]
    norm = params["discriminator"]["norm"]
    y = (hidden - mean) / np.sqrt(var + 1e-5) * norm["scale"] + norm["bias"]
    return (np.where(y > 0, y, 0.2 * y) @ params["discriminator"]["head"]["kernel"])[..., 0], hidden


@pytest.fixture(scope="module")
def method():
    return simplenet(**OPTIONS, learning_rate=1e-2, adaptor_learning_rate=1e-2)


@pytest.fixture(scope="module")
def state(method):
    return jax.jit(lambda key: method.stages[0].init(key, None, None, X))(KEY)


def test_loss_has_a_margin_on_both_sides(method, state):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.model.params)
    normal = PATCHES @ params["adaptor"]
    noisy = normal + 0.5 * np.asarray(jax.random.normal(KEY, PATCHES.shape))
    both = np.concatenate([normal, noisy])
    _, hidden = discriminate(params, 0, 1, both)
    mean, var = hidden.mean((0, 1, 2)), hidden.var((0, 1, 2))
    outputs, _ = discriminate(params, mean, var, both)
    expected = np.maximum(0.5 - outputs[:3], 0).mean() + np.maximum(0.5 + outputs[3:], 0).mean()
    state, metrics = jax.jit(method.stages[0].update)(KEY, state, None, BATCH)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
    np.testing.assert_allclose(state.model.stats["norm"]["mean"], 0.1 * mean, atol=1e-5)


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

    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), fitted.params)
    mean, var = (np.asarray(fitted.stats["norm"][name]) for name in ("mean", "var"))
    outputs, _ = discriminate(params, mean, var, PATCHES @ params["adaptor"])
    pixel = np.asarray(upsample_blur(jnp.asarray(-outputs, jnp.float32), (16, 16), 1.0))
    np.testing.assert_allclose(scores.pixel, pixel, atol=2e-3)
    np.testing.assert_allclose(scores.image, (-outputs).max((1, 2)), atol=2e-3)
