"""Uninformed Students: errors and variances against numpy, the scales, and several patch sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.backbones import backbone, student
from jaxad.base import Batch
from jaxad.data import Preprocess, open_data
from jaxad.driver.fit import fit
from jaxad.methods.uninformed_students import uninformed_students
from jaxad.ops.heatmap import upsample_blur
from jaxad.training.holdout import held_out, learned_from
from tests.cases import TINY

KEY = jax.random.key(0)
assert {"patch9", "patch13"} < set(TINY)
IMAGES = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
SMALL = dict(backbone="patch9", image_size=(32, 32), num_students=2, stride=8, epochs=1, train_batch_size=4)


@pytest.fixture(scope="module")
def fitted():
    """The weights, the method and what it learned."""
    frozen = backbone("patch9").init(jax.random.key(1))
    method = uninformed_students(**SMALL)
    data = open_data(IMAGES, preprocess=Preprocess(None))["arrays"].train
    return frozen, method, fit(method, frozen, data, KEY)


def recomputed(frozen, method, state, images):
    """Errors and variances of every position, in float64."""
    x = jax.jit(method.embed)(frozen, images)
    apply = jax.jit(student("patch9", ("stride8",)).apply)
    variables = [jax.tree.map(lambda leaf, i=i: leaf[i], state.students["patch9"]) for i in range(2)]
    found = [apply(v, frozen, images, jnp.ones(len(images), bool))[0]["stride8"] for v in variables]
    found = np.asarray(found, np.float64)
    scale = state.teacher["patch9"]
    teacher = (np.asarray(x["patch9"], np.float64) - np.asarray(scale.mean)) / np.asarray(scale.deviation)
    mean = found.mean(0)
    error = ((mean - teacher) ** 2).sum(-1)
    variance = (found**2).sum(-1).mean(0) - (mean**2).sum(-1)
    return x, error, variance


def test_scores_are_standardized_errors_and_variances(fitted):
    frozen, method, (state, *_) = fitted
    x, error, variance = recomputed(frozen, method, state, IMAGES)
    own = state.scores["patch9"]
    expected = sum((m - float(own.mean[i])) / float(own.deviation[i]) for i, m in enumerate((error, variance)))
    scores = jax.jit(method.score)(state, frozen, x)
    pixel = upsample_blur(jnp.asarray(expected, jnp.float32), (32, 32), 0.0)
    np.testing.assert_allclose(scores.pixel, pixel, atol=5e-3)
    np.testing.assert_allclose(scores.image, np.asarray(scores.pixel).max((1, 2)))


def test_the_scales_are_those_of_held_out_images(fitted):
    frozen, method, (state, *_) = fitted
    _, error, variance = recomputed(frozen, method, state, IMAGES[held_out(12)])
    own = state.scores["patch9"]
    np.testing.assert_allclose(own.mean, [error.mean(), variance.mean()], rtol=1e-3)
    np.testing.assert_allclose(own.deviation, [error.std(), variance.std()], rtol=1e-3)


def test_descriptions_are_standardized_by_the_images_that_teach(fitted):
    frozen, method, (state, *_) = fitted
    found = np.asarray(jax.jit(method.embed)(frozen, IMAGES[learned_from(12)])["patch9"], np.float64)
    np.testing.assert_allclose(state.teacher["patch9"].mean, found.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state.teacher["patch9"].deviation, found.std((0, 1, 2)), rtol=1e-4)


def test_the_loss_is_that_of_one_student_and_position():
    """Eq. 6 of a single step of two images, whose students are the untrained ones."""
    frozen, images = backbone("patch9").init(jax.random.key(1)), IMAGES[:2]
    method = uninformed_students(**SMALL)
    x = jax.jit(method.embed)(frozen, images)
    measured = method.init(KEY, frozen, x)
    batch = Batch(x, jnp.ones(2, bool), jnp.zeros(2, jnp.int32), None, jnp.arange(2), jnp.float32(0))
    state = method.stages[0].finalize(KEY, method.stages[0].update(KEY, measured, frozen, batch)[0], frozen)
    _, metrics = jax.jit(method.stages[1].update)(KEY, state, frozen, batch)
    teacher = np.asarray(x["patch9"], np.float64)
    teacher = (teacher - teacher.mean((0, 1, 2))) / teacher.std((0, 1, 2))
    apply, losses = jax.jit(student("patch9", ("stride8",)).apply), []
    for i in range(2):
        variables = jax.tree.map(lambda leaf, i=i: leaf[i], measured.students["patch9"])
        found = np.asarray(apply(variables, frozen, images, batch.valid)[0]["stride8"], np.float64)
        losses.append(((found - teacher) ** 2).sum(-1).mean())
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-3)


def test_students_differ_and_learn(fitted):
    _, _, (state, _, _, metrics) = fitted
    kernels = state.students["patch9"]["params"]["conv1"]["kernel"]
    assert not np.allclose(kernels[0], kernels[1])
    assert metrics["loss"][-1] < metrics["loss"][0]


def test_several_patch_sizes_are_averaged():
    names = ("patch9", "patch13")
    weights = tuple(backbone(name).init(jax.random.key(i)) for i, name in enumerate(names))
    method = uninformed_students(**SMALL | {"backbone": names})
    data = open_data(IMAGES, preprocess=Preprocess(None))["arrays"].train
    state = fit(method, weights, data, KEY).state
    x = jax.jit(method.embed)(weights, IMAGES)
    parts = []
    for name, own in zip(names, weights, strict=True):
        single = uninformed_students(**SMALL | {"backbone": name})
        parts.append(jax.jit(single.score)(type(state)(*({name: part[name]} for part in state)), own, x).pixel)
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
