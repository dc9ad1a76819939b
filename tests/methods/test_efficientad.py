"""EfficientAD: hard loss, autoencoder, what is held out, the scale of the maps, and the penalty."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from PIL import Image

import jaxad
from jaxad import Detector
from jaxad.backbones import backbone, features, normalize, stride, student
from jaxad.base import Batch
from jaxad.data import Preprocess, open_data
from jaxad.driver.fit import fit, score_all
from jaxad.methods.efficientad import Autoencoder, described, draw_photographs, efficientad, hard_mean, jitter, mixing
from jaxad.ops.heatmap import upsample_blur
from jaxad.training.holdout import held_out, learned_from
from tests.cases import TINY

KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), np.uint8)
NAME = TINY[1]
SMALL = dict(backbone=NAME, image_size=(64, 64), epochs=2, train_batch_size=4, learning_rate=1e-3)


@pytest.fixture(scope="module")
def frozen():
    return backbone(NAME).init(jax.random.key(1))


@pytest.fixture(scope="module")
def data():
    return open_data(IMAGES, preprocess=Preprocess(None))["arrays"].train


@pytest.fixture(scope="module")
def alone(frozen, data):
    """A fit without photographs."""
    return fit(efficientad(**SMALL, penalty=False), frozen, data, KEY)


@given(st.integers(1, 3), st.integers(1, 400), st.sampled_from([0.0, 0.5, 0.9, 0.999]))
@settings(deadline=None)
def test_hard_loss_is_the_mean_above_the_quantile(b, n, share):
    errors = np.random.default_rng(n).random((b, n, 1, 1), np.float32)
    flat = errors.reshape(b, n)
    threshold = np.quantile(flat, share, axis=1, keepdims=True)
    expected = [row[row >= t].mean() for row, t in zip(flat, threshold, strict=True)]
    np.testing.assert_allclose(hard_mean(jnp.asarray(errors), share), expected, rtol=1e-4)


def test_autoencoder_has_the_published_kernels_at_256_px():
    made = jax.eval_shape(Autoencoder((56, 56), 384, 4).init, KEY, jnp.zeros((1, 256, 256, 3)), None)
    kernels = [made["params"][f"Conv_{i}"]["kernel"].shape for i in range(len(made["params"]))]
    encoder = [(4, 4, 3, 32), (4, 4, 32, 32), (4, 4, 32, 64), (4, 4, 64, 64), (4, 4, 64, 64), (8, 8, 64, 64)]
    assert kernels == [*encoder, *[(4, 4, 64, 64)] * 6, (3, 3, 64, 64), (3, 3, 64, 384)]


@pytest.mark.parametrize(("name", "pixels"), [("efficientad_small", 4), ("efficientad_medium", 4), ("pdn_small", 8)])
def test_strides_are_told_without_padding(name, pixels):
    network = backbone(name)
    assert stride(network, network.stages[-1]) == pixels


def test_the_student_of_the_medium_network_is_twice_as_wide_where_it_describes():
    made = jax.eval_shape(student("efficientad_medium", ("head",), copies=2).init, KEY)
    assert [made["params"][f"conv{i}"]["kernel"].shape[-1] for i in range(1, 7)] == [256, 512, 512, 512, 768, 768]


def test_other_backbones_are_refused():
    with pytest.raises(ValueError, match=r"must be pdn_small, efficientad_small .* got resnet18"):
        efficientad(backbone="resnet18")


@pytest.mark.parametrize(("grid", "apart"), [((56, 56), 4), ((32, 32), 8)])
def test_autoencoder_gives_the_teachers_grid(grid, apart):
    image = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32)
    found, _ = jax.eval_shape(lambda image: Autoencoder(grid, 8, apart).init_with_output(KEY, image, KEY), image)
    assert found.shape == (2, *grid, 8)


def test_jitter_changes_one_property_by_a_fifth_at_most():
    image = jnp.asarray(IMAGES, jnp.float32) / 255
    found = jax.jit(jitter)(KEY, image)
    assert float(found.min()) >= 0 and float(found.max()) <= 1
    change = np.abs(np.asarray(found - image)).max((1, 2, 3))
    assert (change > 0).all() and (change <= 0.2 + 1e-6).all()
    gray = np.asarray(image * 0 + 0.5)
    kept = np.asarray(jax.jit(jitter)(KEY, jnp.asarray(gray)))
    scaled = np.abs(kept - gray).max((1, 2, 3)) > 1e-6  # only brightness changes a plain gray image
    assert scaled.any() and not scaled.all()


@given(st.integers(1, 300))
def test_images_are_held_out_or_learned_from(n):
    out, rest = held_out(n), learned_from(n)
    assert len(out) and len(rest)
    if n > 1:
        assert sorted([*out, *rest]) == list(range(n))


def test_channels_are_standardized_by_the_images_that_teach(frozen, alone):
    found = jax.jit(features(NAME, ("head",)))(frozen, IMAGES[learned_from(12)])["head"]
    found = np.asarray(found, np.float64)
    np.testing.assert_allclose(alone.state.mean, found.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(alone.state.deviation, found.std((0, 1, 2)), rtol=1e-4)


def maps_of(frozen, state, images):
    """Both maps of squared errors, in numpy from the networks' outputs."""
    x = jax.jit(features(NAME, ("head",)))(frozen, images)["head"]
    teacher = (np.asarray(x) - np.asarray(state.mean)) / np.asarray(state.deviation)
    learner = student(NAME, ("head",), copies=2)
    found = np.asarray(jax.jit(learner.apply)(state.params["student"], frozen, images, None)[0]["head"])
    decoder, normalized = Autoencoder((8, 8), 384, 4), normalize(frozen, jnp.asarray(images), jnp.float32)
    decoded = np.asarray(jax.jit(decoder.apply, static_argnums=2)(state.params["autoencoder"], normalized, None))
    own, second = np.split(found, 2, axis=-1)
    return np.stack([((teacher - own) ** 2).mean(-1), ((decoded - second) ** 2).mean(-1)], -1)


def test_quantiles_are_those_of_held_out_images_and_scale_the_heat_map(frozen, data, alone):
    state = alone.state
    normal = maps_of(frozen, state, IMAGES[held_out(12)])
    np.testing.assert_allclose(state.low, np.quantile(normal, 0.9, (0, 1, 2)), rtol=1e-3)
    np.testing.assert_allclose(state.high, np.quantile(normal, 0.995, (0, 1, 2)), rtol=1e-3)
    scaled = (0.1 * (maps_of(frozen, state, IMAGES) - state.low) / (state.high - state.low)).mean(-1)
    expected = np.asarray(upsample_blur(jnp.pad(scaled, ((0, 0), (4, 4), (4, 4))), (64, 64), 0.0))
    scores = score_all(efficientad(**SMALL, penalty=False), state, frozen, data)
    np.testing.assert_allclose(scores.pixel, expected, rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(scores.image, expected.max((1, 2)), rtol=1e-2, atol=1e-3)


def test_training_step(frozen):
    """The loss, in which all four terms are, and the rate that drops in the last twentieth of the steps."""
    method, photographs = efficientad(**SMALL), np.random.default_rng(1).integers(0, 256, (3, 64, 64, 3), np.uint8)
    frozen = frozen | {"auxiliary": photographs}
    x, valid = jax.jit(method.embed)(frozen, IMAGES[:4]), np.array([True, True, False, True])

    def batch(progress):
        return Batch(x, jnp.asarray(valid), jnp.zeros(4, jnp.int32), None, jnp.arange(4), jnp.float32(progress))

    measured, _ = jax.jit(method.stages[0].update)(KEY, method.init(KEY, frozen, x), frozen, batch(0))
    state = method.stages[0].finalize(KEY, measured, frozen)
    update = jax.jit(method.stages[1].update)
    (early, metrics), (late, _) = (update(KEY, state, frozen, batch(progress)) for progress in (0.94, 0.96))
    before, early, late = (ravel_pytree(s.trained.params)[0] for s in (state, early, late))
    np.testing.assert_allclose(late - before, 0.1 * (early - before), atol=1e-6)

    keys, image = jax.random.split(KEY, 3), jnp.asarray(IMAGES[:4] * valid[:, None, None, None], jnp.float32) / 255
    seen = [image, jitter(keys[0], image), draw_photographs(keys[1], jnp.asarray(photographs), 4)]
    teacher = jax.jit(lambda image: backbone(NAME).apply(frozen, image, ("head",))["head"])
    learner, shown = student(NAME, ("head",), copies=2), jnp.concatenate(seen)
    found = learner.apply(state.trained.params["student"], frozen, shown, None)
    own, changed, foreign = np.split(np.asarray(found[0]["head"], np.float64), 3)
    decoder = Autoencoder((8, 8), 384, 4)
    decoded = decoder.apply(state.trained.params["autoencoder"], normalize(frozen, seen[1], jnp.float32), keys[2])
    first, second = (
        (np.asarray(teacher(image)) - np.asarray(state.mean)) / np.asarray(state.deviation) for image in seen[:2]
    )
    losses = []
    for i in np.flatnonzero(valid):
        errors = (first[i] - own[i, ..., :384]) ** 2
        hard = errors[errors >= np.quantile(errors, 0.999)].mean()
        branch = ((second[i] - decoded[i]) ** 2).mean() + ((decoded[i] - changed[i, ..., 384:]) ** 2).mean()
        losses.append(hard + branch + (foreign[i, ..., :384] ** 2).mean())
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-3)


def test_mixed_principal_components_are_of_one_scale_and_as_far_apart():
    turn = mixing(384)
    np.testing.assert_allclose(turn @ turn.T, np.eye(384), atol=1e-5)
    variance = 0.95 ** np.arange(384)
    mixed = turn.T**2 @ variance
    assert variance.max() > 1e8 * variance.min() and mixed.max() < 6 * mixed.min()


def test_borders_of_the_embedded_network_are_described_like_the_middle():
    """A pattern that repeats, and so continues in its mirror image, is described everywhere as in a larger image."""
    frozen = backbone("pdn_small").init(KEY)
    tile = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    tile = np.concatenate([tile, tile[::-1]])
    tile = np.concatenate([tile, tile[:, ::-1]], 1)
    image = jnp.asarray(np.tile(tile, (8, 8, 1))[None])
    teacher = jax.jit(features("pdn_small", ("layer3",)))
    found = np.asarray(jax.jit(described("pdn_small", "layer3"))(frozen, image)["layer3"]) @ mixing(384).T
    assert found.shape == (1, 4, 4, 384)
    middle = np.asarray(teacher(frozen, jnp.tile(image, (1, 3, 3, 1)))["layer3"])[:, 10:14, 10:14]
    np.testing.assert_allclose(found, middle, rtol=1e-3, atol=1e-4)
    raw = np.asarray(teacher(frozen, image)["layer3"])
    assert np.abs(raw[:, 0] - raw[:, 4]).max() > 0.1 * np.abs(raw).max()


@pytest.mark.parametrize("name", ["efficientad_small", "pdn_small"])
def test_a_border_of_16_px_is_not_described(name):
    frozen, image = jax.eval_shape(backbone(name).init, KEY), jax.ShapeDtypeStruct((1, 256, 128, 3), jnp.uint8)
    network = backbone(name)
    found = jax.eval_shape(described(name, network.stages[-1]), frozen, image)[network.stages[-1]]
    apart = stride(network, network.stages[-1])
    assert found.shape[1:3] == ((256 - 32) // apart, (128 - 32) // apart)


def test_images_smaller_than_two_patches_are_refused():
    with pytest.raises(ValueError, match=r"image_size must be 64 or more, .* got \(64, 32\)"):
        efficientad(image_size=(64, 32))


def test_penalty_needs_photographs(frozen, data):
    with pytest.raises(ValueError, match="penalty needs photographs of other things: give auxiliary"):
        fit(efficientad(**SMALL), frozen, data, KEY)


def test_a_detector_takes_photographs_from_a_folder_to_learn_but_not_to_score(tmp_path):
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for i, pixels in enumerate(IMAGES[:3]):
        Image.fromarray(pixels).save(photographs / f"{i}.png")
    few = dict(image_size=64, holdout=0.5, epochs=1, train_batch_size=4)
    with pytest.raises(ValueError, match="efficientad learns from photographs of other things too: give auxiliary"):
        Detector("efficientad", **few).fit(IMAGES)
    detector = Detector("efficientad", auxiliary=photographs, **few).fit(IMAGES)
    assert detector.frozen["auxiliary"].shape == (3, 64, 64, 3)
    detector.save(tmp_path / "model")
    shutil.rmtree(photographs)
    found = jaxad.load(tmp_path / "model").predict(IMAGES)
    np.testing.assert_array_equal(found.pred_score, detector.predict(IMAGES).pred_score)


def test_penalty_keeps_the_student_from_what_the_photographs_show(frozen, data, alone):
    photographs = np.random.default_rng(1).integers(0, 256, (3, 64, 64, 3), np.uint8)
    fitted = fit(efficientad(**SMALL), frozen | {"auxiliary": photographs}, data, KEY)
    assert np.isfinite(fitted.metrics["loss"]).all()
    assert fitted.metrics["loss"][0] > alone.metrics["loss"][0]
    learner = student(NAME, ("head",), copies=2)

    def shown(state):
        maps = jax.jit(learner.apply)(state.params["student"], frozen, photographs, None)[0]["head"]
        return float((maps[..., :384] ** 2).mean())

    assert shown(fitted.state) < 0.95 * shown(alone.state)
