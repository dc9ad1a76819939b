"""SimpleNet: what its discriminator learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxad.base import Batch
from jaxad.methods.simplenet import simplenet
from jaxad.ops.heatmap import patch_features
from jaxad.training import shuffled_parts
from jaxad.training.optimizers import of_parts
from tests.methods.plain import fresh, randomized
from tests.rows import assert_close

KEY = jax.random.key(0)
SHAPES = {"layer1": (8, 8, 3), "layer2": (4, 4, 5)}
OPTIONS = dict(backbone="pdn_small", layers=tuple(SHAPES), image_size=(16, 16), hidden=6, noise=0.5, sigma=1.0)
X = {
    layer: jnp.asarray(np.random.default_rng(i).normal(size=(3, *shape)), jnp.float32)
    for i, (layer, shape) in enumerate(SHAPES.items())
}
BATCH = Batch(X, jnp.ones(3, bool), jnp.zeros(3, jnp.int32), None, jnp.arange(3, dtype=jnp.int32), jnp.float32(0))


@pytest.fixture(scope="module")
def method():
    return simplenet(**OPTIONS, learning_rate=1e-2, adaptor_learning_rate=1e-2)


@pytest.fixture(scope="module")
def state(method):
    return jax.jit(lambda key: method.stages[0].init(key, None, None, X))(KEY)


def test_it_learns_to_tell_normal_features_from_noisy_ones(method, state):
    update = jax.jit(method.stages[0].update)
    for i in range(150):
        state, metrics = update(jax.random.key(i), state, None, BATCH)
    fitted = method.stages[0].finalize(KEY, state, None)
    score = jax.jit(method.score)
    scores = score(fitted, None, X)
    rng = np.random.default_rng(5)
    noisy = {layer: x + rng.normal(size=x.shape).astype(np.float32) * 2 for layer, x in X.items()}
    assert metrics["loss"] < 0.9 and score(fitted, None, noisy).image.min() > scores.image.max()


def test_steps_of_patches_are_those_of_a_plain_loop_over_patches_of_all_images(monkeypatch):
    """With noise that is given: the loss of every step, and the parameters after the last one."""
    rows, noise = 16, np.random.default_rng(1).normal(size=(16, 1, 1, 8)).astype(np.float32)
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.asarray(noise))
    [stage] = simplenet(**OPTIONS, rows_per_step=rows).stages
    assert stage.batch_size == rows
    start = fresh(jax.eval_shape(lambda key: stage.init(key, None, None, X), KEY))
    start = start._replace(model=start.model._replace(params=randomized(start.model.params, 2)))
    after, metrics = jax.jit(stage.update)(KEY, start, None, BATCH)

    patches = jax.jit(lambda x: patch_features(x, tuple(SHAPES)))(X).reshape(3, 64, 8)
    shuffled = jax.jit(shuffled_parts, static_argnums=2)
    parts = np.asarray(shuffled(jax.random.fold_in(KEY, 0), patches.reshape(-1, 1, 1, 8), rows))
    assert parts.shape == (12, rows, 1, 1, 8)
    image = {tuple(patch): i for i, of_image in enumerate(np.asarray(patches)) for patch in of_image}
    images = [{image[tuple(patch)] for patch in part.reshape(rows, 8)} for part in parts]
    assert images == [{0, 1, 2}] * len(parts)

    def loss(params, x):
        x = x.reshape(rows, 8) @ params["adaptor"]
        y = jnp.concatenate([x, x + 0.5 * noise.reshape(rows, 8)]) @ params["discriminator"]["hidden"]["kernel"]
        norm = params["discriminator"]["norm"]
        y = (y - y.mean(0)) / jnp.sqrt(y.var(0) + 1e-5) * norm["scale"] + norm["bias"]
        y = jnp.where(y > 0, y, 0.2 * y) @ params["discriminator"]["head"]["kernel"]
        return jnp.maximum(0.5 - y[:rows], 0).mean() + jnp.maximum(0.5 + y[rows:], 0).mean()

    params, losses = start.model.params, []
    adaptor, discriminator = optax.adamw(1e-4, weight_decay=0.01), optax.adam(2e-4)
    optimizer = of_parts(adaptor=adaptor, discriminator=optax.chain(optax.add_decayed_weights(1e-5), discriminator))

    @jax.jit
    def step(params, state, part):
        value, gradient = jax.value_and_grad(loss)(params, part)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state, params)
        return value, optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    for part in parts:
        value, params, state = step(params, state, part)
        losses.append(value)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
    assert_close(after.model.params, params, 1e-4)
