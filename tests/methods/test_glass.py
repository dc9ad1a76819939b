"""GLASS: a short training, and the shapes of its anomalies."""

import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.backbones import backbone
from jaxad.base import Batch
from jaxad.methods.glass import GlassNormal, glass, random_shape
from jaxad.ops.heatmap import patch_features
from tests.methods.plain import fresh, randomized
from tests.parity.steps import gradient
from tests.rows import assert_close

KEY = jax.random.key(0)
LAYERS = ("layer1", "layer2")
IMAGES = np.random.default_rng(0).integers(90, 160, (4, 32, 32, 3), np.uint8)
OPTIONS = dict(backbone="pdn_small", layers=LAYERS, image_size=(32, 32), hidden=8, ascent_steps=5, sigma=1.0)


@pytest.fixture(scope="module")
def frozen():
    return backbone("pdn_small").init(jax.random.key(1))


def batch_of(x):
    index = jnp.arange(4, dtype=jnp.int32)
    return Batch(x, jnp.ones(4, bool), jnp.zeros(4, jnp.int32), None, index, jnp.float32(0))


def train(method, frozen, steps):
    """The loss of every step."""
    x = jax.jit(method.embed)(frozen, IMAGES)
    batch, (measure, train) = batch_of(x), method.stages
    state, _ = jax.jit(measure.update)(KEY, measure.init(KEY, None, frozen, x), frozen, batch)
    mean = measure.finalize(KEY, state, frozen)
    state, losses, update = jax.jit(train.init)(KEY, mean, frozen, None), [], jax.jit(train.update)
    for i in range(steps):
        state, metrics = update(jax.random.key(i), state, frozen, batch)
        losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(hypothesis="manifold", on_foreground=True), dict(hypothesis="hypersphere")])
def test_training_lowers_the_loss(frozen, options):
    method = glass(**OPTIONS, **options, learning_rate=5e-3, noise=0.3)
    losses = train(method, frozen, 25)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])


@pytest.mark.slow
@pytest.mark.parametrize("hypothesis", ["manifold", "hypersphere"])
def test_a_step_on_all_patches_is_the_published_one_whatever_their_order(frozen, hypothesis, monkeypatch):
    """With given textures, and without noise."""
    module = importlib.import_module("jaxad.methods.glass")
    mask = jnp.zeros((32, 32), bool).at[4:14, 6:22].set(True)
    monkeypatch.setattr(module, "random_shape", lambda key, allowed: mask)
    monkeypatch.setattr(module, "source", lambda key, size, *_: jnp.zeros((*size, 3)))
    monkeypatch.setattr(jax.random, "normal", lambda key, shape=(): jnp.zeros(shape))
    options, results = dict(hypothesis=hypothesis, learning_rate=1e-2), []
    x = jax.jit(glass(**OPTIONS, **options).embed)(frozen, IMAGES)
    patches = 4 * x["layer1"].shape[1] * x["layer1"].shape[2]
    for rows in (None, patches):
        measure, train = glass(**OPTIONS, **options, rows_per_step=rows).stages
        state, _ = jax.jit(measure.update)(KEY, measure.init(KEY, None, frozen, x), frozen, batch_of(x))
        normal = measure.finalize(KEY, state, frozen)
        start = fresh(jax.eval_shape(lambda normal, stage=train: stage.init(KEY, normal, frozen, None), normal))
        params = randomized(start.model.params, 2)
        start = start._replace(model=start.model._replace(params=params, normal=normal))
        after, metrics = jax.jit(train.update)(KEY, start, frozen, batch_of(x))
        results.append((metrics["loss"], gradient(after), after.model.stats))
    assert_close(*results, 1e-4)


def test_shell_is_measured_by_nearest_neighbors_in_other_images(frozen):
    """In batches of three of five images, whose last one is padded with an image."""
    method = glass(**OPTIONS, shell=2.0)
    measure = method.stages[0]
    images = np.random.default_rng(1).integers(90, 160, (5, 32, 32, 3), np.uint8)
    x = jax.jit(method.embed)(frozen, images)
    spec = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((6, *leaf.shape[1:]), leaf.dtype), x)  # room for a sixth one
    state, update = measure.init(KEY, None, frozen, spec), jax.jit(measure.update)
    assert measure.epochs == 2
    for step, index in enumerate(2 * [[0, 1, 2], [3, 4, 3]]):
        batch = batch_of(jax.tree.map(lambda leaf, index=index: leaf[np.array(index)], x))
        valid = np.array([True, True, step % 2 == 0])
        index = jnp.asarray(index, jnp.int32)
        batch = batch._replace(valid=valid, index=index, progress=jnp.float32(step / 4))
        state, _ = update(KEY, state, frozen, batch)
    normal = measure.finalize(KEY, state, frozen)
    patches = np.asarray(jax.jit(lambda x: patch_features(x, LAYERS))(x)).reshape(5, -1, normal.mean.shape[-1])
    nearest = [
        np.linalg.norm(np.delete(patches, i, 0) - of_image[i % len(of_image)], axis=-1).min()
        for i, of_image in enumerate(patches)
    ]
    np.testing.assert_allclose(normal.spacing, np.median(nearest), rtol=1e-4)
    np.testing.assert_allclose(normal.mean.reshape(patches.shape[1:]), patches.mean(0), rtol=1e-4)


@pytest.mark.slow
def test_global_anomalies_are_in_the_shell_whatever_the_adaptor_does(frozen, monkeypatch):
    """Here it doubles all distances."""
    distances = []

    def ascend(loss, x, carried, steps, length, every, project):
        jax.debug.callback(lambda a, b: distances.append(np.linalg.norm(a - b, axis=-1)), project(x), x)
        return project(x), carried

    monkeypatch.setattr(importlib.import_module("jaxad.methods.glass"), "ascend", ascend)
    train = glass(**OPTIONS, shell=3.0, noise=1e-6).stages[1]
    x = jax.jit(glass(**OPTIONS).embed)(frozen, IMAGES)
    _, h, w, c = jax.eval_shape(lambda x: patch_features(x, LAYERS), x).shape
    normal = GlassNormal(jnp.zeros((h, w, c)), jnp.float32(0.25))
    start = fresh(jax.eval_shape(lambda normal: train.init(KEY, normal, frozen, None), normal))
    params = start.model.params | {"adaptor": 2 * np.eye(c, dtype=np.float32)}
    start = start._replace(model=start.model._replace(params=params, normal=normal))
    jax.block_until_ready(jax.jit(train.update)(KEY, start, frozen, batch_of(x)))
    np.testing.assert_allclose(distances, 2 * 3 * 0.25, rtol=1e-3)


def test_shapes_lie_where_they_are_allowed():
    left = jnp.zeros((64, 48), bool).at[:, :24].set(True)
    for allowed in (jnp.ones((64, 48), bool), left):
        masks = jax.jit(jax.vmap(lambda key, allowed=allowed: random_shape(key, allowed)))(jax.random.split(KEY, 40))
        share = np.asarray(masks).mean((1, 2))
        assert masks.shape == (40, 64, 48) and share.min() > 0 and share.mean() < 0.4
        assert not (masks & ~allowed).any()


def test_hyperparameters_out_of_range_are_rejected():
    with pytest.raises(ValueError, match="must be manifold or hypersphere, got sphere"):
        inspect.unwrap(glass)(backbone="pdn_small", hypothesis="sphere")
    with pytest.raises(ValueError, match="shell is of the manifold hypothesis only"):
        glass(backbone="pdn_small", hypothesis="hypersphere", shell=2.0)
    with pytest.raises(ValueError, match="rows_per_step must be 1 or more, got 0"):
        glass(backbone="pdn_small", rows_per_step=0)
