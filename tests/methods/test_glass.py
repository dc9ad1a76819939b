"""GLASS: its heat map and loss against numpy, a short training, and the shapes of its anomalies."""

import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.backbones import backbone, features
from jaxad.base import Batch
from jaxad.methods.glass import glass, random_shape
from jaxad.ops.heatmap import patch_features, upsample_blur

module = importlib.import_module("jaxad.methods.glass")
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
    """The fitted state, the loss of every step, and the embedded images."""
    x = jax.jit(method.embed)(frozen, IMAGES)
    batch, (measure, train) = batch_of(x), method.stages
    state, _ = jax.jit(measure.update)(KEY, measure.init(KEY, None, frozen, x), frozen, batch)
    mean = measure.finalize(KEY, state, frozen)
    np.testing.assert_allclose(mean, np.asarray(patch_features(x, LAYERS)).mean(0), rtol=1e-4, atol=1e-5)
    state, losses, update = jax.jit(train.init)(KEY, mean, frozen, None), [], jax.jit(train.update)
    for i in range(steps):
        state, metrics = update(jax.random.key(i), state, frozen, batch)
        losses.append(float(metrics["loss"]))
    return train.finalize(KEY, state, frozen), losses, x


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(hypothesis="manifold", on_foreground=True), dict(hypothesis="hypersphere")])
def test_training_lowers_the_loss_and_the_heat_map_is_the_discriminators(frozen, options):
    method = glass(**OPTIONS, **options, learning_rate=5e-3, noise=0.3)
    fitted, losses, x = train(method, frozen, 25)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])
    scores = jax.jit(method.score)(fitted, frozen, x)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), fitted.params)
    assert jax.eval_shape(features("pdn_small", LAYERS), frozen, IMAGES)["layer1"].shape[1:3] == (8, 8)
    hidden = np.asarray(patch_features(x, LAYERS), np.float64) @ params["adaptor"]
    hidden = hidden @ params["discriminator"]["hidden"]["kernel"]
    stats, norm = fitted.stats["norm"], params["discriminator"]["norm"]
    y = (hidden - np.asarray(stats["mean"])) / np.sqrt(np.asarray(stats["var"]) + 1e-5)
    y = y * norm["scale"] + norm["bias"]
    logit = (np.where(y > 0, y, 0.2 * y) @ params["discriminator"]["head"]["kernel"])[..., 0]
    probability = 1 / (1 + np.exp(-logit))
    np.testing.assert_allclose(scores.image, probability.max((1, 2)), atol=1e-3)
    pixel = upsample_blur(jnp.asarray(probability, jnp.float32), (32, 32), 1.0)
    np.testing.assert_allclose(scores.pixel, pixel, atol=1e-3)


@pytest.mark.parametrize("hypothesis", ["manifold", "hypersphere"])
def test_loss(frozen, monkeypatch, hypothesis):
    """With a given anomaly and a projection in place of the ascent, against float64."""
    mask = np.zeros((32, 32), bool)
    mask[4:12, 6:20] = True
    monkeypatch.setattr(module, "random_shape", lambda key, allowed: jnp.asarray(mask))
    monkeypatch.setattr(module, "blend", lambda image, source, mask, opacity: 1 - image)

    def ascend(loss, x, steps, length, every, project):
        assert (steps, length, every) == (OPTIONS["ascent_steps"], 1e-3, 5)  # those of the official code
        return project(x)

    monkeypatch.setattr(module, "ascend", ascend)
    method = glass(**OPTIONS, hypothesis=hypothesis, noise=0.3, hard_quantile=0.25)
    x = jax.jit(method.embed)(frozen, IMAGES)
    shape = jax.eval_shape(lambda x: patch_features(x, LAYERS), x).shape[1:]
    mean = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    training = jax.jit(method.stages[1].init)(KEY, jnp.asarray(mean), frozen, None)
    updated, metrics = jax.jit(method.stages[1].update)(KEY, training, frozen, batch_of(x))

    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), training.model.params)
    raw = np.asarray(patch_features(x, LAYERS), np.float64)
    inverted = 1 - jnp.asarray(IMAGES, jnp.float32) / 255
    inverted = patch_features(jax.jit(features("pdn_small", LAYERS))(frozen, inverted), LAYERS)
    noise = 0.3 * np.asarray(jax.random.normal(jax.random.split(KEY)[1], raw.shape), np.float64)
    normal, local, center = (
        a @ params["adaptor"] for a in (raw, np.asarray(inverted, np.float64), mean.astype(np.float64))
    )
    mask = np.broadcast_to(mask.reshape(8, 4, 8, 4).any((1, 3)), (4, 8, 8))

    def shell(x, center, radius):
        distance = np.linalg.norm(x - center, axis=-1, keepdims=True)
        return center + (x - center) * np.clip(distance, radius, 2 * radius) / distance

    def probability(x):
        hidden = x @ params["discriminator"]["hidden"]["kernel"]
        y = (hidden - hidden.mean((0, 1, 2))) / np.sqrt(hidden.var((0, 1, 2)) + 1e-5)
        y = np.where(y > 0, y, 0.2 * y) @ params["discriminator"]["head"]["kernel"]
        return 1 / (1 + np.exp(-y[..., 0]))

    distances = [np.linalg.norm(part - center, axis=-1) for part in (local, normal)]
    radius = np.quantile(np.concatenate([distances[0][~mask], distances[1].ravel()]), 0.75)
    spherical = hypothesis == "hypersphere"
    moved = shell(normal + noise, center, radius) if spherical else shell(normal + noise, normal, 0.5)
    if spherical:
        local = np.where(mask[..., None], shell(local, center, 2 * radius), local)
    of_normal, of_global = np.split(probability(np.concatenate([normal, moved])), 2)
    expected = -np.log(1 - of_normal).mean() - np.log(of_global).mean()
    of_local = probability(local)
    errors, of_label = (of_local - mask) ** 2, np.where(mask, of_local, 1 - of_local)
    expected += (-((1 - of_label) ** 2) * np.log(of_label))[errors >= np.quantile(errors, 0.25)].mean()
    np.testing.assert_allclose(metrics["loss"], expected, rtol=5e-3)
    assert updated.model.stats["norm"]["mean"].shape == (8,)


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
