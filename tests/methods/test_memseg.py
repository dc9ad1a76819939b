"""MemSeg: the memory and its nearest images, the network of the reference, the loss, the schedule and the scores."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.base import Batch
from jaxad.methods.memseg import LAYERS, Memory, MemsegNetwork, Segmenter, memseg, nearest, warmup_cosine
from jaxad.nn.attention import CoordinateAttention
from tests.methods import plain
from tests.tiny import TINY_RESNET

module = importlib.import_module("jaxad.methods.memseg")
KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
SMALL = dict(backbone=TINY_RESNET, image_size=(32, 32), memory_size=3, epochs=1, train_batch_size=3, learning_rate=1e-3)


@pytest.fixture(scope="module")
def frozen():
    return TINY_RESNET.init(jax.random.key(1))


def batch_of(x, progress=0.0):
    n = len(x["image"])
    index = jnp.arange(n, dtype=jnp.int32)
    return Batch(x, jnp.ones(n, bool), jnp.zeros(n, jnp.int32), None, index, jnp.float32(progress))


def remembered(method, frozen, x):
    """The state with which the training begins."""
    remember, train = method.stages

    @jax.jit
    def run(x):
        state, _ = remember.update(KEY, remember.init(KEY, None, frozen, x), frozen, batch_of(x))
        return remember.finalize(KEY, state, frozen)

    memory = run(x)
    training = plain.fresh(jax.eval_shape(lambda: train.init(KEY, memory, frozen, x)))
    return training._replace(model=training.model._replace(memory=memory))


@pytest.fixture(scope="module")
def embedded(frozen):
    return jax.jit(memseg(**SMALL).embed)(frozen, IMAGES)


@pytest.fixture(scope="module")
def fitted(frozen, embedded):
    """A method and its networks before their first step."""
    method = memseg(**SMALL)
    return method, method.stages[1].finalize(KEY, remembered(method, frozen, embedded), frozen)


def test_the_memory_holds_images_drawn_at_random(fitted, embedded, frozen):
    _, state = fitted
    assert isinstance(state, MemsegNetwork)
    kept = [
        next(i for i in range(6) if np.allclose(state.memory.maps[layer][place], embedded[layer][i], atol=1e-5))
        for layer in LAYERS
        for place in range(3)
    ]
    assert kept[:3] == kept[3:6] == kept[6:] and len(set(kept)) == 3
    few = remembered(memseg(**SMALL), frozen, jax.tree.map(lambda leaf: leaf[:2], embedded)).model
    assert (np.asarray(few.memory.draw) < 0).tolist() == [False, False, True]


def test_the_nearest_image_has_the_smallest_mean_squared_differences():
    random = np.random.default_rng(1)
    shapes = {"layer1": (4, 4, 2), "layer2": (2, 2, 3), "layer3": (1, 1, 4)}
    maps, bank = ({k: random.normal(size=(n, *s)).astype(np.float32) for k, s in shapes.items()} for n in (5, 7))
    distances = sum(((maps[k][:, None] - bank[k][None]) ** 2).mean((2, 3, 4)) for k in LAYERS)
    for draw in (np.ones(7, np.float32), np.array([1, 1, 1, -1, -1, -1, -1], np.float32)):
        expected = np.where(draw < 0, np.inf, distances).argmin(1)
        memory = Memory({k: jnp.asarray(v) for k, v in bank.items()}, jnp.asarray(draw))
        neighbors = jax.jit(nearest)(memory, {k: jnp.asarray(v) for k, v in maps.items()})
        for layer in LAYERS:
            np.testing.assert_array_equal(neighbors[layer], bank[layer][expected])


def test_the_network_has_the_kernels_of_the_reference():
    """Those of msff.py and decoder.py for a ResNet-18, with its stem and last stage: size, channels in and out."""
    maps = {"layer1": (16, 16, 64), "layer2": (8, 8, 128), "layer3": (4, 4, 256)}
    one = {layer: jnp.zeros((1, *shape)) for layer, shape in maps.items()}
    init = functools.partial(Segmenter().init, train=True)
    params = jax.eval_shape(init, KEY, jnp.zeros((1, 64, 64, 3)), one, one)["params"]
    kernels = sorted((k.shape[0], *k.shape[2:]) for k in jax.tree.leaves(params) if len(k.shape) == 4)
    expected = [(7, 3, 64), (3, 256, 512), (3, 512, 512), (1, 256, 512), (3, 512, 512), (3, 512, 512)]
    for c in (64, 128, 256):
        expected += [(3, 2 * c, 2 * c), (3, 2 * c, c), (3, c, c), (1, 2 * c, max(8, c // 16))]
    expected += [(3, 256, 128), (3, 128, 64), (3, 64, 48), (3, 48, 2)]
    expected += [(3, a, b) for a, b in ((512, 256), (512, 128), (256, 64), (128, 48), (96, 48))]
    assert kernels == sorted(expected)


def attention(x, params, stats):
    lines = np.concatenate([x.mean(2), x.mean(1)], 1)[:, :, None]
    hidden = plain.conv_norm(lines, params["ConvNorm_0"], stats["ConvNorm_0"])[:, :, 0]
    hidden = hidden * np.clip(hidden + 3, 0, 6) / 6
    dense = {k: hidden @ np.asarray(params[k]["kernel"], np.float64) + params[k]["bias"] for k in ("rows", "columns")}
    rows, columns = (plain.sigmoid(dense[k]) for k in ("rows", "columns"))
    return x * rows[:, : x.shape[1], None] * columns[:, None, x.shape[1] :]


def test_attention_weights_rows_and_columns():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 4, 6, 8)), jnp.float32)
    attend = CoordinateAttention()
    variables = plain.randomized(attend.init(KEY, x, train=True), 3)
    expected = attention(np.asarray(x, np.float64), variables["params"], variables["batch_stats"])
    np.testing.assert_allclose(attend.apply(variables, x, train=False), expected, atol=1e-5)


def test_the_network_is_that_of_the_reference():
    """Layer by layer, msff.py and decoder.py in numpy."""
    random = np.random.default_rng(4)
    shapes = {"layer1": (8, 16, 2), "layer2": (4, 8, 4), "layer3": (2, 4, 6)}
    f, d = ({k: jnp.asarray(random.normal(size=(2, *s)), jnp.float32) for k, s in shapes.items()} for _ in range(2))
    d, image = {k: v**2 for k, v in d.items()}, jnp.asarray(random.normal(size=(2, 32, 64, 3)), jnp.float32)
    init, apply = (jax.jit(f, static_argnames="train") for f in (Segmenter().init, Segmenter().apply))
    variables = plain.randomized(init(KEY, image, f, d, train=True), 5)
    p, r = variables["params"], variables["batch_stats"]
    maps, differences = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (f, d))

    def block(x, name, stride):
        y = plain.relu(plain.conv_norm(x, p[name]["ConvNorm_0"], r[name]["ConvNorm_0"], stride))
        y = plain.conv_norm(y, p[name]["ConvNorm_1"], r[name]["ConvNorm_1"])
        if stride == 2:
            x = plain.conv_norm(x, p[name]["ConvNorm_2"], r[name]["ConvNorm_2"], 2)
        return plain.relu(y + x)

    def fused(layer):
        params, stats = p[layer], r[layer]["CoordinateAttention_0"]
        x = np.concatenate([maps[layer], differences[layer]], -1)
        x = plain.conv(x, params["Conv_0"]) * attention(x, params["CoordinateAttention_0"], stats)
        return plain.conv(plain.conv(x, params["Conv_2"]), params["Conv_1"])

    def up(x, number):
        name = f"ConvNorm_{number}"
        return plain.relu(plain.conv_norm(plain.doubled(x), p[name], r[name]))

    f1, f2, f3 = map(fused, LAYERS)
    f2 = f2 + plain.conv(plain.doubled(f3), p["Conv_0"])
    f1 = f1 + plain.conv(plain.doubled(f2), p["Conv_1"])
    m1, m2, m3 = (differences[layer].mean(-1, keepdims=True) for layer in LAYERS)
    m2 = m2 * plain.doubled(m3)
    m1 = m1 * plain.doubled(m2)
    x = block(block(maps["layer3"], "Residual_0", 2), "Residual_1", 1)
    for number, skip in enumerate((f3 * m3, f2 * m2, f1 * m1)):
        x = np.concatenate([up(x, number), skip], -1)
    stem = plain.relu(plain.conv_norm(np.asarray(image, np.float64), p["ConvNorm_3"], r["ConvNorm_3"], 2))
    x = np.concatenate([up(x, 4), plain.conv(stem, p["Conv_2"])], -1)
    expected = plain.conv(up(x, 5), p["Conv_3"])
    logits = apply(variables, image, f, d, train=False)
    assert logits.shape == (2, 32, 64, 2)
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


def test_an_image_scores_the_mean_of_100_in_65536_pixels(fitted, embedded, frozen):
    method, state = fitted
    scores = jax.jit(method.score)(state, frozen, embedded)
    pixel = np.asarray(scores.pixel, np.float64).reshape(6, -1)
    largest = np.sort(pixel)[:, -round(100 / 256**2 * pixel.shape[1]) :]
    np.testing.assert_allclose(scores.image, largest.mean(1), rtol=1e-5)


def test_feature_scale_multiplies_the_features(fitted, embedded, frozen):
    _, state = fitted
    smaller = embedded | {layer: 0.5 * embedded[layer] for layer in LAYERS}
    unscaled, scaled = (jax.jit(memseg(**SMALL, feature_scale=scale).score) for scale in (1.0, 0.5))
    pixel, expected = scaled(state, frozen, embedded).pixel, unscaled(state, frozen, smaller).pixel
    np.testing.assert_allclose(pixel, expected, atol=1e-5)
    assert float(jnp.abs(pixel - unscaled(state, frozen, embedded).pixel).max()) > 1e-4


def test_loss_is_a_weighted_sum_of_absolute_and_focal_errors(monkeypatch, frozen):
    """With a given anomaly, against the network's output."""
    mask = np.zeros((64, 64), bool)
    mask[4:12, 6:20] = True
    received = {}

    def textured(key, image, texture, **options):
        received.update(options)
        return 1 - image, jnp.asarray(mask)

    monkeypatch.setattr(module, "add_texture", textured)
    monkeypatch.setattr(module, "foreground", lambda image: "the object")
    monkeypatch.setattr(module, "shuffled_tiles", lambda key, image, grid: jnp.full_like(image, grid[1]))
    monkeypatch.setattr(jax.random, "bernoulli", lambda key, shape: jnp.ones(shape, bool))
    method = memseg(**SMALL | dict(image_size=(64, 64)))
    images = np.random.default_rng(3).integers(0, 256, (3, 64, 64, 3), np.uint8)
    embed = jax.jit(method.embed)
    x = embed(frozen, images)
    training = remembered(method, frozen, x)
    updated, metrics = jax.jit(method.stages[1].update)(KEY, training, frozen, batch_of(x, 0.05))

    assert (received["opacity"], received["foreground"]) == ((0.15, 1.0), "the object")
    model, defective = training.model, 1 - jnp.asarray(images, jnp.float32) / 255
    maps = {k: v for k, v in embed(frozen, defective).items() if k != "image"}
    differences = {k: (maps[k] - v) ** 2 for k, v in jax.jit(nearest)(model.memory, maps).items()}
    variables = {"params": model.params, "batch_stats": model.stats}
    normalized = (255 * defective - frozen["mean"]) / frozen["std"]
    apply = jax.jit(functools.partial(Segmenter().apply, train=True, mutable=["batch_stats"]))
    logits, _ = apply(variables, normalized, maps, differences)
    logits = np.asarray(logits, np.float64)
    probability = 1 / (1 + np.exp(logits[..., 0] - logits[..., 1]))
    of_label = np.where(mask, probability, 1 - probability)
    expected = 0.6 * np.mean(1 - of_label) + 0.4 * np.mean(-((1 - of_label) ** 4) * np.log(of_label))
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-3)  # batch norm of few positions magnifies rounding
    steps = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), updated.model.params, model.params)
    rate = float(warmup_cosine(jnp.float32(0.05)))
    assert 0.9 * rate < max(jax.tree.leaves(steps)) / 1e-3 < 1.1 * rate


def test_schedule_warms_up_and_falls_as_a_cosine():
    rates = [float(warmup_cosine(jnp.float32(progress))) for progress in (0, 0.05, 0.1, 0.55, 1)]
    np.testing.assert_allclose(rates, [1 / 30, 31 / 60, 1, 31 / 60, 1 / 30], rtol=1e-5)


def test_bad_hyperparameters_are_rejected(frozen, embedded):
    with pytest.raises(ValueError, match=r"multiples of 32, got \(60, 64\)"):
        memseg(backbone="resnet18", image_size=(60, 64))
    with pytest.raises(ValueError, match="the backbone must be a ResNet, got pdn_small"):
        memseg(backbone="pdn_small")
    with pytest.raises(ValueError, match="channel_pooling must divide 16 channels, got 3"):
        remembered(memseg(**SMALL, channel_pooling=3), frozen, embedded)
