"""MKD: its loss in numpy, its cloner, its batch norm, and its three gradients."""

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
from tests.cases import TINY

KEY = jax.random.key(0)
NAME = TINY[0]
LAYERS = ("layer1", "layer2", "layer3")
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
SMALL = dict(backbone=NAME, layers=LAYERS, image_size=(32, 32), hidden=4, value_weight=0.5)
PDN = SMALL | {"backbone": "pdn_small", "layers": LAYERS[:2]}


@pytest.fixture(scope="module")
def frozen():
    return backbone(NAME).init(jax.random.key(1))


def batch_of(x, valid):
    n = len(valid)
    return Batch(x, jnp.asarray(valid), jnp.zeros(n, jnp.int32), None, jnp.arange(n, dtype=jnp.int32), jnp.float32(0))


@pytest.fixture(scope="module")
def fitted(frozen):
    """A method, its state after a step, and what it sees.

    The weights are enlarged, so that neither the cloner nor the teacher gives nearly all of the gradient.
    """
    method = mkd(**SMALL)
    x = jax.jit(method.embed)(frozen, IMAGES)
    state = jax.jit(method.init)(KEY, frozen, x)
    batch = batch_of(x, [True] * 4)
    update = jax.jit(method.stages[0].update)
    after, metrics = update(KEY, state, frozen, batch)
    _, later = update(KEY, after, frozen, batch)
    assert later["loss"] < metrics["loss"]
    np.testing.assert_allclose(metrics["loss"], loss_of(state, frozen, x), rtol=1e-4)
    state = method.stages[0].finalize(KEY, after, frozen)
    return method, state._replace(params=jax.tree.map(lambda leaf: 1.3 * leaf, state.params)), x


def loss_of(state, frozen, x):
    """All maps of training images against the teacher's, in numpy."""
    variables = {"params": state.trained.params, "batch_stats": state.running}
    image = normalize(frozen, jnp.asarray(IMAGES), jnp.float32)
    maps, _ = Cloner(channels_of(x), 4).apply(variables, image, jnp.ones(4, bool), mutable=["batch_stats"])
    return sum(discrepancy(own, x[layer]) for own, layer in zip(maps, LAYERS, strict=True)).mean()


def channels_of(x):
    return 0, *(x[layer].shape[-1] for layer in LAYERS)


def discrepancy(own, teacher):
    a, b = (np.asarray(leaf, np.float64).reshape(len(leaf), -1) for leaf in (own, teacher))
    cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return 1 - cosine + 0.5 * ((a - b) ** 2).mean(1)


def test_an_image_scores_the_discrepancy_of_all_maps_but_the_first(frozen, fitted):
    method, state, x = fitted
    variables = {"params": state.params, "batch_stats": state.running}
    maps = Cloner(channels_of(x), 4).apply(variables, normalize(frozen, jnp.asarray(IMAGES), jnp.float32), None)
    assert [m.shape for m in maps] == [x[layer].shape for layer in LAYERS]
    scores = jax.jit(method.score)(state, frozen, x)
    expected = discrepancy(maps[1], x["layer2"]) + discrepancy(maps[2], x["layer3"])
    np.testing.assert_allclose(scores.image, expected, rtol=1e-4)


def test_padding_is_neither_in_the_loss_nor_in_the_statistics(frozen):
    method = mkd(**SMALL)
    x = jax.jit(method.embed)(frozen, IMAGES)
    state = jax.jit(method.init)(KEY, frozen, x)
    update = jax.jit(method.stages[0].update)
    valid = np.array([True, True, False, True])
    garbage = jax.tree.map(lambda leaf: leaf.at[2].set(jnp.asarray(100, leaf.dtype)), x)
    padded, whole = batch_of(garbage, valid), batch_of(jax.tree.map(lambda leaf: leaf[valid], x), [True] * 3)
    (after, metrics), (expected, alone) = update(KEY, state, frozen, padded), update(KEY, state, frozen, whole)
    np.testing.assert_allclose(metrics["loss"], alone["loss"], rtol=1e-5)
    check = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(check, after.running, expected.running)
    later, alone = (update(KEY, s, frozen, b)[1] for s, b in ((after, padded), (expected, whole)))
    np.testing.assert_allclose(later["loss"], alone["loss"], rtol=1e-3)


@pytest.fixture(scope="module")
def gradient(frozen, fitted):
    """That of the images' scores with respect to pixels in [0, 1]."""
    method, state, _ = fitted

    def of(image):
        return method.score(state, frozen, method.embed(frozen, image) | {"image": image * 255}).image.sum()

    return jax.jit(jax.grad(of))


def heat_map(gradient):
    return upsample_blur(jnp.abs(jnp.asarray(gradient)).sum(-1), (32, 32), 4.0)


def test_the_heat_map_is_the_gradient_with_respect_to_pixels(frozen, fitted, gradient):
    method, state, x = fitted
    expected = heat_map(gradient(jnp.asarray(IMAGES, jnp.float32) / 255))
    np.testing.assert_allclose(jax.jit(method.score)(state, frozen, x).pixel, expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_smooth_gradients_are_means_over_noisy_images(frozen, fitted, gradient, noise):
    _, state, x = fitted
    method = mkd(**SMALL, localization="smooth_grad", samples=3, noise=noise)
    noises = [noise * jax.random.normal(key, (32, 32, 3)) for key in jax.random.split(jax.random.key(0), 3)]
    image = jnp.asarray(IMAGES, jnp.float32) / 255
    expected = heat_map(np.mean([gradient(image + noise) for noise in noises], 0))
    np.testing.assert_allclose(jax.jit(method.score)(state, frozen, x).pixel, expected, rtol=2e-3, atol=1e-6)


def guided_gradient(state, frozen, x):
    """The gradient with respect to pixels, back through the cloner layer by layer; the teacher's is the plain one."""
    normed = {name: leaf for name, leaf in state.params.items() if "Norm" in name}
    weights = state.params | without_norm({"params": normed, "batch_stats": state.running})
    stages = (
        ("ConvNorm_0", "Conv_0"),
        ("ConvNorm_1", "Conv_1"),
        ("ConvNorm_2", "ConvNorm_3", "Conv_2"),
        ("ConvNorm_4", "ConvNorm_5", "Conv_3"),
    )
    of_teacher = {}

    def convolve(h, kernel, bias=0.0):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(h, kernel, (1, 1), "SAME", dimension_numbers=layout) + bias

    def differ(own, teacher):
        a, b = (leaf.reshape(len(leaf), -1) for leaf in (own, teacher))
        cosine = (a * b).sum(1) / (jnp.linalg.norm(a, axis=1) * jnp.linalg.norm(b, axis=1))
        return (0.5 * ((a - b) ** 2).mean(1) - cosine).sum()

    def before(s, h):
        """The gradient with respect to the map before a stage."""
        backs = []
        for name in stages[s]:
            value, back = jax.vjp(functools.partial(convolve, **weights[name]), h)
            backs.append((back, value > 0))
            h = jnp.maximum(value, 0)
        h, unpool = jax.vjp(lambda h: nn.max_pool(h, (2, 2), (2, 2)), h)
        gradient = before(s + 1, h) if s + 1 < len(stages) else jnp.zeros_like(h)
        if (layer := f"layer{s}") in LAYERS[1:]:
            own, of_teacher[layer] = jax.grad(differ, (0, 1))(h, x[layer])
            gradient = gradient + own
        (gradient,) = unpool(gradient)
        for back, on in reversed(backs):
            (gradient,) = back(jnp.where(on & (gradient > 0), gradient, 0))
        return gradient

    image = jnp.asarray(IMAGES, jnp.float32) / 255
    normalized, to_pixels = jax.vjp(lambda image: normalize(frozen, image, jnp.float32), image)
    (gradient,) = to_pixels(before(0, normalized))
    _, back = jax.vjp(lambda image: backbone(NAME).apply(frozen, image, LAYERS[1:]), image)
    return gradient + back(of_teacher)[0]


def test_guided_backpropagation_lets_positive_gradients_through(frozen, fitted):
    method, state, x = fitted
    value = jnp.array([-1.0, 2.0, 3.0])
    _, back = jax.vjp(guided_relu, value)
    np.testing.assert_array_equal(guided_relu(value), [0, 2, 3])
    np.testing.assert_array_equal(back(jnp.array([1.0, -1.0, 1.0]))[0], [0, 0, 1])
    guided = jax.jit(mkd(**SMALL, localization="guided_backprop").score)(state, frozen, x)
    np.testing.assert_allclose(guided.image, jax.jit(method.score)(state, frozen, x).image, rtol=1e-5)
    expected = heat_map(guided_gradient(state, frozen, x))
    np.testing.assert_allclose(guided.pixel, expected, rtol=2e-3, atol=1e-6)


def shapes_of(name, size):
    """Of what the method sees of an image, and of its state."""
    method, network = mkd(backbone=name, image_size=size), backbone(name)
    frozen = jax.eval_shape(network.init, KEY)
    x = jax.eval_shape(method.embed, frozen, jax.ShapeDtypeStruct((1, *size, 3), jnp.uint8))
    return x, jax.eval_shape(method.init, KEY, frozen, x)


REFERENCE = ((16, 16), (16, 128), (16, 16, 256), (16, 16, 512), (16, 16, 512))
"""Channels of the smaller cloner's convolutions between poolings (`cfg` B of models/network.py)."""


def test_the_cloner_of_a_vgg_has_the_official_ones_parameters():
    """Kernels without biases; a batch norm behind all but those that are compared or come before the first pooling."""
    spec, made = shapes_of("vgg16", (128, 128))
    assert {layer: leaf.shape[1:] for layer, leaf in spec.items() if layer != "image"} == {
        f"pool{i + 1}": (128 >> i + 1, 128 >> i + 1, REFERENCE[i][-1]) for i in range(1, 5)
    }
    out = [channels for stage in REFERENCE for channels in stage]
    leaves = [leaf.shape for leaf in jax.tree.leaves(made.trained.params)]
    expected = [(3, 3, *pair) for pair in zip([3, *out], out, strict=False)]
    assert sorted(shape for shape in leaves if len(shape) == 4) == sorted(expected)
    assert [shape for shape in leaves if len(shape) != 4] == [(16,)] * 2 * (len(out) - len(REFERENCE))


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
    state = jax.jit(method.init)(KEY, frozen, x)
    state, metrics = jax.jit(method.stages[0].update)(KEY, state, frozen, batch_of(x, [True] * 2))
    scores = jax.jit(method.score)(method.stages[0].finalize(KEY, state, frozen), frozen, x)
    assert scores.image.shape == (2,) and scores.pixel.shape == (2, 32, 32)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state, metrics, scores)))
    assert (scores.image > 0).all() and (scores.pixel > 0).any()


def test_maps_must_have_strides_of_powers_of_two_that_differ():
    frozen = jax.eval_shape(backbone("pdn_small").init, KEY)
    with pytest.raises(ValueError, match="image_size must be multiples of the stride of layer2"):
        jax.eval_shape(
            mkd(**PDN | {"image_size": (36, 36)}).init,
            KEY,
            frozen,
            jax.eval_shape(mkd(**PDN).embed, frozen, jax.ShapeDtypeStruct((1, 36, 36, 3), jnp.uint8)),
        )
    method = mkd(**PDN | {"image_size": (60, 60)})
    spec = {"image": jax.ShapeDtypeStruct((1, 60, 60, 3), jnp.uint8)}
    spec |= {layer: jax.ShapeDtypeStruct((1, 20, 20, 4), jnp.float32) for layer in PDN["layers"]}
    with pytest.raises(ValueError, match="strides of 2, 4, 8, 16 or 32, got layer1 of stride 3"):
        method.init(KEY, frozen, spec)
    method = mkd(**PDN | {"layers": ("layer2", "layer3")})
    spec = jax.eval_shape(method.embed, frozen, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.uint8))
    with pytest.raises(ValueError, match="layers must have different strides, got layer2, layer3"):
        method.init(KEY, frozen, spec)


@pytest.mark.parametrize(
    ("name", "layers"),
    [("pdn_small", ("layer1", "layer3")), ("resnet18", ("layer1", "layer2", "layer3")), ("vgg11", None)],
)
def test_one_stage_of_every_stride_is_compared(name, layers):
    x, _ = shapes_of(name, (64, 64))
    assert set(x) == {"image", *(layers or ("pool2", "pool3", "pool4", "pool5"))}
