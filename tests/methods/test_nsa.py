"""NSA: transposed convolutions, the targets of its loss, and how images score."""

import functools
import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.backbones import student
from jaxad.base import Batch
from jaxad.methods.nsa import LAYER, Decoder, NsaNetwork, nsa
from jaxad.nn.norm import Convolution
from jaxad.synthesis.nsa import Sizes, natural_anomaly
from jaxad.synthesis.warp import random_pose
from tests.methods import plain
from tests.tiny import TINY_RESNET

module = importlib.import_module("jaxad.methods.nsa")
KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
SMALL = dict(
    backbone=TINY_RESNET, image_size=(32, 32), pieces=1, shift=0, degrees=0.0, on_foreground=False, learning_rate=1e-3
)

ENCODE = jax.jit(functools.partial(student(TINY_RESNET, (LAYER,)).apply, train=True))
DECODE = jax.jit(functools.partial(Decoder().apply, train=True, mutable=["batch_stats"]))


def batch_of(images, progress=0.0):
    n = len(images)
    index = jnp.arange(n, dtype=jnp.int32)
    return Batch(jnp.asarray(images), jnp.ones(n, bool), jnp.zeros(n, jnp.int32), None, index, jnp.float32(progress))


def initial(method, frozen):
    return plain.fresh(jax.eval_shape(lambda: method.stages[0].init(KEY, None, frozen, None)))


@pytest.fixture(scope="module")
def frozen():
    return TINY_RESNET.init(jax.random.key(1))


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_an_odd_transposed_convolution_adds_its_kernel_at_every_second_pixel(kernel):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 2)), jnp.float32)
    convolve = Convolution(5, kernel, up=True)
    variables = convolve.init(KEY, x)
    expected = plain.transposed(np.asarray(x), variables["params"])
    np.testing.assert_allclose(convolve.apply(variables, x), expected, atol=1e-5)


def test_an_image_scores_the_mean_of_its_heat_map(frozen):
    method = nsa(**SMALL)
    fitted = method.stages[0].finalize(KEY, initial(method, frozen), frozen)
    assert isinstance(fitted, NsaNetwork)
    scores = jax.jit(method.score)(fitted, frozen, jnp.asarray(IMAGES))
    np.testing.assert_allclose(scores.image, np.asarray(scores.pixel, np.float64).mean((1, 2)), rtol=1e-5)


@pytest.mark.parametrize("labels", ["logistic", pytest.param("intensity", marks=pytest.mark.slow)])
def test_the_loss_is_of_the_label(monkeypatch, frozen, labels):
    """Cross-entropy, or a squared difference in levels, of known anomalies; pieces are of the other image."""
    label = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    images = np.random.default_rng(3).integers(0, 256, (2, 64, 64, 3), np.uint8)
    arguments = {}

    def fake(key, target, source, **options):
        arguments.update(options, target=target, source=source)
        return 0.8 * target + 0.2 * source, jnp.asarray(label)

    monkeypatch.setattr(module, "natural_anomaly", fake)
    monkeypatch.setattr(module, "foreground", lambda image: ("object on", image))
    options = dict(pieces=2, resize=(0.8, 1.1), least_object=0.3, least_overlap=0.2, mixed=True, logistic=(0.5, 9.0))
    options |= dict(labels=labels)
    method = nsa(**SMALL | options | dict(image_size=(64, 64), on_foreground=True, least_side=0.04, most_side=0.3))
    state = initial(method, frozen)
    next_state, metrics = jax.jit(method.stages[0].update)(KEY, state, frozen, batch_of(images, 0.5))
    assert {name: arguments[name] for name in options} == options and arguments["sizes"][:2] == (0.04, 0.3)
    assert [image for _, image in arguments["foregrounds"]] == [arguments["target"], arguments["source"]]
    image = jnp.asarray(images, jnp.float32) / 255
    image = 0.8 * image + 0.2 * image[::-1]
    params, stats = state.model
    maps, _ = ENCODE(params["encoder"], stats["encoder"], frozen, image)
    variables = {"params": params["decoder"], "batch_stats": stats["decoder"]}
    logits, _ = DECODE(variables, maps[LAYER])
    logits = np.asarray(logits, np.float64)
    squared, crossed = (np.maximum(logits, 0) - 255 * label) ** 2, np.logaddexp(0, logits) - label * logits
    expected = np.mean(squared if labels == "intensity" else crossed)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-3)
    steps = jax.tree.leaves(jax.tree.map(lambda a, b: jnp.abs(a - b).max(), next_state.model.params, params))
    assert 0.45e-3 < max(map(float, steps)) < 0.55e-3  # half of the rate, half way


@pytest.mark.slow
def test_it_learns_where_pieces_are(frozen):
    """Its output is larger inside pieces than elsewhere on the images that it trained on."""
    method = nsa(**SMALL | dict(learning_rate=1e-2, labels="binary", least_side=0.3, most_side=0.5))
    first = jnp.asarray(IMAGES[:1] // 8 + 100)
    images = jnp.concatenate([first, 255 - first, first, 255 - first])
    state, update = initial(method, frozen), jax.jit(method.stages[0].update)
    for i in range(60):
        state, _ = update(jax.random.key(i), state, frozen, batch_of(images))
    options = dict(pieces=1, labels="binary", sizes=Sizes(0.3, 0.5))
    pairs = (natural_anomaly(jax.random.key(i), images[0] / 255, images[1] / 255, **options) for i in range(99))
    image, label = next((image, label) for image, label in pairs if float(label.mean()) > 0.05)
    fitted = method.stages[0].finalize(KEY, state, frozen)
    pixel = np.asarray(jax.jit(method.score)(fitted, frozen, jnp.round(image[None] * 255).astype(jnp.uint8)).pixel[0])
    inside = np.asarray(label) > 0
    assert pixel[inside].mean() > 1.5 * pixel[~inside].mean()


def test_images_are_moved_by_whole_pixels_past_their_edge():
    image = jnp.asarray(IMAGES[0], jnp.float32)
    padded = np.pad(np.asarray(image), ((2, 2), (2, 2), (0, 0)), "edge")
    windows = [padded[i : i + 32, j : j + 32] for i, j in np.ndindex(5, 5)]
    shifted = [np.asarray(random_pose(jax.random.key(i), image, 2, 0.0, False)) for i in range(8)]
    assert all(any(np.array_equal(x, window) for window in windows) for x in shifted)
    assert len({x.tobytes() for x in shifted}) > 3
    mirrored = {np.asarray(random_pose(jax.random.key(i), image, 0, 0.0, True)).tobytes() for i in range(8)}
    assert mirrored == {np.asarray(image).tobytes(), np.asarray(image)[::-1].tobytes()}
    uniform = jnp.full((32, 32, 3), 0.7)
    for degrees in (10.0, 180.0):
        np.testing.assert_allclose(random_pose(KEY, uniform, 9, degrees, False), uniform, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (dict(image_size=(60, 64)), r"multiples of 32, got \(60, 64\)"),
        (dict(least_side=0.4, most_side=0.3), "0 < least_side < most_side <= 0.5 must hold, got 0.4 and 0.3"),
        (dict(least_object=1.0), r"least_object must be in \[0, 1\), got 1.0"),
        (dict(resize=(1.3, 0.7)), r"resize must be two factors above 0, the smaller first, got \(1.3, 0.7\)"),
        (dict(labels="soft"), "labels must be one of binary, intensity, logistic, got 'soft'"),
        (dict(backbone="pdn_small"), "the backbone must be a ResNet, got pdn_small"),
    ],
)
def test_bad_hyperparameters_are_refused(options, rule):
    with pytest.raises(ValueError, match=rule):
        inspect.unwrap(nsa)(**SMALL | options)
