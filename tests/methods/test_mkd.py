"""MKD: its loss in numpy, and its three gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.backbones import backbone, normalize
from jaxad.base import Batch
from jaxad.methods.mkd import Cloner, guided_relu, mkd
from jaxad.ops.heatmap import upsample_blur

KEY = jax.random.key(0)
LAYERS = ("layer1", "layer2")
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
SMALL = dict(backbone="pdn_small", layers=LAYERS, image_size=(32, 32), hidden=4, value_weight=0.5)


@pytest.fixture(scope="module")
def frozen():
    return backbone("pdn_small").init(jax.random.key(1))


@pytest.fixture(scope="module")
def fitted(frozen):
    """A method, its state after a step, and what it sees."""
    method = mkd(**SMALL)
    x = jax.jit(method.embed)(frozen, IMAGES)
    state = jax.jit(method.init)(KEY, frozen, x)
    index = jnp.arange(4, dtype=jnp.int32)
    batch = Batch(x, jnp.ones(4, bool), jnp.zeros(4, jnp.int32), None, index, jnp.float32(0))
    update = jax.jit(method.stages[0].update)
    after, metrics = update(KEY, state, frozen, batch)
    _, later = update(KEY, after, frozen, batch)
    assert later["loss"] < metrics["loss"]
    np.testing.assert_allclose(metrics["loss"], loss_of(state, frozen, x), rtol=1e-4)
    return method, method.stages[0].finalize(KEY, after, frozen), x


def loss_of(state, frozen, x):
    """Both maps of training images against the teacher's, in numpy."""
    variables = {"params": state.trained.params, "batch_stats": state.running}
    image = normalize(frozen, jnp.asarray(IMAGES), jnp.float32)
    maps, _ = Cloner(channels_of(x), 4).apply(variables, image, jnp.ones(4, bool), mutable=["batch_stats"])
    return sum(discrepancy(own, x[layer]) for own, layer in zip(maps, LAYERS, strict=True)).mean()


def channels_of(x):
    return 0, x["layer1"].shape[-1], x["layer2"].shape[-1]


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
    np.testing.assert_allclose(scores.image, discrepancy(maps[1], x["layer2"]), rtol=1e-4)


def test_the_heat_map_is_the_gradient_with_respect_to_pixels(frozen, fitted):
    method, state, x = fitted
    score = jax.jit(method.score)

    def of(image):
        levels = image * 255
        return score(state, frozen, method.embed(frozen, image) | {"image": levels}).image.sum()

    image = jnp.asarray(IMAGES, jnp.float32) / 255
    gradient = jax.grad(of)(image)
    expected = upsample_blur(jnp.abs(gradient).sum(-1), (32, 32), 4.0)
    np.testing.assert_allclose(score(state, frozen, x).pixel, expected, rtol=2e-3, atol=1e-6)


def test_smooth_gradients_without_noise_are_plain_ones(frozen, fitted):
    method, state, x = fitted
    smooth = mkd(**SMALL, localization="smooth_grad", samples=2, noise=0.0)
    plain = jax.jit(method.score)(state, frozen, x).pixel
    np.testing.assert_allclose(jax.jit(smooth.score)(state, frozen, x).pixel, plain, rtol=1e-3, atol=1e-7)
    noisy = mkd(**SMALL, localization="smooth_grad", samples=2, noise=0.2)
    assert not np.allclose(jax.jit(noisy.score)(state, frozen, x).pixel, plain, rtol=1e-2)


def test_guided_backpropagation_lets_positive_gradients_through(frozen, fitted):
    method, state, x = fitted
    value = jnp.array([-1.0, 2.0, 3.0])
    _, back = jax.vjp(guided_relu, value)
    np.testing.assert_array_equal(guided_relu(value), [0, 2, 3])
    np.testing.assert_array_equal(back(jnp.array([1.0, -1.0, 1.0]))[0], [0, 0, 1])
    guided = jax.jit(mkd(**SMALL, localization="guided_backprop").score)(state, frozen, x)
    plain = jax.jit(method.score)(state, frozen, x)
    np.testing.assert_allclose(guided.image, plain.image, rtol=1e-5)
    assert not np.allclose(guided.pixel, plain.pixel, rtol=1e-2)


def test_maps_must_have_strides_of_powers_of_two_that_differ(frozen):
    with pytest.raises(ValueError, match="image_size must be multiples of the stride of layer2"):
        jax.eval_shape(
            mkd(**SMALL | {"image_size": (36, 36)}).init,
            KEY,
            frozen,
            jax.eval_shape(mkd(**SMALL).embed, frozen, jax.ShapeDtypeStruct((1, 36, 36, 3), jnp.uint8)),
        )
    method = mkd(**SMALL | {"image_size": (60, 60)})
    spec = {"image": jax.ShapeDtypeStruct((1, 60, 60, 3), jnp.uint8)}
    spec |= {layer: jax.ShapeDtypeStruct((1, 20, 20, 4), jnp.float32) for layer in SMALL["layers"]}
    with pytest.raises(ValueError, match="strides of 2, 4, 8, 16 or 32, got layer1 of stride 3"):
        method.init(KEY, frozen, spec)
    method = mkd(**SMALL | {"layers": ("layer2", "layer3")})
    spec = jax.eval_shape(method.embed, frozen, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.uint8))
    with pytest.raises(ValueError, match="layers must have different strides, got layer2, layer3"):
        method.init(KEY, frozen, spec)


@pytest.mark.parametrize(
    ("name", "layers"),
    [("pdn_small", ("layer1", "layer3")), ("resnet18", ("layer1", "layer2", "layer3")), ("vgg11", None)],
)
def test_one_stage_of_every_stride_is_compared(name, layers):
    network = backbone(name)
    x = jax.eval_shape(
        mkd(backbone=name, image_size=(64, 64)).embed,
        jax.eval_shape(network.init, KEY),
        jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8),
    )
    assert set(x) == {"image", *(layers or ("pool2", "pool3", "pool4", "pool5"))}
