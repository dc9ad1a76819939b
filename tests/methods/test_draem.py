"""DRAEM: the official networks' shapes, the terms of its loss, and how images score."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.base import Batch
from jaxad.methods.draem import REACH, Discriminative, DraemNetworks, Reconstructive, draem
from jaxad.ops.ssim import ssim
from tests.methods import plain

module = importlib.import_module("jaxad.methods.draem")
KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
SMALL = dict(image_size=(32, 32), reconstructive_width=2, discriminative_width=2, learning_rate=1e-3)


def batch_of(images, progress=0.0, auxiliary=None):
    n = len(images)
    index = jnp.arange(n, dtype=jnp.int32)
    progress = jnp.float32(progress)
    return Batch(jnp.asarray(images), jnp.ones(n, bool), jnp.zeros(n, jnp.int32), None, index, progress, auxiliary)


def kernels(network, channels):
    """Input and output channels of all kernels."""
    image = jnp.zeros((1, 64, 64, channels))
    variables = jax.eval_shape(lambda key: network.init(key, image, train=True), KEY)
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    return sorted(leaf.shape[2:] for path, leaf in leaves if path[-1].key == "kernel")


def test_networks_have_the_official_channels():
    """As in model_unet.py."""
    w, levels = 128, [(1, 2), (2, 4), (4, 8), (8, 8)]
    expected = [(3, w), (w, w), *((a * w, b * w) for a, b in levels), *((b * w, b * w) for _, b in levels)]
    for features, last in ((8, 4), (4, 2), (2, 1), (1, 1)):
        expected += [(features * w, features * w)] * 2 + [(features * w, last * w)]
    assert kernels(Reconstructive(w, sspcab=False), 3) == sorted([*expected, (w, 3)])
    w, levels = 64, [(1, 2), (2, 4), (4, 8), (8, 8), (8, 8)]
    expected = [(6, w), (w, w), *((a * w, b * w) for a, b in levels), *((b * w, b * w) for _, b in levels)]
    for below, features, skip in ((8, 8, 8), (8, 4, 8), (4, 2, 4), (2, 1, 2), (1, 1, 1)):
        expected += [(below * w, features * w), ((features + skip) * w, features * w), (features * w, features * w)]
    assert kernels(Discriminative(w), 6) == sorted([*expected, (w, 2)])


def initial(method):
    return plain.fresh(jax.eval_shape(lambda: method.stages[0].init(KEY, None, None, None)))


def test_an_image_scores_the_largest_mean_of_its_heat_map():
    method = draem(**SMALL)
    fitted = method.stages[0].finalize(KEY, initial(method), None)
    assert isinstance(fitted, DraemNetworks)
    scores = jax.jit(method.score)(fitted, None, jnp.asarray(IMAGES))
    reach = round(REACH * min(scores.pixel.shape[1:]))
    padded = np.pad(np.asarray(scores.pixel, np.float64), ((0, 0), (reach,) * 2, (reach,) * 2))
    means = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1,) * 2, (1, 2)).mean((3, 4))
    np.testing.assert_allclose(scores.image, means.max((1, 2)), rtol=1e-4)


def test_the_loss_adds_the_errors_of_the_image_its_structure_and_the_mask(monkeypatch):
    """With known anomalies, against the outputs of the networks."""
    mask = np.zeros((32, 32), bool)
    mask[4:12, 6:20] = True
    monkeypatch.setattr(module, "add_texture", lambda key, image, source: (1 - image, jnp.asarray(mask)))
    monkeypatch.setattr(module, "rotate", lambda image, degrees: image)
    monkeypatch.setattr(module, "ANOMALOUS", 1.0)
    method = draem(**SMALL, sspcab=True, sspcab_weight=0.3)
    state = initial(method)
    next_state, metrics = jax.jit(method.stages[0].update)(KEY, state, None, batch_of(IMAGES, 0.85))
    image = jnp.asarray(IMAGES, jnp.float32) / 255

    def outputs(name, network, x):
        variables = {"params": state.model.params[name], "batch_stats": state.model.stats[name]}
        return jax.jit(functools.partial(network.apply, train=True, mutable=["batch_stats"]))(variables, x)[0]

    restored, error = outputs("reconstructive", Reconstructive(2, True), 1 - image)
    logits = outputs("discriminative", Discriminative(2), jnp.concatenate([restored, 1 - image], -1))
    logits = np.asarray(logits, np.float64)
    anomalous = 1 / (1 + np.exp(logits[..., 0] - logits[..., 1]))
    correct = np.where(mask, anomalous, 1 - anomalous)
    expected = np.mean((np.asarray(restored) - np.asarray(image)) ** 2) + 1 - float(ssim(restored, image).mean())
    expected += np.mean(-((1 - correct) ** 2) * np.log(correct)) + 0.3 * float(error.mean())
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-3)
    params = (next_state.model.params, state.model.params)
    steps = jax.tree.leaves(jax.tree.map(lambda a, b: jnp.abs(a - b).max(), *params))
    assert 0.15e-3 < max(map(float, steps)) < 0.21e-3  # a fifth of the rate


@pytest.mark.slow
@pytest.mark.parametrize("sspcab", [False, True])
def test_it_learns_with_and_without_textures(sspcab):
    method = draem(**SMALL | dict(learning_rate=1e-2), sspcab=sspcab)
    textures = jnp.asarray(np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), np.uint8))
    batch = batch_of(IMAGES // 8 + 100, auxiliary=textures if sspcab else None)
    state, update = initial(method), jax.jit(method.stages[0].update)
    losses = []
    for i in range(30):
        state, metrics = update(jax.random.key(i), state, None, batch)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])


def test_image_sizes_that_do_not_halve_are_refused():
    with pytest.raises(ValueError, match=r"multiples of 32, got \(60, 64\)"):
        draem(image_size=(60, 64))
