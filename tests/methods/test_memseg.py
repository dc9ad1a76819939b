"""MemSeg: what the memory keeps and finds, the official network's shapes, what its loss is of, and how images score."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.backbones import backbone
from jaxad.base import Batch
from jaxad.data import Preprocess, open_data
from jaxad.driver.fit import fit
from jaxad.methods.memseg import LAYERS, Memory, MemsegNetwork, Segmenter, memseg, nearest
from jaxad.nn.attention import CoordinateAttention
from tests.cases import TINY
from tests.methods import plain

module = importlib.import_module("jaxad.methods.memseg")
KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
SMALL = dict(backbone=TINY[0], image_size=(32, 32), memory_size=3, epochs=1, train_batch_size=3, learning_rate=1e-3)


@pytest.fixture(scope="module")
def frozen():
    return backbone(TINY[0]).init(jax.random.key(1))


@pytest.fixture(scope="module")
def fitted(frozen):
    method = memseg(**SMALL)
    return method, fit(method, frozen, open_data(IMAGES, preprocess=Preprocess(None))["arrays"].train, KEY).state


@pytest.fixture(scope="module")
def embedded(fitted, frozen):
    return jax.jit(fitted[0].embed)(frozen, IMAGES)


def test_the_memory_holds_images_drawn_at_random(fitted, embedded, frozen):
    _, state = fitted
    assert isinstance(state, MemsegNetwork)
    kept = [
        next(i for i in range(6) if np.allclose(state.memory.maps[layer][place], embedded[layer][i], atol=1e-5))
        for layer in LAYERS
        for place in range(3)
    ]
    assert kept[:3] == kept[3:6] == kept[6:] and len(set(kept)) == 3
    data = open_data(IMAGES[:2], preprocess=Preprocess(None))["arrays"].train
    few = fit(memseg(**SMALL), frozen, data, KEY).state
    assert (np.asarray(few.memory.draw) < 0).tolist() == [False, False, True]


def test_the_nearest_image_is_that_of_least_mean_squared_differences():
    random = np.random.default_rng(1)
    shapes = {"layer1": (4, 4, 2), "layer2": (2, 2, 3), "layer3": (1, 1, 4)}
    maps, bank = ({k: random.normal(size=(n, *s)).astype(np.float32) for k, s in shapes.items()} for n in (5, 7))
    apart = sum(((maps[k][:, None] - bank[k][None]) ** 2).mean((2, 3, 4)) for k in LAYERS)
    for draw in (np.ones(7, np.float32), np.array([1, 1, 1, -1, -1, -1, -1], np.float32)):
        wanted = np.where(draw < 0, np.inf, apart).argmin(1)
        memory = Memory({k: jnp.asarray(v) for k, v in bank.items()}, jnp.asarray(draw))
        found = nearest(memory, {k: jnp.asarray(v) for k, v in maps.items()})
        for layer in LAYERS:
            np.testing.assert_array_equal(found[layer], bank[layer][wanted])


def test_the_network_has_the_official_ones_kernels():
    """As msff.py and decoder.py list them for a ResNet-18, with its stem and last stage: size, channels in and out."""
    maps = {"layer1": (16, 16, 64), "layer2": (8, 8, 128), "layer3": (4, 4, 256)}
    one = {layer: jnp.zeros((1, *shape)) for layer, shape in maps.items()}
    made = jax.eval_shape(Segmenter().init, KEY, jnp.zeros((1, 64, 64, 3)), one, one, jnp.ones(1, bool))
    kernels = sorted((k.shape[0], *k.shape[2:]) for k in jax.tree.leaves(made["params"]) if len(k.shape) == 4)
    wanted = [(7, 3, 64), (3, 256, 512), (3, 512, 512), (1, 256, 512), (3, 512, 512), (3, 512, 512)]
    for c in (64, 128, 256):
        wanted += [(3, 2 * c, 2 * c), (3, 2 * c, c), (3, c, c), (1, 2 * c, max(8, c // 16))]
    wanted += [(3, 256, 128), (3, 128, 64), (3, 64, 48), (3, 48, 2)]
    wanted += [(3, a, b) for a, b in ((512, 256), (512, 128), (256, 64), (128, 48), (96, 48))]
    assert kernels == sorted(wanted)


def attention(x, params, running):
    lines = np.concatenate([x.mean(2), x.mean(1)], 1)[:, :, None]
    mixed = plain.conv_norm(lines, params["ConvNorm_0"], running["ConvNorm_0"])[:, :, 0]
    mixed = mixed * np.clip(mixed + 3, 0, 6) / 6
    dense = {k: mixed @ np.asarray(params[k]["kernel"], np.float64) + params[k]["bias"] for k in ("rows", "columns")}
    rows, columns = (plain.sigmoid(dense[k]) for k in ("rows", "columns"))
    return x * rows[:, : x.shape[1], None] * columns[:, None, x.shape[1] :]


def test_attention_weighs_by_row_and_column():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 4, 6, 8)), jnp.float32)
    attend = CoordinateAttention()
    variables = plain.randomized(attend.init(KEY, x, jnp.ones(2, bool)), 3)
    wanted = attention(np.asarray(x, np.float64), variables["params"], variables["batch_stats"])
    np.testing.assert_allclose(attend.apply(variables, x, None), wanted, atol=1e-5)


def test_the_network_is_the_official_one():
    """Layer by layer as msff.py and decoder.py, in numpy."""
    random = np.random.default_rng(4)
    shapes = {"layer1": (8, 16, 2), "layer2": (4, 8, 4), "layer3": (2, 4, 6)}
    f, d = ({k: jnp.asarray(random.normal(size=(2, *s)), jnp.float32) for k, s in shapes.items()} for _ in range(2))
    d, image = {k: v**2 for k, v in d.items()}, jnp.asarray(random.normal(size=(2, 32, 64, 3)), jnp.float32)
    variables = plain.randomized(Segmenter().init(KEY, image, f, d, jnp.ones(2, bool)), 5)
    p, r = variables["params"], variables["batch_stats"]
    f64 = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)  # noqa: E731
    maps, differences = f64(f), f64(d)

    def block(x, name, stride):
        own = plain.relu(plain.conv_norm(x, p[name]["ConvNorm_0"], r[name]["ConvNorm_0"], stride))
        own = plain.conv_norm(own, p[name]["ConvNorm_1"], r[name]["ConvNorm_1"])
        if stride == 2:
            x = plain.conv_norm(x, p[name]["ConvNorm_2"], r[name]["ConvNorm_2"], 2)
        return plain.relu(own + x)

    def fused(layer):
        own, statistics = p[layer], r[layer]["CoordinateAttention_0"]
        x = np.concatenate([maps[layer], differences[layer]], -1)
        x = plain.conv(x, own["Conv_0"]) * attention(x, own["CoordinateAttention_0"], statistics)
        return plain.conv(plain.conv(x, own["Conv_2"]), own["Conv_1"])

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
    for number, link in enumerate((f3 * m3, f2 * m2, f1 * m1)):
        x = np.concatenate([up(x, number), link], -1)
    stem = plain.relu(plain.conv_norm(np.asarray(image, np.float64), p["ConvNorm_3"], r["ConvNorm_3"], 2))
    x = np.concatenate([up(x, 4), plain.conv(stem, p["Conv_2"])], -1)
    wanted = plain.conv(up(x, 5), p["Conv_3"])
    found = Segmenter().apply(variables, image, f, d, None)
    assert found.shape == (2, 32, 64, 2)
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_an_image_scores_the_mean_of_100_in_65536_pixels(fitted, embedded, frozen):
    method, state = fitted
    scores = jax.jit(method.score)(state, frozen, embedded)
    pixel = np.asarray(scores.pixel, np.float64).reshape(6, -1)
    largest = np.sort(pixel)[:, -round(100 / 256**2 * pixel.shape[1]) :]
    np.testing.assert_allclose(scores.image, largest.mean(1), rtol=1e-5)


def test_scaled_features_are_larger_ones(fitted, embedded, frozen):
    _, state = fitted
    larger = embedded | {layer: 0.5 * embedded[layer] for layer in LAYERS}
    once, scaled = (jax.jit(memseg(**SMALL, feature_scale=scale).score) for scale in (1.0, 0.5))
    found, wanted = scaled(state, frozen, embedded), once(state, frozen, larger)
    np.testing.assert_allclose(found.pixel, wanted.pixel, atol=1e-5)
    assert float(jnp.abs(found.pixel - once(state, frozen, embedded).pixel).max()) > 1e-4


def test_the_loss_weighs_absolute_and_focal_errors(monkeypatch, frozen):
    """With anomalies that are known, against the network's own output."""
    mask = np.zeros((64, 64), bool)
    mask[4:12, 6:20] = True
    given = {}

    def textured(key, image, shown, **options):
        given.update(options)
        return 1 - image, jnp.asarray(mask)

    monkeypatch.setattr(module, "textured", textured)
    monkeypatch.setattr(module, "foreground", lambda image: "the object")
    monkeypatch.setattr(module, "shuffled", lambda key, image, grid: jnp.full_like(image, grid[1]))
    monkeypatch.setattr(jax.random, "bernoulli", lambda key, shape: jnp.ones(shape, bool))
    method, valid = memseg(**SMALL | dict(image_size=(64, 64))), np.array([True, False, True])
    images = np.random.default_rng(3).integers(0, 256, (3, 64, 64, 3), np.uint8)
    x = method.embed(frozen, jnp.asarray(images))
    spec = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), x)
    index = jnp.arange(3, dtype=jnp.int32)

    def batch(progress):
        return Batch(x, jnp.asarray(valid), jnp.zeros(3, jnp.int32), None, index, jnp.float32(progress))

    remember, train = method.stages
    state = method.init(KEY, frozen, spec)
    state = train_state = remember.finalize(KEY, remember.update(KEY, state, frozen, batch(0))[0], frozen)
    after, metrics = jax.jit(train.update)(KEY, train_state, frozen, batch(0.05))

    assert (given["opacity"], given["foreground"]) == ((0.15, 1.0), "the object")
    made = 1 - jnp.asarray(images[valid], jnp.float32) / 255
    maps = {k: v for k, v in jax.jit(method.embed)(frozen, made).items() if k != "image"}
    differences = {k: (maps[k] - v) ** 2 for k, v in nearest(state.memory, maps).items()}
    variables = {"params": state.trained.params, "batch_stats": state.running}
    shown = (made - frozen["mean"]) / frozen["std"]
    logits, _ = Segmenter().apply(variables, shown, maps, differences, jnp.ones(2, bool), mutable=["batch_stats"])
    logits = np.asarray(logits, np.float64)
    chance = 1 / (1 + np.exp(logits[..., 0] - logits[..., 1]))
    met = np.where(mask, chance, 1 - chance)
    expected = 0.6 * np.mean(1 - met) + 0.4 * np.mean(-((1 - met) ** 4) * np.log(met))
    np.testing.assert_allclose(metrics["loss"], expected, rtol=5e-3)  # batch norm of few positions magnifies rounding
    steps = jax.tree.leaves(jax.tree.map(lambda a, b: jnp.abs(a - b).max(), after.trained.params, state.trained.params))
    warm = 1 / 30 + (1 - 1 / 30) / 2
    assert 0.9 * warm < max(map(float, steps)) / 1e-3 < 1.1 * warm


def test_bad_hyperparameters_are_refused(frozen):
    with pytest.raises(ValueError, match=r"multiples of 32, got \(60, 64\)"):
        memseg(backbone="resnet18", image_size=(60, 64))
    with pytest.raises(ValueError, match="the backbone must be a ResNet, got pdn_small"):
        memseg(backbone="pdn_small")
    with pytest.raises(ValueError, match="channel_pooling must divide 16 channels, got 3"):
        fit(
            memseg(**SMALL, channel_pooling=3),
            frozen,
            open_data(IMAGES, preprocess=Preprocess(None))["arrays"].train,
            KEY,
        )
