"""DRAEM: the official networks' shapes, what its loss adds up, and how images score."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.base import Batch
from jaxad.methods.draem import REACH, Discriminative, DraemNetworks, Reconstructive, draem
from jaxad.ops.ssim import ssim

module = importlib.import_module("jaxad.methods.draem")
KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
SMALL = dict(image_size=(32, 32), reconstructive_width=2, discriminative_width=2, learning_rate=1e-3)


def kernels(module, channels):
    made = jax.eval_shape(module.init, KEY, jnp.zeros((1, 64, 64, channels)), jnp.ones(1, bool))
    leaves = [(path, leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(made["params"])]
    return sorted(shape[2:] for path, shape in leaves if path[-1].key == "kernel")


def test_networks_have_the_official_ones_channels():
    """As model_unet.py lists them."""
    w, levels = 128, [(1, 2), (2, 4), (4, 8), (8, 8)]
    wanted = [(3, w), (w, w), *((a * w, b * w) for a, b in levels), *((b * w, b * w) for _, b in levels)]
    for features, last in ((8, 4), (4, 2), (2, 1), (1, 1)):
        wanted += [(features * w, features * w)] * 2 + [(features * w, last * w)]
    assert kernels(Reconstructive(w, sspcab=False), 3) == sorted([*wanted, (w, 3)])
    w, levels = 64, [(1, 2), (2, 4), (4, 8), (8, 8), (8, 8)]
    wanted = [(6, w), (w, w), *((a * w, b * w) for a, b in levels), *((b * w, b * w) for _, b in levels)]
    for below, features, link in ((8, 8, 8), (8, 4, 8), (4, 2, 4), (2, 1, 2), (1, 1, 1)):
        wanted += [(below * w, features * w), ((features + link) * w, features * w), (features * w, features * w)]
    assert kernels(Discriminative(w), 6) == sorted([*wanted, (w, 2)])


@pytest.fixture(scope="module")
def method():
    return draem(**SMALL)


@pytest.fixture(scope="module")
def state(method):
    return jax.jit(lambda key: method.init(key, {}, None))(KEY)


def test_an_image_scores_the_largest_mean_of_its_heat_map(method, state):
    fitted = method.stages[0].finalize(KEY, state, {})
    assert isinstance(fitted, DraemNetworks)
    scores = jax.jit(method.score)(fitted, {}, jnp.asarray(IMAGES))
    reach = round(REACH * min(scores.pixel.shape[1:]))
    padded = np.pad(np.asarray(scores.pixel, np.float64), ((0, 0), (reach,) * 2, (reach,) * 2))
    means = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1,) * 2, (1, 2)).mean((3, 4))
    np.testing.assert_allclose(scores.image, means.max((1, 2)), rtol=1e-4)


def test_the_loss_adds_up_errors_of_the_image_its_structure_and_the_mask(monkeypatch):
    """With anomalies that are known, against the networks' own outputs."""
    mask = np.zeros((32, 32), bool)
    mask[4:12, 6:20] = True
    monkeypatch.setattr(module, "textured", lambda key, image, source: (1 - image, jnp.asarray(mask)))
    monkeypatch.setattr(module, "rotate", lambda image, degrees: image)
    monkeypatch.setattr(module, "ANOMALOUS", 1.0)
    method, valid = draem(**SMALL, sspcab=True, sspcab_weight=0.3), np.array([True, True, True, False])
    state = jax.jit(lambda key: method.init(key, {}, None))(KEY)
    index = jnp.arange(4, dtype=jnp.int32)
    batch = Batch(jnp.asarray(IMAGES), jnp.asarray(valid), jnp.zeros(4, jnp.int32), None, index, jnp.float32(0.85))
    after, metrics = jax.jit(method.stages[0].update)(KEY, state, None, batch)
    image = jnp.asarray(IMAGES[:3], jnp.float32) / 255

    def of(name, network, x):
        variables = {"params": state.trained.params[name], "batch_stats": state.running[name]}
        return network.apply(variables, x, jnp.ones(3, bool), mutable=["batch_stats"])[0]

    painted, error = of("reconstructive", Reconstructive(2, True), 1 - image)
    logits = np.asarray(of("discriminative", Discriminative(2), jnp.concatenate([painted, 1 - image], -1)), np.float64)
    chance = 1 / (1 + np.exp(logits[..., 0] - logits[..., 1]))
    met = np.where(mask, chance, 1 - chance)
    expected = np.mean((np.asarray(painted) - np.asarray(image)) ** 2) + 1 - float(ssim(painted, image).mean())
    expected += np.mean(-((1 - met) ** 2) * np.log(met)) + 0.3 * float(error.mean())
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-3)
    first = jax.tree.leaves(jax.tree.map(lambda a, b: jnp.abs(a - b).max(), after.trained.params, state.trained.params))
    assert 0.15e-3 < max(map(float, first)) < 0.21e-3  # a fifth of the rate


@pytest.mark.parametrize("sspcab", [False, True])
def test_it_learns_with_and_without_textures(sspcab):
    method = draem(**SMALL | dict(learning_rate=1e-2), sspcab=sspcab)
    textures = jnp.asarray(np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), np.uint8))
    frozen = {"auxiliary": textures} if sspcab else {}
    state = jax.jit(lambda key: method.init(key, frozen, None))(KEY)
    update, images = jax.jit(method.stages[0].update), jnp.asarray(IMAGES // 8 + 100)
    index = jnp.arange(4, dtype=jnp.int32)
    batch = Batch(images, jnp.ones(4, bool), jnp.zeros(4, jnp.int32), None, index, jnp.float32(0))
    losses = []
    for i in range(30):
        state, metrics = update(jax.random.key(i), state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])


def test_image_sizes_that_do_not_halve_are_refused():
    with pytest.raises(ValueError, match=r"multiples of 32, got \(60, 64\)"):
        draem(image_size=(60, 64))
