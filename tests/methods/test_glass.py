"""GLASS: its heat map against numpy, what it learns, and the shapes of its anomalies."""

import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.backbones import backbone, features
from jaxad.base import Batch
from jaxad.methods.glass import drawn_mask, glass
from jaxad.ops.heatmap import patch_features, upsample_blur

module = importlib.import_module("jaxad.methods.glass")
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


@pytest.mark.parametrize("hypothesis", ["manifold", "hypersphere"])
def test_the_loss_tells_both_kinds_of_anomalies(frozen, monkeypatch, hypothesis):
    """With anomalies that are known and no steps up, against float64."""
    mask = np.zeros((32, 32), bool)
    mask[4:12, 6:20] = True
    monkeypatch.setattr(module, "drawn_mask", lambda key, within: jnp.asarray(mask))
    monkeypatch.setattr(module, "blended", lambda image, source, mask, opacity: 1 - image)

    def ascend(loss, x, steps, length, every, project):
        assert (steps, length, every) == (OPTIONS["ascent_steps"], 1e-3, 5)  # those of the official code
        return project(x)

    monkeypatch.setattr(module, "ascend", ascend)
    method = glass(**OPTIONS, hypothesis=hypothesis, noise=0.3, hard_quantile=0.25)
    x = jax.jit(method.embed)(frozen, IMAGES)
    state = jax.jit(lambda key: method.init(key, frozen, x))(KEY)
    mean = np.random.default_rng(1).normal(size=state.total.shape).astype(np.float32)
    trained = method.stages[0].finalize(KEY, state._replace(total=jnp.asarray(4 * mean), images=jnp.float32(4)), frozen)
    valid = np.array([True, True, True, False])
    index = jnp.arange(4, dtype=jnp.int32)
    batch = Batch(x, jnp.asarray(valid), jnp.zeros(4, jnp.int32), None, index, jnp.float32(0))
    after, metrics = jax.jit(method.stages[1].update)(KEY, trained, frozen, batch)

    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), trained.trained.params)
    raw = np.asarray(patch_features(x, LAYERS), np.float64)
    zeroed = jnp.asarray(np.where(valid[:, None, None, None], IMAGES, 0), jnp.float32) / 255
    spoiled = patch_features(jax.jit(features("pdn_small", LAYERS))(frozen, 1 - zeroed), LAYERS)
    noise = 0.3 * np.asarray(jax.random.normal(jax.random.split(KEY)[1], raw.shape), np.float64)
    own, local, center = (
        a @ params["adaptor"] for a in (raw, np.asarray(spoiled, np.float64), mean.astype(np.float64))
    )
    own, local, noise = (a[valid] for a in (own, local, noise))
    there = np.broadcast_to(mask.reshape(8, 4, 8, 4).any((1, 3)), (3, 8, 8))

    def shell(x, center, radius):
        away = np.linalg.norm(x - center, axis=-1, keepdims=True)
        return center + (x - center) * np.clip(away, radius, 2 * radius) / away

    def chance(x):
        hidden = x @ params["discriminator"]["hidden"]["kernel"]
        y = (hidden - hidden.mean((0, 1, 2))) / np.sqrt(hidden.var((0, 1, 2)) + 1e-5)
        y = np.where(y > 0, y, 0.2 * y) @ params["discriminator"]["head"]["kernel"]
        return 1 / (1 + np.exp(-y[..., 0]))

    distances = [np.linalg.norm(part - center, axis=-1) for part in (local, own)]
    radius = np.quantile(np.concatenate([distances[0][~there], distances[1].ravel()]), 0.75)
    spherical = hypothesis == "hypersphere"
    moved = shell(own + noise, center, radius) if spherical else shell(own + noise, own, 0.5)
    if spherical:
        local = np.where(there[..., None], shell(local, center, 2 * radius), local)
    normal, anomalous = np.split(chance(np.concatenate([own, moved])), 2)
    expected = -np.log(1 - normal).mean() - np.log(anomalous).mean()
    found = chance(local)
    wrong, met = (found - there) ** 2, np.where(there, found, 1 - found)
    expected += (-((1 - met) ** 2) * np.log(met))[wrong >= np.quantile(wrong, 0.25)].mean()
    np.testing.assert_allclose(metrics["loss"], expected, rtol=5e-3)
    assert after.running["norm"]["mean"].shape == (8,)


def test_shapes_are_one_of_perlin_noise_or_of_two():
    left = jnp.zeros((64, 48), bool).at[:, :24].set(True)
    for within in (jnp.ones((64, 48), bool), left):
        masks = jax.jit(jax.vmap(lambda key, within=within: drawn_mask(key, within)))(jax.random.split(KEY, 40))
        share = np.asarray(masks).mean((1, 2))
        assert masks.shape == (40, 64, 48) and share.min() > 0 and share.mean() < 0.4
        assert not (masks & ~within).any()


def test_an_unknown_hypothesis_is_refused():
    with pytest.raises(ValueError, match="must be manifold or hypersphere, got sphere"):
        inspect.unwrap(glass)(backbone="pdn_small", hypothesis="sphere")
