"""STFPM: its loss and heat map against numpy on given features, its optimizer, and the folding of its batch norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.backbones import ResidualBlocks, resnet, student
from jaxad.base import Batch
from jaxad.methods.stfpm import StfpmTraining, stfpm
from jaxad.ops.heatmap import upsample_blur
from tests.tiny import TINY_RESNET

KEY = jax.random.key(0)
LAYERS = ("layer1", "layer2")
LEARNER = student(TINY_RESNET, LAYERS)
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def frozen():
    return TINY_RESNET.init(jax.random.key(1))


@pytest.fixture(scope="module")
def model():
    """A student whose statistics and scales are not the initial ones."""
    rng = np.random.default_rng(0)
    noise = lambda leaf: rng.uniform(0, 0.1, leaf.shape).astype(np.float32)  # noqa: E731
    variables = jax.jit(LEARNER.init)(KEY)
    return StfpmTraining(*jax.tree.map(lambda leaf: leaf + noise(leaf) if leaf.ndim == 1 else leaf, variables))


def training(method, frozen, model):
    """The state of the stage before its first step, with the given model."""
    return jax.jit(method.stages[0].init)(KEY, None, frozen, None)._replace(model=model)


def batch_of(x):
    return Batch(x, jnp.ones(4, bool), jnp.zeros(4, jnp.int32), None, jnp.arange(4, dtype=jnp.int32), jnp.float32(0))


def batch_statistics(before, after):
    """The mean and variance of one batch, from running statistics before and after it."""
    return jax.tree.map(lambda old, new: (new - 0.9 * old) / 0.1, before, after)


def train_maps(learner, params, stats, frozen, images):
    return jax.jit(learner.apply, static_argnames="train")(params, stats, frozen, images, train=True)


def test_batch_norm_is_folded_into_the_network_that_scores(frozen, model):
    maps, stats = train_maps(LEARNER, *model, frozen, IMAGES)
    params = LEARNER.freeze(model.params, batch_statistics(model.stats, stats))
    folded = jax.jit(TINY_RESNET.apply, static_argnums=2)(frozen | {"params": params}, IMAGES, LAYERS)
    for layer in LAYERS:
        np.testing.assert_allclose(folded[layer], maps[layer], atol=2e-3)


def test_batch_norm_of_the_original_resnet_is_folded_too():
    """Bottlenecks as in Caffe, where the stride of a block is in its first convolution."""
    network = resnet.make("caffe", ResidualBlocks((1, 2, 1, 1), 0.5, 16), stride_in_1x1=True)
    layers, images = ("layer2",), jnp.asarray(IMAGES[:2])
    learner = student(network, layers)
    frozen = network.init(KEY)
    params, before = jax.jit(learner.init)(KEY)
    maps, after = train_maps(learner, params, before, frozen, images)
    folded_params = learner.freeze(params, batch_statistics(before, after))
    folded = jax.jit(network.apply, static_argnums=2)(frozen | {"params": folded_params}, images, layers)
    np.testing.assert_allclose(folded["layer2"], maps["layer2"], atol=2e-3 * float(maps["layer2"].max()))


def test_a_student_must_be_a_resnet():
    with pytest.raises(ValueError, match="the backbone must be a ResNet, got pdn_small"):
        stfpm(backbone="pdn_small")


def squared_distance(a, b):
    """Between the unit vectors of two maps, in float64."""
    a, b = (np.asarray(x, np.float64) + 1e-20 for x in (a, b))
    unit_a, unit_b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
    return ((unit_a - unit_b) ** 2).sum(-1)


def test_loss_and_heat_map_are_distances_of_features(frozen, model):
    method = stfpm(backbone=TINY_RESNET, layers=LAYERS, image_size=(32, 32), learning_rate=0.01)
    x = jax.jit(method.embed)(frozen, IMAGES)
    teacher = jax.jit(TINY_RESNET.apply, static_argnums=2)(frozen, IMAGES, LAYERS)
    state, update = training(method, frozen, model), jax.jit(method.stages[0].update)
    maps, _ = train_maps(LEARNER, *model, frozen, IMAGES)
    next_state, metrics = update(KEY, state, frozen, batch_of(x))
    expected = sum(squared_distance(maps[layer], teacher[layer]).mean() for layer in LAYERS)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
    _, next_metrics = update(KEY, next_state, frozen, batch_of(x))
    assert next_metrics["loss"] < metrics["loss"]

    fitted = method.stages[0].finalize(KEY, state, frozen)
    maps = jax.jit(TINY_RESNET.apply, static_argnums=2)(frozen | {"params": fitted.params}, IMAGES, LAYERS)
    scores = jax.jit(method.score)(fitted, frozen, x)
    pixel = np.ones((4, 32, 32))
    for layer in LAYERS:
        half = jnp.asarray(squared_distance(maps[layer], teacher[layer]) / 2, jnp.float32)
        pixel = pixel * np.asarray(upsample_blur(half, (32, 32), 0.0))
    np.testing.assert_allclose(scores.pixel, pixel, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(scores.image, pixel.max((1, 2)), rtol=1e-3, atol=1e-6)


def test_steps_are_those_of_sgd_with_momentum_and_weight_decay(frozen, model):
    """As in torch.optim.SGD, the decay is part of the gradient, and so of the momentum."""
    rate, momentum, decay = 0.01, 0.8, 0.1
    options = dict(learning_rate=rate, momentum=momentum, weight_decay=decay)
    method = stfpm(backbone=TINY_RESNET, layers=LAYERS, image_size=(32, 32), **options)
    x = jax.jit(method.embed)(frozen, IMAGES)

    @jax.jit
    def gradient(params):
        def loss(params):
            maps, _ = LEARNER.apply(params, model.stats, frozen, jnp.asarray(IMAGES), train=True)
            unit = lambda m: m / jnp.linalg.norm(m, axis=-1, keepdims=True)  # noqa: E731
            return sum(((unit(maps[layer] + 1e-20) - unit(x[layer] + 1e-20)) ** 2).sum(-1).mean() for layer in LAYERS)

        return jax.tree.map(lambda g, p: g + decay * p, jax.grad(loss)(params), params)

    state = training(method, frozen, model)
    params, velocity = model.params, jax.tree.map(jnp.zeros_like, model.params)
    for _ in range(2):
        state, _ = jax.jit(method.stages[0].update)(KEY, state, frozen, batch_of(x))
        velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, gradient(params))
        params = jax.tree.map(lambda p, v: p - rate * v, params, velocity)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.model.params, params)
