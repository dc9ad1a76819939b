"""Several classes in one program, and meshes."""

import jax
import numpy as np
import pytest

import jaxad
from jaxad.data import Preprocess, open_data
from jaxad.driver.fit import fit, fit_classes
from jaxad.driver.mesh import mesh_shape
from jaxad.driver.programs import class_state
from jaxad.driver.record import NonFiniteLoss
from jaxad.driver.scoring import score_all, score_classes
from tests.driver.toy import CLASSES, DATA, FROZEN, KEY, TOY, assert_equal, execution, photographs, toy
from tests.examples import slow_after


@pytest.mark.parametrize("shape", slow_after(1, [((2, 4),), (None,), ((1, 8),), ((8, 1),)]))
@pytest.mark.parametrize("steps", slow_after(1, [2, None]))
def test_gradient_steps_of_several_classes_are_those_of_single_classes(shape, steps):
    mesh = None if shape is None else jaxad.make_mesh(shape=shape)
    options = execution(mesh=mesh, classes_per_step=steps)
    fitted = fit_classes(TOY, FROZEN, CLASSES, KEY, options)
    assert fitted.state.weight.shape == (3, 3) and fitted.metrics["loss"].shape == (3, 15)
    parts = [[], [], []]
    for c, index, scores in score_classes(
        TOY, fitted.state, FROZEN, CLASSES, execution(mesh=mesh, classes_per_step=steps)
    ):
        parts[c].append((index, scores.image))
    for c, data in enumerate(CLASSES):
        single = fit(TOY, FROZEN, data, KEY)
        state = class_state(TOY, FROZEN, fitted.state, c, data)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state, single.state)
        loss = fitted.metrics["loss"][c]
        assert np.isnan(loss[len(single.metrics["loss"]) :]).all()
        np.testing.assert_allclose(loss[: len(single.metrics["loss"])], single.metrics["loss"], rtol=1e-4, atol=1e-6)
        assert np.concatenate([index for index, _ in parts[c]]).tolist() == list(range(len(data)))
        image = np.concatenate([image for _, image in parts[c]])
        np.testing.assert_allclose(image, score_all(TOY, single.state, FROZEN, data).image, rtol=1e-4, atol=1e-5)


def test_gradients_of_a_batch_that_devices_share():
    method = toy(batch_size=8)
    single = fit(method, FROZEN, photographs(32), KEY).state
    shared = fit(method, FROZEN, photographs(32), KEY, execution(mesh=jaxad.make_mesh("data"))).state
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), shared, single)


def test_a_key_for_each_class_is_a_sweep_over_seeds():
    keys = jax.random.split(KEY, 3)
    fitted = fit_classes(TOY, FROZEN, [DATA] * 3, keys)
    for c in range(3):
        single = fit(TOY, FROZEN, DATA, keys[c]).state
        np.testing.assert_allclose(fitted.state.weight[c], single.weight, rtol=1e-5, atol=1e-6)
        assert_equal(fitted.state.noise[c], single.noise)


def test_classes_of_different_sizes_or_without_images_are_refused():
    other = open_data(np.zeros((3, 4, 4, 3), np.uint8), preprocess=Preprocess(None))["arrays"].train
    with pytest.raises(ValueError, match="images of one size and a key each, got 2 classes with"):
        fit_classes(TOY, FROZEN, [DATA, other], KEY)
    with pytest.raises(ValueError, match="images of one size and a key each, got 2 classes with"):
        fit_classes(TOY, FROZEN, [DATA, DATA], jax.random.split(KEY, 3))
    with pytest.raises(ValueError, match="at least one normal image, got none of"):
        fit_classes(TOY, FROZEN, [DATA, DATA.subset([])], KEY)


def test_the_loss_of_a_class_that_is_not_finite_names_it():
    images = {"fine": np.zeros((9, 6, 5, 3), np.uint8), "wild": np.full((9, 6, 5, 3), 255, np.uint8)}
    data = [split.train for split in open_data(images, preprocess=Preprocess(None)).values()]
    with pytest.raises(NonFiniteLoss, match=r"in stage train of wild, epoch \d+, step \d+: "):
        fit_classes(toy(rate=1e30), FROZEN, data, KEY)


MESHES = {
    "another name": (("class", "model"), None, 'must be "class" and "data"'),
    "twice the same": (("data", "data"), None, 'must be "class" and "data"'),
    "too many devices": ((), (4, 4), r"8 in all, got \(4, 4\)"),
    "a number missing": ((), (8,), r"got \(8,\)"),
}


@pytest.mark.parametrize("mistake", MESHES)
def test_impossible_meshes_are_refused(mistake):
    axes, shape, message = MESHES[mistake]
    with pytest.raises(ValueError, match=message):
        jaxad.make_mesh(*axes, shape=shape)


def test_meshes():
    assert dict(jaxad.make_mesh().shape) == {"class": 1, "data": 8}
    assert dict(jaxad.make_mesh("data").shape) == {"data": 8}
    assert dict(jaxad.make_mesh("data", "class", shape=(2, 2)).shape) == {"data": 2, "class": 2}
    assert [mesh_shape(8, classes) for classes in (1, 3, 4, 15)] == [(1, 8), (2, 4), (4, 2), (8, 1)]
    assert mesh_shape(6, 4) == (3, 2)
