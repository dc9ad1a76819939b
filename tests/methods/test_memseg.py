"""MemSeg: the memory, the size of the network, which images have anomalies, and the scale of the features."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.base import Batch
from jaxad.methods.memseg import LAYERS, Memory, MemsegNetwork, Segmenter, anomalies, memseg, nearest
from tests.methods import plain
from tests.tiny import TINY_RESNET

module = importlib.import_module("jaxad.methods.memseg")
KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
SMALL = dict(backbone=TINY_RESNET, image_size=(32, 32), memory_size=3, epochs=1, train_batch_size=3, learning_rate=1e-3)


@pytest.fixture(scope="module")
def frozen():
    return TINY_RESNET.init(jax.random.key(1))


def batch_of(x, progress=0.0):
    n = len(x["image"])
    index = jnp.arange(n, dtype=jnp.int32)
    return Batch(x, jnp.ones(n, bool), jnp.zeros(n, jnp.int32), None, index, jnp.float32(progress))


def remembered(method, frozen, x):
    """The state with which the training begins."""
    remember, train = method.stages

    @jax.jit
    def run(x):
        state, _ = remember.update(KEY, remember.init(KEY, None, frozen, x), frozen, batch_of(x))
        return remember.finalize(KEY, state, frozen)

    memory = run(x)
    training = plain.fresh(jax.eval_shape(lambda: train.init(KEY, memory, frozen, x)))
    return training._replace(model=training.model._replace(memory=memory))


@pytest.fixture(scope="module")
def embedded(frozen):
    return jax.jit(memseg(**SMALL).embed)(frozen, IMAGES)


@pytest.fixture(scope="module")
def fitted(frozen, embedded):
    """A method and its networks before their first step."""
    method = memseg(**SMALL)
    return method, method.stages[1].finalize(KEY, remembered(method, frozen, embedded), frozen)


def test_the_memory_holds_images_drawn_at_random(fitted, embedded, frozen):
    _, state = fitted
    assert isinstance(state, MemsegNetwork)
    kept = [
        next(i for i in range(6) if np.allclose(state.memory.maps[layer][place], embedded[layer][i], atol=1e-5))
        for layer in LAYERS
        for place in range(3)
    ]
    assert kept[:3] == kept[3:6] == kept[6:] and len(set(kept)) == 3
    few = remembered(memseg(**SMALL), frozen, jax.tree.map(lambda leaf: leaf[:2], embedded)).model
    assert (np.asarray(few.memory.draw) < 0).tolist() == [False, False, True]


def test_the_network_has_the_kernels_of_the_reference():
    """Those of msff.py and decoder.py for a ResNet-18, with its stem and last stage: size, channels in and out."""
    maps = {"layer1": (16, 16, 64), "layer2": (8, 8, 128), "layer3": (4, 4, 256)}
    one = {layer: jnp.zeros((1, *shape)) for layer, shape in maps.items()}
    init = functools.partial(Segmenter().init, train=True)
    params = jax.eval_shape(init, KEY, jnp.zeros((1, 64, 64, 3)), one, one)["params"]
    kernels = sorted((k.shape[0], *k.shape[2:]) for k in jax.tree.leaves(params) if len(k.shape) == 4)
    expected = [(7, 3, 64), (3, 256, 512), (3, 512, 512), (1, 256, 512), (3, 512, 512), (3, 512, 512)]
    for c in (64, 128, 256):
        expected += [(3, 2 * c, 2 * c), (3, 2 * c, c), (3, c, c), (1, 2 * c, max(8, c // 16))]
    expected += [(3, 256, 128), (3, 128, 64), (3, 64, 48), (3, 48, 2)]
    expected += [(3, a, b) for a, b in ((512, 256), (512, 128), (256, 64), (128, 48), (96, 48))]
    assert kernels == sorted(expected)


def test_an_empty_place_of_the_memory_is_not_the_nearest():
    bank = np.stack([np.full((1, 1, 2), value, np.float32) for value in (0, 1, 2)])
    maps, places = ({layer: jnp.asarray(part) for layer in LAYERS} for part in (bank[1:2] + 0.1, bank))
    chosen = jax.jit(nearest)(Memory(places, jnp.asarray([0.3, -1, 0.5])), maps)
    assert [float(chosen[layer].mean()) for layer in LAYERS] == [2, 2, 2]


@pytest.mark.parametrize("images", [4, 5])
def test_every_second_image_has_an_anomaly(monkeypatch, images):
    received = {}

    def textured(key, image, texture, **options):
        received.update(options)
        return image + texture, image[..., 0] == 0

    monkeypatch.setattr(module, "add_texture", textured)
    monkeypatch.setattr(module, "foreground", lambda image: "the object")
    monkeypatch.setattr(module, "source", lambda key, size, photographs, changes: jnp.ones((*size, 3)))
    monkeypatch.setattr(module, "shuffled_tiles", lambda key, image, grid: jnp.full_like(image, grid[1]))
    keys = jax.random.split(KEY, 8)
    draw = jax.jit(jax.vmap(lambda key: anomalies(key, jnp.zeros((images, 8, 8, 3)), None, True)))
    changed, mask = (np.asarray(x) for x in draw(keys))
    assert (received["opacity"], received["foreground"]) == ((0.15, 1.0), "the object")
    anomalous = mask.any((2, 3))
    np.testing.assert_array_equal(anomalous, mask.all((2, 3)))
    np.testing.assert_array_equal(anomalous, changed.any((2, 3, 4)))
    assert set(changed[anomalous].max((1, 2, 3))) == {1, 8}  # textures, and tiles of the image
    assert (anomalous[:, 1:] != anomalous[:, :-1]).all() and len(set(anomalous[:, 0])) == 2


def test_feature_scale_multiplies_the_features(fitted, embedded, frozen):
    _, state = fitted
    smaller = embedded | {layer: 0.5 * embedded[layer] for layer in LAYERS}
    unscaled, scaled = (jax.jit(memseg(**SMALL, feature_scale=scale).score) for scale in (1.0, 0.5))
    pixel, expected = scaled(state, frozen, embedded).pixel, unscaled(state, frozen, smaller).pixel
    np.testing.assert_allclose(pixel, expected, atol=1e-5)
    assert float(jnp.abs(pixel - unscaled(state, frozen, embedded).pixel).max()) > 1e-4


def test_bad_hyperparameters_are_rejected(frozen, embedded):
    with pytest.raises(ValueError, match=r"multiples of 32, got \(60, 64\)"):
        memseg(backbone="resnet18", image_size=(60, 64))
    with pytest.raises(ValueError, match="the backbone must be a ResNet, got pdn_small"):
        memseg(backbone="pdn_small")
    with pytest.raises(ValueError, match="channel_pooling must divide 16 channels, got 3"):
        remembered(memseg(**SMALL, channel_pooling=3), frozen, embedded)
