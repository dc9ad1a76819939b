"""EfficientAD: the loss and its parts, the autoencoder, held-out images, the scale of the maps, and the penalty."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import jaxad
from jaxad import Detector
from jaxad.backbones import backbone, features, stride, student
from jaxad.data import Preprocess, open_data
from jaxad.driver.fit import fit
from jaxad.methods.efficientad import (
    Autoencoder,
    efficientad,
    hard_mean,
    jitter,
    rotation,
    teacher_features,
)
from jaxad.training.holdout import holdout_rows, training_rows
from tests.tiny import TINY_PDN

KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), np.uint8)
PHOTOGRAPHS = np.random.default_rng(1).integers(0, 256, (3, 64, 64, 3), np.uint8)
SMALL = dict(backbone=TINY_PDN, image_size=(64, 64), epochs=2, train_batch_size=4, learning_rate=1e-3)


@pytest.fixture(scope="module")
def frozen():
    return TINY_PDN.init(jax.random.key(1))


@pytest.fixture(scope="module")
def data():
    return open_data(IMAGES, preprocess=Preprocess(None))["arrays"].train


@pytest.fixture(scope="module")
def fitted(frozen, data):
    """A fit without photographs."""
    return fit(efficientad(**SMALL, penalty=False), frozen, data, KEY)


@given(st.integers(1, 3), st.integers(1, 400), st.sampled_from([0.0, 0.5, 0.9, 0.999]))
@settings(deadline=None, max_examples=10)
def test_hard_loss_is_the_mean_above_the_quantile(b, n, quantile):
    errors = np.random.default_rng(n).random((b, n, 1, 1), np.float32)
    flat = errors.reshape(b, n)
    threshold = np.quantile(flat, quantile, axis=1, keepdims=True)
    expected = [row[row >= t].mean() for row, t in zip(flat, threshold, strict=True)]
    np.testing.assert_allclose(hard_mean(jnp.asarray(errors), quantile), expected, rtol=1e-4)


def test_autoencoder_has_the_published_kernels_at_256_px():
    params = jax.eval_shape(Autoencoder((56, 56), 384, 4).init, KEY, jnp.zeros((1, 256, 256, 3)), None)["params"]
    kernels = [params[f"Conv_{i}"]["kernel"].shape for i in range(len(params))]
    encoder = [(4, 4, 3, 32), (4, 4, 32, 32), (4, 4, 32, 64), (4, 4, 64, 64), (4, 4, 64, 64), (8, 8, 64, 64)]
    assert kernels == [*encoder, *[(4, 4, 64, 64)] * 6, (3, 3, 64, 64), (3, 3, 64, 384)]


@pytest.mark.parametrize(("name", "pixels"), [("efficientad_small", 4), ("efficientad_medium", 4), ("pdn_small", 8)])
def test_stride_does_not_depend_on_padding(name, pixels):
    assert stride(name, backbone(name).stages[-1]) == pixels


def test_the_student_of_the_medium_network_has_twice_the_channels_at_its_end():
    params, _ = jax.eval_shape(student("efficientad_medium", ("head",), copies=2).init, KEY)
    assert [params[f"conv{i}"]["kernel"].shape[-1] for i in range(1, 7)] == [256, 512, 512, 512, 768, 768]


def test_other_backbones_are_rejected():
    with pytest.raises(ValueError, match=r"must be pdn_small, efficientad_small .* got resnet18"):
        efficientad(backbone="resnet18")


@pytest.mark.parametrize(("grid", "step"), [((56, 56), 4), ((32, 32), 8)])
def test_autoencoder_has_the_grid_of_the_teacher(grid, step):
    image = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32)
    maps, _ = jax.eval_shape(lambda image: Autoencoder(grid, 8, step).init_with_output(KEY, image, KEY), image)
    assert maps.shape == (2, *grid, 8)


def test_jitter_changes_one_property_by_a_fifth_at_most():
    image = jnp.asarray(IMAGES, jnp.float32) / 255
    jittered = jax.jit(jitter)(KEY, image)
    assert float(jittered.min()) >= 0 and float(jittered.max()) <= 1
    change = np.abs(np.asarray(jittered - image)).max((1, 2, 3))
    assert (change > 0).all() and (change <= 0.2 + 1e-6).all()
    gray = np.full(image.shape, 0.5, np.float32)
    changed = np.abs(np.asarray(jax.jit(jitter)(KEY, gray)) - gray).max((1, 2, 3)) > 1e-6
    assert changed.any() and not changed.all()  # only brightness changes a plain gray image


@given(st.integers(1, 300))
def test_images_are_held_out_or_trained_on(n):
    held_out, rest = holdout_rows(n), training_rows(n)
    assert len(held_out) and len(rest)
    if n > 1:
        assert sorted([*held_out, *rest]) == list(range(n))


def test_students_learn_from_other_images_than_those_that_scale_the_maps():
    assert [stage.rows for stage in efficientad(**SMALL).stages] == [training_rows, training_rows, holdout_rows]


def student_maps(frozen, params, images):
    learner = student(TINY_PDN, ("head",), copies=2)
    maps, _ = jax.jit(learner.apply, static_argnums=4)(params["student"], {}, frozen, images, False)
    return maps["head"]


def test_rotated_principal_components_have_one_scale_and_the_same_distances():
    matrix = rotation(384)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(384), atol=1e-5)
    variance = 0.95 ** np.arange(384)
    rotated = matrix.T**2 @ variance
    assert variance.max() > 1e8 * variance.min() and rotated.max() < 6 * rotated.min()


def test_the_embedded_network_describes_borders_like_the_middle():
    """A periodic pattern, continued by its mirror image, has the same features everywhere as in a larger image."""
    network = backbone("pdn_small")
    frozen = network.init(KEY)
    tile = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    tile = np.concatenate([tile, tile[::-1]])
    tile = np.concatenate([tile, tile[:, ::-1]], 1)
    image = jnp.asarray(np.tile(tile, (8, 8, 1))[None])
    teacher = jax.jit(features(network, ("layer3",)))
    maps = np.asarray(jax.jit(teacher_features(network, "layer3"))(frozen, image)["layer3"]) @ rotation(384).T
    assert maps.shape == (1, 4, 4, 384)
    middle = np.asarray(teacher(frozen, jnp.tile(image, (1, 3, 3, 1)))["layer3"])[:, 10:14, 10:14]
    np.testing.assert_allclose(maps, middle, rtol=1e-3, atol=1e-4)
    padded = np.asarray(teacher(frozen, image)["layer3"])
    assert np.abs(padded[:, 0] - padded[:, 4]).max() > 0.1 * np.abs(padded).max()


@pytest.mark.parametrize("name", ["efficientad_small", "pdn_small"])
def test_a_border_of_16_px_has_no_features(name):
    network, image = backbone(name), jax.ShapeDtypeStruct((1, 256, 128, 3), jnp.uint8)
    layer, frozen = network.stages[-1], jax.eval_shape(network.init, KEY)
    maps = jax.eval_shape(teacher_features(network, layer), frozen, image)[layer]
    step = stride(network, layer)
    assert maps.shape[1:3] == ((256 - 32) // step, (128 - 32) // step)


def test_images_smaller_than_two_patches_are_rejected():
    with pytest.raises(ValueError, match=r"image_size must be 64 or more to have patches, got \(64, 32\)"):
        efficientad(image_size=(64, 32))


def test_penalty_needs_photographs(frozen, data):
    with pytest.raises(ValueError, match="learns from photographs of other things too: give them as auxiliary"):
        fit(efficientad(**SMALL), frozen, data, KEY)


@pytest.mark.slow
def test_a_detector_needs_photographs_to_fit_but_not_to_predict(tmp_path):
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for i, pixels in enumerate(IMAGES[:3]):
        Image.fromarray(pixels).save(photographs / f"{i}.png")
    options = dict(image_size=64, holdout=0.5, epochs=1, train_batch_size=4)
    with pytest.raises(ValueError, match="efficientad learns from photographs of other things too: set auxiliary"):
        Detector("efficientad", **options).fit(IMAGES)
    detector = Detector("efficientad", auxiliary=photographs, **options).fit(IMAGES)
    detector.save(tmp_path / "model")
    shutil.rmtree(photographs)
    prediction = jaxad.load(tmp_path / "model").predict(IMAGES)
    np.testing.assert_array_equal(prediction.pred_score, detector.predict(IMAGES).pred_score)


@pytest.mark.slow
def test_penalty_lowers_the_student_on_photographs(frozen, data, fitted):
    with_penalty = fit(efficientad(**SMALL), frozen, data, KEY, auxiliary=PHOTOGRAPHS)
    assert np.isfinite(with_penalty.metrics["loss"]).all()
    assert with_penalty.metrics["loss"][0] > fitted.metrics["loss"][0]
    with_penalty, without = (
        float((student_maps(frozen, state.params, PHOTOGRAPHS)[..., :384] ** 2).mean())
        for state in (with_penalty.state, fitted.state)
    )
    assert with_penalty < 0.95 * without
