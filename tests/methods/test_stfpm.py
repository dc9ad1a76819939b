"""STFPM: its loss and heat map against numpy from dumped features, and the student's batch norm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.backbones import backbone, student
from jaxad.base import Batch
from jaxad.methods.stfpm import stfpm
from jaxad.ops.heatmap import upsample_blur
from tests.cases import TINY

KEY = jax.random.key(0)
LAYERS = ("layer1", "layer2")
NAME = TINY[0]
NETWORK = backbone(NAME)
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def frozen():
    return NETWORK.init(jax.random.key(1))


@pytest.fixture(scope="module")
def variables():
    """Of a student whose statistics and scales are not those of the start."""
    made = jax.jit(student(NAME, LAYERS).init)(KEY)
    rng = np.random.default_rng(0)
    noise = lambda leaf: rng.uniform(0, 0.1, leaf.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf + noise(leaf) if leaf.ndim == 1 else leaf, made)


def of_batch(before, after):
    """The mean and variance of one batch, from running statistics before and after it."""
    return jax.tree.map(lambda old, new: (new - 0.9 * old) / 0.1, before, after)


def test_batch_norm_is_folded_into_the_network_that_scores(frozen, variables):
    learner = student(NAME, LAYERS)
    maps, running = jax.jit(learner.apply)(variables, frozen, IMAGES, jnp.ones(4, bool))
    params = learner.freeze(variables | {"batch_stats": of_batch(variables["batch_stats"], running)})
    folded = jax.jit(NETWORK.apply, static_argnums=2)(frozen | {"params": params}, IMAGES, LAYERS)
    for layer in LAYERS:
        np.testing.assert_allclose(folded[layer], maps[layer], atol=2e-3)


def test_the_mtd_teachers_architecture_is_folded_alike():
    """A ResNet-50 whose stride sits in the first convolution of a block, as Caffe's has it."""
    name, layers, images = "resnet50.caffe_in1k", ("layer2",), jnp.asarray(IMAGES[:2])
    learner, network = student(name, layers), backbone(name)
    given = network.init(KEY)
    made = jax.jit(learner.init)(KEY)
    maps, running = jax.jit(learner.apply)(made, given, images, jnp.ones(2, bool))
    params = learner.freeze(made | {"batch_stats": of_batch(made["batch_stats"], running)})
    folded = jax.jit(network.apply, static_argnums=2)(given | {"params": params}, images, layers)
    np.testing.assert_allclose(folded["layer2"], maps["layer2"], atol=2e-3 * float(maps["layer2"].max()))


def test_padding_is_not_in_the_statistics(frozen, variables):
    apply = jax.jit(student(NAME, LAYERS).apply)
    maps, running = apply(variables, frozen, IMAGES, jnp.array([True, True, True, False]))
    fewer, expected = apply(variables, frozen, IMAGES[:3], jnp.ones(3, bool))
    for layer in LAYERS:
        np.testing.assert_allclose(maps[layer][:3], fewer[layer], atol=1e-3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), running, expected)


def test_a_student_must_be_a_resnet():
    with pytest.raises(ValueError, match="the backbone must be a ResNet, got pdn_small"):
        stfpm(backbone="pdn_small")


def squared(one, other):
    one, other = (np.asarray(x, np.float64) + 1e-20 for x in (one, other))
    unit_one, unit_other = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (one, other))
    return ((unit_one - unit_other) ** 2).sum(-1)


def test_loss_and_heat_map_are_those_of_the_features(frozen, variables):
    method = stfpm(backbone=NAME, layers=LAYERS, image_size=(32, 32), learning_rate=0.01)
    learner = student(NAME, LAYERS)
    x = jax.jit(method.embed)(frozen, IMAGES)
    teacher = jax.jit(NETWORK.apply, static_argnums=2)(frozen, IMAGES, LAYERS)
    state = jax.jit(method.init)(KEY, frozen, None)
    state = state._replace(trained=state.trained._replace(params=variables["params"]), running=variables["batch_stats"])
    maps, _ = jax.jit(learner.apply)(variables, frozen, IMAGES, jnp.ones(4, bool))
    index = jnp.arange(4, dtype=jnp.int32)
    batch = Batch(x, jnp.ones(4, bool), jnp.zeros(4, jnp.int32), None, index, jnp.float32(0))
    after, metrics = jax.jit(method.stages[0].update)(KEY, state, frozen, batch)
    expected = sum(squared(maps[layer], teacher[layer]).mean() for layer in LAYERS)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
    _, later = jax.jit(method.stages[0].update)(KEY, after, frozen, batch)
    assert later["loss"] < metrics["loss"]

    fitted = method.stages[0].finalize(KEY, state, frozen)
    found = jax.jit(NETWORK.apply, static_argnums=2)(frozen | {"params": fitted.params}, IMAGES, LAYERS)
    scores = jax.jit(method.score)(fitted, frozen, x)
    pixel = np.ones((4, 32, 32))
    for layer in LAYERS:
        half = jnp.asarray(squared(found[layer], teacher[layer]) / 2, jnp.float32)
        pixel = pixel * np.asarray(upsample_blur(half, (32, 32), 0.0))
    np.testing.assert_allclose(scores.pixel, pixel, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(scores.image, pixel.max((1, 2)), rtol=1e-3, atol=1e-6)


def test_steps_are_those_of_sgd_with_momentum_and_weight_decay(frozen, variables):
    """As torch.optim.SGD: the decay is part of the gradient, and so of the momentum."""
    rate, momentum, decay = 0.01, 0.8, 0.1
    options = dict(learning_rate=rate, momentum=momentum, weight_decay=decay)
    method = stfpm(backbone=NAME, layers=LAYERS, image_size=(32, 32), **options)
    learner = student(NAME, LAYERS)
    x = jax.jit(method.embed)(frozen, IMAGES)
    valid = jnp.ones(4, bool)

    @jax.jit
    def gradient(params):
        def loss(params):
            maps, _ = learner.apply(variables | {"params": params}, frozen, jnp.asarray(IMAGES), valid)
            of = lambda m: m / jnp.linalg.norm(m, axis=-1, keepdims=True)  # noqa: E731
            return sum(((of(maps[layer] + 1e-20) - of(x[layer] + 1e-20)) ** 2).sum(-1).mean() for layer in LAYERS)

        return jax.tree.map(lambda g, p: g + decay * p, jax.grad(loss)(params), params)

    state = jax.jit(method.init)(KEY, frozen, None)
    state = state._replace(trained=state.trained._replace(params=variables["params"]), running=variables["batch_stats"])
    batch = Batch(x, valid, jnp.zeros(4, jnp.int32), None, jnp.arange(4, dtype=jnp.int32), jnp.float32(0))
    params, velocity = variables["params"], jax.tree.map(jnp.zeros_like, variables["params"])
    for _ in range(2):
        state, _ = jax.jit(method.stages[0].update)(KEY, state, frozen, batch)
        velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, gradient(params))
        params = jax.tree.map(lambda p, v: p - rate * v, params, velocity)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.trained.params, params)
