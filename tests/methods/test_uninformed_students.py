"""Uninformed Students: errors and variances against numpy, the scales, and several patch sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.backbones import student
from jaxad.base import Batch
from jaxad.data import Preprocess, open_data
from jaxad.driver.fit import fit
from jaxad.methods.uninformed_students import uninformed_students
from jaxad.ops.heatmap import upsample_blur
from jaxad.training.holdout import holdout_rows, training_rows
from tests.tiny import PATCH9, PATCH13

KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
SMALL = dict(backbone=PATCH9, image_size=(32, 32), num_students=2, stride=8, epochs=1, train_batch_size=4)


@pytest.fixture(scope="module")
def fitted():
    """The weights, the method and its fit."""
    frozen = PATCH9.init(jax.random.key(1))
    method = uninformed_students(**SMALL)
    data = open_data(IMAGES, preprocess=Preprocess(None))["arrays"].train
    return frozen, method, fit(method, frozen, data, KEY)


def student_maps(frozen, params, images):
    """The maps of both students, in float64."""
    apply = jax.jit(student(PATCH9, ("stride8",)).apply, static_argnums=4)
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], params["patch9"]) for i in range(2)]
    return np.asarray([apply(one, {}, frozen, images, False)[0]["stride8"] for one in each], np.float64)


def expected_scores(frozen, method, state, images):
    """The embedded images, and the error and variance of every position, in float64."""
    x, scale = jax.jit(method.embed)(frozen, images), state.teacher["patch9"]
    maps = student_maps(frozen, state.params, images)
    teacher = (np.asarray(x["patch9"], np.float64) - np.asarray(scale.mean)) / np.asarray(scale.deviation)
    mean = maps.mean(0)
    error = ((mean - teacher) ** 2).sum(-1)
    variance = (maps**2).sum(-1).mean(0) - (mean**2).sum(-1)
    return x, error, variance


def test_scores_are_standardized_errors_and_variances(fitted):
    frozen, method, (state, *_) = fitted
    x, error, variance = expected_scores(frozen, method, state, IMAGES)
    scale = state.scores["patch9"]
    expected = sum((m - float(scale.mean[i])) / float(scale.deviation[i]) for i, m in enumerate((error, variance)))
    scores = jax.jit(method.score)(state, frozen, x)
    pixel = upsample_blur(jnp.asarray(expected, jnp.float32), (32, 32), 0.0)
    np.testing.assert_allclose(scores.pixel, pixel, atol=5e-3)
    np.testing.assert_allclose(scores.image, np.asarray(scores.pixel).max((1, 2)))


def test_scores_are_standardized_by_held_out_images(fitted):
    frozen, method, (state, *_) = fitted
    _, error, variance = expected_scores(frozen, method, state, IMAGES[holdout_rows(12)])
    scale = state.scores["patch9"]
    np.testing.assert_allclose(scale.mean, [error.mean(), variance.mean()], rtol=1e-3)
    np.testing.assert_allclose(scale.deviation, [error.std(), variance.std()], rtol=1e-3)


def test_descriptors_are_standardized_by_the_training_images(fitted):
    frozen, method, (state, *_) = fitted
    maps = np.asarray(jax.jit(method.embed)(frozen, IMAGES[training_rows(12)])["patch9"], np.float64)
    np.testing.assert_allclose(state.teacher["patch9"].mean, maps.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state.teacher["patch9"].deviation, maps.std((0, 1, 2)), rtol=1e-4)


def test_loss_is_the_mean_of_students_and_positions():
    """Eq. 6 on a single step with two images and untrained students."""
    frozen, images = PATCH9.init(jax.random.key(1)), IMAGES[:2]
    method = uninformed_students(**SMALL)
    x = jax.jit(method.embed)(frozen, images)
    batch = Batch(x, jnp.ones(2, bool), jnp.zeros(2, jnp.int32), None, jnp.arange(2), jnp.float32(0))
    measure, train, _ = method.stages
    moments, _ = jax.jit(measure.update)(KEY, measure.init(KEY, None, frozen, x), frozen, batch)
    training = jax.jit(train.init)(KEY, measure.finalize(KEY, moments, frozen), frozen, x)
    _, metrics = jax.jit(train.update)(KEY, training, frozen, batch)
    teacher = np.asarray(x["patch9"], np.float64)
    teacher = (teacher - teacher.mean((0, 1, 2))) / teacher.std((0, 1, 2))
    maps = student_maps(frozen, training.model.params, images)
    np.testing.assert_allclose(metrics["loss"], ((maps - teacher) ** 2).sum(-1).mean(), rtol=1e-3)


def test_students_differ_and_their_loss_falls(fitted):
    _, _, (state, _, _, metrics) = fitted
    kernels = state.params["patch9"]["conv1"]["kernel"]
    assert not np.allclose(kernels[0], kernels[1])
    assert metrics["loss"][-1] < metrics["loss"][0]


@pytest.mark.slow
def test_several_patch_sizes_are_averaged():
    networks = (PATCH9, PATCH13)
    weights = tuple(network.init(jax.random.key(i)) for i, network in enumerate(networks))
    method = uninformed_students(**SMALL | {"backbone": networks})
    data = open_data(IMAGES, preprocess=Preprocess(None))["arrays"].train
    state = fit(method, weights, data, KEY).state
    x = jax.jit(method.embed)(weights, IMAGES)
    parts = []
    for network, frozen in zip(networks, weights, strict=True):
        single = uninformed_students(**SMALL | {"backbone": network})
        part = type(state)(*({network.name: field[network.name]} for field in state))
        parts.append(jax.jit(single.score)(part, frozen, x).pixel)
    pixel = jax.jit(method.score)(state, weights, x).pixel
    np.testing.assert_allclose(pixel, (parts[0] + parts[1]) / 2, rtol=1e-4, atol=1e-4)


def test_a_teacher_must_be_a_patch_network():
    with pytest.raises(ValueError, match=r"the backbones must be patch17, patch33 or patch65, .*, got resnet18"):
        uninformed_students(backbone="resnet18")
    with pytest.raises(ValueError, match="stride must be 1, 2, 4 or 8, got 3"):
        uninformed_students(stride=3)
    with pytest.raises(ValueError, match="the backbones must differ, got patch17, patch17"):
        uninformed_students(backbone=("patch17", "patch17"))
    with pytest.raises(ValueError, match=r"image_size must be multiples of 8, got \(100, 96\)"):
        uninformed_students(image_size=(100, 96), stride=8)
