"""MKD: its loss in numpy, the shapes of its cloner, and its three gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxad.backbones import backbone, normalize
from jaxad.base import Batch
from jaxad.methods.mkd import Cloner, guided_relu, mkd
from jaxad.nn import without_norm
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
    """A method, its state after a step, and the embedded images.

    The weights are enlarged, so that neither the cloner nor the teacher contributes nearly all of the gradient.
    """
    method = mkd(**SMALL)
    x = jax.jit(method.embed)(frozen, IMAGES)
    init, update = (jax.jit(f) for f in method.stages[0][1:3])
    state = init(KEY, None, frozen, x)
    next_state, metrics = update(KEY, state, frozen, batch_of(x))
    _, next_metrics = update(KEY, next_state, frozen, batch_of(x))
    assert next_metrics["loss"] < metrics["loss"]
    np.testing.assert_allclose(metrics["loss"], loss_of(state.model, frozen, x), rtol=1e-4)
    cloner = method.stages[0].finalize(KEY, next_state, frozen)
    return method, cloner._replace(params=jax.tree.map(lambda leaf: 1.3 * leaf, cloner.params)), x


def loss_of(model, frozen, x):
    """The discrepancy of all maps of the training images, in numpy."""
    variables = {"params": model.params, "batch_stats": model.stats}
    image = normalize(frozen, jnp.asarray(IMAGES), jnp.float32)
    apply = jax.jit(functools.partial(Cloner(channels_of(x), 4).apply, train=True, mutable=["batch_stats"]))
    maps, _ = apply(variables, image)
    return sum(discrepancy(student, x[layer]) for student, layer in zip(maps, LAYERS, strict=True)).mean()


def channels_of(x):
    return 0, *(x[layer].shape[-1] for layer in LAYERS)


def discrepancy(student, teacher):
    a, b = (np.asarray(leaf, np.float64).reshape(len(leaf), -1) for leaf in (student, teacher))
    cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return 1 - cosine + 0.5 * ((a - b) ** 2).mean(1)


def test_an_image_scores_the_discrepancy_of_all_maps_but_the_first(frozen, fitted):
    method, state, x = fitted
    variables = {"params": state.params, "batch_stats": state.stats}
    image = normalize(frozen, jnp.asarray(IMAGES), jnp.float32)
    maps = jax.jit(functools.partial(Cloner(channels_of(x), 4).apply, train=False))(variables, image)
    assert [m.shape for m in maps] == [x[layer].shape for layer in LAYERS]
    scores = jax.jit(method.score)(state, frozen, x)
    expected = discrepancy(maps[1], x["layer2"]) + discrepancy(maps[2], x["layer3"])
    np.testing.assert_allclose(scores.image, expected, rtol=1e-4)


@pytest.fixture(scope="module")
def gradient(frozen, fitted):
    """The gradient of the images' scores with respect to pixels in [0, 1]."""
    method, state, _ = fitted

    def total(image):
        return method.score(state, frozen, method.embed(frozen, image) | {"image": image * 255}).image.sum()

    return jax.jit(jax.grad(total))


def heat_map(gradient):
    return upsample_blur(jnp.abs(jnp.asarray(gradient)).sum(-1), (32, 32), 4.0)


def test_the_heat_map_is_the_gradient_with_respect_to_pixels(frozen, fitted, gradient):
    method, state, x = fitted
    expected = heat_map(gradient(jnp.asarray(IMAGES, jnp.float32) / 255))
    np.testing.assert_allclose(jax.jit(method.score)(state, frozen, x).pixel, expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("noise", slow_after(1, [0.2, 0.0]))
def test_smooth_gradients_are_means_over_noisy_images(frozen, fitted, gradient, noise):
    _, state, x = fitted
    method = mkd(**SMALL, localization="smooth_grad", samples=3, noise=noise)
    noises = [noise * jax.random.normal(key, (32, 32, 3)) for key in jax.random.split(jax.random.key(0), 3)]
    image = jnp.asarray(IMAGES, jnp.float32) / 255
    expected = heat_map(np.mean([gradient(image + noise) for noise in noises], 0))
    np.testing.assert_allclose(jax.jit(method.score)(state, frozen, x).pixel, expected, rtol=2e-3, atol=1e-6)


def guided_gradient(state, frozen, x):
    """The gradient with respect to pixels, back through the cloner layer by layer; plain through the teacher."""
    with_norm = {name: leaf for name, leaf in state.params.items() if "Norm" in name}
    weights = state.params | without_norm({"params": with_norm, "batch_stats": state.stats})
    stages = (
        ("ConvNorm_0", "Conv_0"),
        ("ConvNorm_1", "Conv_1"),
        ("ConvNorm_2", "ConvNorm_3", "Conv_2"),
        ("ConvNorm_4", "ConvNorm_5", "Conv_3"),
    )
    teacher_gradients = {}

    def convolve(h, kernel, bias=0.0):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(h, kernel, (1, 1), "SAME", dimension_numbers=layout) + bias

    def difference(student, teacher):
        a, b = (leaf.reshape(len(leaf), -1) for leaf in (student, teacher))
        cosine = (a * b).sum(1) / (jnp.linalg.norm(a, axis=1) * jnp.linalg.norm(b, axis=1))
        return (0.5 * ((a - b) ** 2).mean(1) - cosine).sum()

    def backward(s, h):
        """The gradient with respect to the input of a stage."""
        vjps = []
        for name in stages[s]:
            value, vjp = jax.vjp(functools.partial(convolve, **weights[name]), h)
            vjps.append((vjp, value > 0))
            h = jnp.maximum(value, 0)
        h, unpool = jax.vjp(lambda h: nn.max_pool(h, (2, 2), (2, 2)), h)
        gradient = backward(s + 1, h) if s + 1 < len(stages) else jnp.zeros_like(h)
        if (layer := f"layer{s}") in LAYERS[1:]:
            student_gradient, teacher_gradients[layer] = jax.grad(difference, (0, 1))(h, x[layer])
            gradient = gradient + student_gradient
        (gradient,) = unpool(gradient)
        for vjp, active in reversed(vjps):
            (gradient,) = vjp(jnp.where(active & (gradient > 0), gradient, 0))
        return gradient

    image = jnp.asarray(IMAGES, jnp.float32) / 255
    normalized, to_pixels = jax.vjp(lambda image: normalize(frozen, image, jnp.float32), image)
    (gradient,) = to_pixels(backward(0, normalized))
    _, vjp = jax.vjp(lambda image: TINY_RESNET.apply(frozen, image, LAYERS[1:]), image)
    return gradient + vjp(teacher_gradients)[0]


def test_guided_backpropagation_passes_positive_gradients(frozen, fitted):
    method, state, x = fitted
    value = jnp.array([-1.0, 2.0, 3.0])
    _, vjp = jax.vjp(guided_relu, value)
    np.testing.assert_array_equal(guided_relu(value), [0, 2, 3])
    np.testing.assert_array_equal(vjp(jnp.array([1.0, -1.0, 1.0]))[0], [0, 0, 1])
    guided = jax.jit(mkd(**SMALL, localization="guided_backprop").score)(state, frozen, x)
    np.testing.assert_allclose(guided.image, jax.jit(method.score)(state, frozen, x).image, rtol=1e-5)
    expected = heat_map(jax.jit(guided_gradient)(state, frozen, x))
    np.testing.assert_allclose(guided.pixel, expected, rtol=2e-3, atol=1e-6)


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
