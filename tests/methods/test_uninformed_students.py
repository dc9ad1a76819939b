"""Uninformed Students: what the stages learn from, the students, and several patch sizes."""

import jax
import numpy as np
import pytest

from jaxad.data import Preprocess, open_data
from jaxad.driver.fit import fit
from jaxad.methods.uninformed_students import uninformed_students
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


def test_students_learn_from_other_images_than_those_that_scale_the_scores():
    assert [stage.rows for stage in uninformed_students(**SMALL).stages] == [training_rows, training_rows, holdout_rows]


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
