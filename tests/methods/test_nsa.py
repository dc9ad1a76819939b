"""NSA: the official network's shapes and transposed convolutions, what its loss is of, and how images score."""

import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.backbones import backbone, student
from jaxad.base import Batch
from jaxad.methods.nsa import LAYER, Decoder, NsaNetwork, nsa
from jaxad.nn.norm import Convolution
from jaxad.synthesis.nsa import Sizes, natural
from jaxad.synthesis.warp import moved
from tests.cases import TINY
from tests.methods import plain

module = importlib.import_module("jaxad.methods.nsa")
KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
SMALL = dict(
    backbone=TINY[0], image_size=(32, 32), pieces=1, shift=0, degrees=0.0, on_foreground=False, learning_rate=1e-3
)


def batch_of(valid, progress=0.0):
    n = len(IMAGES)
    index = jnp.arange(n, dtype=jnp.int32)
    return Batch(jnp.asarray(IMAGES), jnp.asarray(valid), jnp.zeros(n, jnp.int32), None, index, jnp.float32(progress))


@pytest.fixture(scope="module")
def frozen():
    return backbone(TINY[0]).init(jax.random.key(1))


@pytest.fixture(scope="module")
def method():
    return nsa(**SMALL)


@pytest.fixture(scope="module")
def state(method, frozen):
    return jax.jit(lambda key: method.init(key, frozen, None))(KEY)


def test_the_decoder_has_the_official_ones_kernels():
    """As resnet.py lists them: size, channels in and out."""
    made = jax.eval_shape(Decoder().init, KEY, jnp.zeros((1, 2, 2, 512)), jnp.ones(1, bool))
    kernels = sorted((k.shape[0], *k.shape[2:]) for k in jax.tree.leaves(made["params"]) if len(k.shape) == 4)
    wanted = [(1, 512, 256), (1, 256, 128), (7, 16, 1)]
    for given, out in ((128, 64), (64, 32), (32, 16)):
        wanted += [(3, given, out), (3, out, out), (1, given, out)]
    assert kernels == sorted(wanted)


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_an_odd_transposed_convolution_is_a_sum_of_its_kernel_at_every_second_pixel(kernel):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 2)), jnp.float32)
    convolve = Convolution(5, kernel, up=True)
    variables = convolve.init(KEY, x)
    wanted = plain.transposed(np.asarray(x), variables["params"])
    np.testing.assert_allclose(convolve.apply(variables, x), wanted, atol=1e-5)


def test_the_decoder_is_the_official_one():
    """Layer by layer as resnet.py's `forward`, in numpy."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 1, 2, 8)), jnp.float32)
    variables = plain.randomized(Decoder().init(KEY, x, jnp.ones(2, bool)), 2)
    params, running = variables["params"], variables["batch_stats"]
    y = np.asarray(x, np.float64)
    for i in (0, 1):
        y = plain.relu(plain.conv(y, params[f"Convolution_{i}"]))
    for i in range(3):
        p, r = params[f"Residual_{i}"], running[f"Residual_{i}"]
        own = plain.norm(plain.transposed(y, p["ConvNorm_0"]["conv"]), p["ConvNorm_0"], r["ConvNorm_0"])
        own = plain.conv_norm(plain.relu(own), p["ConvNorm_1"], r["ConvNorm_1"])
        link = plain.norm(plain.transposed(y, p["ConvNorm_2"]["conv"]), p["ConvNorm_2"], r["ConvNorm_2"])
        y = plain.relu(own + link)
    wanted = plain.transposed(plain.doubled(y), params["Convolution_2"])[..., 0]
    found = Decoder().apply(variables, x, None)
    assert found.shape == (2, 32, 64)
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_an_image_scores_the_mean_of_its_heat_map(method, state, frozen):
    fitted = method.stages[0].finalize(KEY, state, frozen)
    assert isinstance(fitted, NsaNetwork)
    scores = jax.jit(method.score)(fitted, frozen, jnp.asarray(IMAGES))
    np.testing.assert_allclose(scores.image, np.asarray(scores.pixel, np.float64).mean((1, 2)), rtol=1e-5)


@pytest.mark.parametrize("labels", ["logistic", "intensity"])
def test_the_loss_is_of_the_label(monkeypatch, frozen, labels):
    """Cross-entropy, or a squared difference in levels, of anomalies that are known; pieces are of a valid image."""
    label = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    images = np.random.default_rng(3).integers(0, 256, (4, 64, 64, 3), np.uint8)
    given = {}

    def natural(key, target, source, **options):
        given.update(options, target=target, source=source)
        return 0.8 * target + 0.2 * source, jnp.asarray(label)

    monkeypatch.setattr(module, "natural", natural)
    monkeypatch.setattr(module, "foreground", lambda image: ("object on", image))
    wanted = dict(pieces=2, resize=(0.8, 1.1), least_object=0.3, least_overlap=0.2, mixed=True, logistic=(0.5, 9.0))
    wanted |= dict(labels=labels)
    method = nsa(**SMALL | wanted | dict(image_size=(64, 64), on_foreground=True, least_side=0.04, most_side=0.3))
    valid = np.array([True, False, True, False])
    state = jax.jit(lambda key: method.init(key, frozen, None))(KEY)
    after, metrics = jax.jit(method.stages[0].update)(
        KEY, state, frozen, batch_of(valid, 0.5)._replace(x=jnp.asarray(images))
    )
    assert {name: given[name] for name in wanted} == wanted and given["sizes"][:2] == (0.04, 0.3)
    assert [on for _, on in given["foregrounds"]] == [given["target"], given["source"]]
    image = jnp.asarray(images[valid], jnp.float32) / 255
    made = 0.8 * image + 0.2 * image[::-1]
    params, running = state.trained.params, state.running
    of = {name: {"params": params[name], "batch_stats": running[name]} for name in params}
    maps, _ = student(TINY[0], (LAYER,)).apply(of["encoder"], frozen, made, jnp.ones(2, bool))
    logits, _ = Decoder().apply(of["decoder"], maps[LAYER], jnp.ones(2, bool), mutable=["batch_stats"])
    logits = np.asarray(logits, np.float64)
    squared, crossed = (np.maximum(logits, 0) - 255 * label) ** 2, np.logaddexp(0, logits) - label * logits
    expected = np.mean(squared if labels == "intensity" else crossed)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-3)
    steps = jax.tree.leaves(jax.tree.map(lambda a, b: jnp.abs(a - b).max(), after.trained.params, params))
    assert 0.45e-3 < max(map(float, steps)) < 0.55e-3  # half of the rate, half way


def test_it_learns_where_pieces_are(frozen):
    """Its answer is larger within pieces than elsewhere on the images that it learned from."""
    method = nsa(**SMALL | dict(learning_rate=1e-2, labels="binary", least_side=0.3, most_side=0.5))
    one = jnp.asarray(IMAGES[:1] // 8 + 100)
    images = jnp.concatenate([one, 255 - one, one, 255 - one])
    state = jax.jit(lambda key: method.init(key, frozen, None))(KEY)
    update = jax.jit(method.stages[0].update)
    batch = batch_of([True] * 4)._replace(x=images)
    for i in range(60):
        state, _ = update(jax.random.key(i), state, frozen, batch)
    options = dict(pieces=1, labels="binary", sizes=Sizes(0.3, 0.5))
    pairs = (natural(jax.random.key(i), images[0] / 255, images[1] / 255, **options) for i in range(99))
    made, label = next((made, label) for made, label in pairs if float(label.mean()) > 0.05)
    fitted = method.stages[0].finalize(KEY, state, frozen)
    pixel = np.asarray(jax.jit(method.score)(fitted, frozen, jnp.round(made[None] * 255).astype(jnp.uint8)).pixel[0])
    inside = np.asarray(label) > 0
    assert pixel[inside].mean() > 1.5 * pixel[~inside].mean()


def test_images_are_moved_by_whole_pixels_over_their_edge():
    image = jnp.asarray(IMAGES[0], jnp.float32)
    padded = np.pad(np.asarray(image), ((2, 2), (2, 2), (0, 0)), "edge")
    windows = [padded[i : i + 32, j : j + 32] for i, j in np.ndindex(5, 5)]
    found = [np.asarray(moved(jax.random.key(i), image, 2, 0.0, False)) for i in range(8)]
    assert all(any(np.array_equal(made, window) for window in windows) for made in found)
    assert len({made.tobytes() for made in found}) > 3
    kept = [np.asarray(moved(jax.random.key(i), image, 0, 0.0, True)) for i in range(8)]
    assert {made.tobytes() for made in kept} == {np.asarray(image).tobytes(), np.asarray(image)[::-1].tobytes()}
    even = jnp.full((32, 32, 3), 0.7)
    for degrees in (10.0, 180.0):
        np.testing.assert_allclose(moved(KEY, even, 9, degrees, False), even, rtol=1e-5)


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
