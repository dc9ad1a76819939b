"""DRAEM: the official networks' shapes, what its loss adds up, and how images score."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.base import Batch
from jaxad.methods.draem import MEAN, Discriminative, DraemNetworks, Reconstructive, draem

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
    padded = np.pad(np.asarray(scores.pixel, np.float64), ((0, 0), (MEAN // 2,) * 2, (MEAN // 2,) * 2))
    means = np.lib.stride_tricks.sliding_window_view(padded, (MEAN, MEAN), (1, 2)).mean((3, 4))
    np.testing.assert_allclose(scores.image, means.max((1, 2)), rtol=1e-4)


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
