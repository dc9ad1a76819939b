"""MKD: the shapes of its cloner, gradients averaged over noise, and which stages it compares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.backbones import backbone
from jaxad.base import Batch
from jaxad.methods.mkd import mkd
from jaxad.ops.heatmap import upsample_blur
from tests.examples import slow_after
from tests.tiny import TINY_RESNET

KEY = jax.random.key(0)
LAYERS = ("layer1", "layer2", "layer3")
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
SMALL = dict(backbone=TINY_RESNET, layers=LAYERS, image_size=(32, 32), hidden=4, value_weight=0.5)


@pytest.fixture(scope="module")
def frozen():
    return TINY_RESNET.init(jax.random.key(1))


def batch_of(x):
    n = len(x["image"])
    index = jnp.arange(n, dtype=jnp.int32)
    return Batch(x, jnp.ones(n, bool), jnp.zeros(n, jnp.int32), None, index, jnp.float32(0))


@pytest.fixture(scope="module")
def fitted(frozen):
    """A method, its cloner before training, and the embedded images.

    The weights are enlarged, so that neither the cloner nor the teacher contributes nearly all of the gradient.
    """
    method = mkd(**SMALL)
    x = jax.jit(method.embed)(frozen, IMAGES)
    cloner = jax.jit(method.stages[0].init)(KEY, None, frozen, x).model
    return method, cloner._replace(params=jax.tree.map(lambda leaf: 1.3 * leaf, cloner.params)), x


@pytest.fixture(scope="module")
def gradient(frozen, fitted):
    """The gradient of the images' scores with respect to pixels in [0, 1]."""
    method, state, _ = fitted

    def total(image):
        return method.score(state, frozen, method.embed(frozen, image) | {"image": image * 255}).image.sum()

    return jax.jit(jax.grad(total))


def heat_map(gradient):
    return upsample_blur(jnp.abs(jnp.asarray(gradient)).sum(-1), (32, 32), 4.0)


@pytest.mark.parametrize("noise", slow_after(1, [0.2, 0.0]))
def test_smooth_gradients_are_means_over_noisy_images(frozen, fitted, gradient, noise):
    _, state, x = fitted
    method = mkd(**SMALL, localization="smooth_grad", samples=3, noise=noise)
    noises = [noise * jax.random.normal(key, (32, 32, 3)) for key in jax.random.split(jax.random.key(0), 3)]
    image = jnp.asarray(IMAGES, jnp.float32) / 255
    expected = heat_map(np.mean([gradient(image + noise) for noise in noises], 0))
    np.testing.assert_allclose(jax.jit(method.score)(state, frozen, x).pixel, expected, rtol=2e-3, atol=1e-6)


def shapes_of(name, size):
    """The shapes of an embedded image and of the untrained cloner."""
    method, network = mkd(backbone=name, image_size=size), backbone(name)
    frozen = jax.eval_shape(network.init, KEY)
    x = jax.eval_shape(method.embed, frozen, jax.ShapeDtypeStruct((1, *size, 3), jnp.uint8))
    return x, jax.eval_shape(method.stages[0].init, KEY, None, frozen, x).model


REFERENCE = ((16, 16), (16, 128), (16, 16, 256), (16, 16, 512), (16, 16, 512))
"""Channels of the smaller cloner's convolutions between poolings (`cfg` B of models/network.py)."""


def test_the_cloner_of_a_vgg_has_the_official_parameters():
    """Kernels without biases, and batch norm after all of them except the last before each pooling."""
    spec, cloner = shapes_of("vgg16", (128, 128))
    assert {layer: leaf.shape[1:] for layer, leaf in spec.items() if layer != "image"} == {
        f"pool{i + 1}": (128 >> i + 1, 128 >> i + 1, REFERENCE[i][-1]) for i in range(1, 5)
    }
    outputs = [channels for stage in REFERENCE for channels in stage]
    leaves = [leaf.shape for leaf in jax.tree.leaves(cloner.params)]
    expected = [(3, 3, *pair) for pair in zip([3, *outputs], outputs, strict=False)]
    assert sorted(shape for shape in leaves if len(shape) == 4) == sorted(expected)
    assert [shape for shape in leaves if len(shape) != 4] == [(16,)] * 2 * (len(outputs) - len(REFERENCE))


@pytest.mark.slow
def test_a_vgg_teaches_and_its_scores_are_finite():
    frozen = backbone("vgg11").init(jax.random.key(1))
    method = mkd(backbone="vgg11", image_size=(32, 32), hidden=4)
    x = jax.jit(method.embed)(frozen, IMAGES[:2])
    assert {layer: leaf.shape[1:] for layer, leaf in x.items() if layer != "image"} == {
        "pool2": (8, 8, 128),
        "pool3": (4, 4, 256),
        "pool4": (2, 2, 512),
        "pool5": (1, 1, 512),
    }
    state = jax.jit(method.stages[0].init)(KEY, None, frozen, x)
    state, metrics = jax.jit(method.stages[0].update)(KEY, state, frozen, batch_of(x))
    scores = jax.jit(method.score)(method.stages[0].finalize(KEY, state, frozen), frozen, x)
    assert scores.image.shape == (2,) and scores.pixel.shape == (2, 32, 32)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state, metrics, scores)))
    assert (scores.image > 0).all() and (scores.pixel > 0).any()


@pytest.mark.parametrize(
    ("options", "maps", "rule"),
    [
        (dict(image_size=(36, 36)), dict(layer1=9, layer2=5), "image_size must be multiples of the stride of layer2"),
        (dict(image_size=(60, 60)), dict(layer1=20, layer2=20), "2, 4, 8, 16 or 32, got layer1 of stride 3"),
        (
            dict(layers=("layer2", "layer3")),
            dict(layer2=4, layer3=4),
            "layers must have different strides, got layer2, layer3",
        ),
    ],
)
def test_maps_must_have_strides_of_powers_of_two_that_differ(options, maps, rule):
    options = dict(layers=("layer1", "layer2"), image_size=(32, 32)) | options
    spec = {"image": jax.ShapeDtypeStruct((1, *options["image_size"], 3), jnp.uint8)}
    spec |= {layer: jax.ShapeDtypeStruct((1, side, side, 4), jnp.float32) for layer, side in maps.items()}
    with pytest.raises(ValueError, match=rule):
        mkd(backbone="pdn_small", **options).stages[0].init(KEY, None, None, spec)


@pytest.mark.parametrize(
    ("name", "layers"),
    [("pdn_small", ("layer1", "layer3")), ("resnet18", ("layer1", "layer2", "layer3")), ("vgg11", None)],
)
def test_one_stage_of_every_stride_is_compared(name, layers):
    x, _ = shapes_of(name, (64, 64))
    assert set(x) == {"image", *(layers or ("pool2", "pool3", "pool4", "pool5"))}
