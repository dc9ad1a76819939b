"""GLASS: its heat map against numpy, what it learns, and the shapes of its anomalies."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.backbones import backbone, features
from jaxad.base import Batch
from jaxad.methods.glass import drawn_mask, glass
from jaxad.ops.heatmap import patch_features, upsample_blur

KEY = jax.random.key(0)
LAYERS = ("layer1", "layer2")
IMAGES = np.random.default_rng(0).integers(90, 160, (4, 32, 32, 3), np.uint8)
OPTIONS = dict(backbone="pdn_small", layers=LAYERS, image_size=(32, 32), hidden=8, ascent_steps=5, sigma=1.0)


@pytest.fixture(scope="module")
def frozen():
    return backbone("pdn_small").init(jax.random.key(1))


def trained(method, frozen, steps):
    x = jax.jit(method.embed)(frozen, IMAGES)
    index = jnp.arange(4, dtype=jnp.int32)
    batch = Batch(x, jnp.ones(4, bool), jnp.zeros(4, jnp.int32), None, index, jnp.float32(0))
    state = jax.jit(lambda key: method.init(key, frozen, x))(KEY)
    measure, train = method.stages
    state, _ = jax.jit(measure.update)(KEY, state, frozen, batch)
    state, losses, update = measure.finalize(KEY, state, frozen), [], jax.jit(train.update)
    mean = np.asarray(patch_features(x, LAYERS)).mean(0)
    np.testing.assert_allclose(state.mean, mean, rtol=1e-4, atol=1e-5)
    for i in range(steps):
        state, metrics = update(jax.random.key(i), state, frozen, batch)
        losses.append(float(metrics["loss"]))
    return train.finalize(KEY, state, frozen), losses, x


@pytest.mark.parametrize("options", [dict(hypothesis="manifold", on_foreground=True), dict(hypothesis="hypersphere")])
def test_it_learns_to_tell_anomalies(frozen, options):
    method = glass(**OPTIONS, **options, learning_rate=5e-3, noise=0.3)
    fitted, losses, x = trained(method, frozen, 25)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])
    scores = jax.jit(method.score)(fitted, frozen, x)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), fitted.params)
    patches = np.asarray(jax.jit(features("pdn_small", LAYERS))(frozen, IMAGES)["layer1"])
    assert patches.shape[1:3] == (8, 8)
    hidden = np.asarray(patch_features(x, LAYERS), np.float64) @ params["adaptor"]
    hidden = hidden @ params["discriminator"]["hidden"]["kernel"]
    running, norm = fitted.running["norm"], params["discriminator"]["norm"]
    y = (hidden - np.asarray(running["mean"])) / np.sqrt(np.asarray(running["var"]) + 1e-5)
    y = y * norm["scale"] + norm["bias"]
    logit = (np.where(y > 0, y, 0.2 * y) @ params["discriminator"]["head"]["kernel"])[..., 0]
    probability = 1 / (1 + np.exp(-logit))
    np.testing.assert_allclose(scores.image, probability.max((1, 2)), atol=1e-3)
    pixel = upsample_blur(jnp.asarray(probability, jnp.float32), (32, 32), 1.0)
    np.testing.assert_allclose(scores.pixel, pixel, atol=1e-3)


def test_shapes_are_one_of_perlin_noise_or_of_two():
    masks = jax.jit(jax.vmap(lambda key: drawn_mask(key, (64, 48))))(jax.random.split(KEY, 60))
    share = np.asarray(masks).mean((1, 2))
    assert masks.shape == (60, 64, 48) and 0.02 < share.mean() < 0.4 and (share == 0).mean() < 0.6


def test_an_unknown_hypothesis_is_refused():
    with pytest.raises(ValueError, match="must be manifold or hypersphere, got sphere"):
        inspect.unwrap(glass)(backbone="pdn_small", hypothesis="sphere")
