"""Gradient stages against plain loops over optax."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxad.base import Batch
from jaxad.training import Descent, cosine, gradient_stage, shuffled_parts

KEY = jax.random.key(0)
DATA = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)
"""Three batches of four vectors."""


class Line(NamedTuple):
    params: Any
    center: jax.Array
    fixed: jax.Array


def batch_of(x: np.ndarray, progress: float = 0.0) -> Batch:
    n = len(x)
    integers = jnp.zeros(n, jnp.int32)
    return Batch(jnp.asarray(x), jnp.ones(n, bool), integers, None, integers, jnp.float32(progress))


def begin(key, state, frozen, spec):
    return Line({"w": jax.random.normal(key, (2,))}, jnp.zeros(2), spec)


def loss(params, model, key, frozen, batch):
    """A noisy squared error, and a center that follows the batches without a gradient."""
    noise = 0.1 * jax.random.normal(key, (2,))
    value = jnp.mean((batch.x @ (params["w"] + noise) - model.fixed) ** 2)
    return value, {"center": 0.9 * model.center + 0.1 * batch.x.mean(0)}


def train(stage, frozen=None, spec=jnp.float32(2.0)):
    """The states after every update, and the metrics."""
    state, states, metrics = stage.init(KEY, None, frozen, spec), [], []
    for i, x in enumerate(DATA):
        state, values = jax.jit(stage.update)(jax.random.fold_in(KEY, i), state, frozen, batch_of(x, i / 3))
        states.append(state)
        metrics.append(values)
    return states, metrics


def test_a_stage_takes_the_steps_of_a_plain_loop():
    optimizer = optax.adam(0.1)
    stage = gradient_stage("train", begin, loss, optimizer, epochs=2, batch_size=4, schedule=cosine)
    assert (stage.name, stage.epochs, stage.batch_size, stage.shuffle) == ("train", 2, 4, True)
    states, metrics = train(stage)
    w, center = jax.random.normal(KEY, (2,)), jnp.zeros(2)
    state = optimizer.init({"w": w})
    for i, x in enumerate(DATA):
        noise = 0.1 * jax.random.normal(jax.random.fold_in(KEY, i), (2,))
        value, gradient = jax.value_and_grad(lambda w, x=x, noise=noise: jnp.mean((x @ (w + noise) - 2) ** 2))(w)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update({"w": gradient}, state)
        w = w + 0.5 * (1 + np.cos(np.pi * i / 3)) * updates["w"]
        center = 0.9 * center + 0.1 * x.mean(0)
        np.testing.assert_allclose(states[i].model.params["w"], w, rtol=1e-5)
        np.testing.assert_allclose(states[i].model.center, center, rtol=1e-5)
        np.testing.assert_allclose(metrics[i]["loss"], value, rtol=1e-5)
    assert stage.finalize(KEY, states[-1], None) is states[-1].model


def test_what_a_stage_leaves_and_reports():
    def bits(*arguments):
        value, changes = loss(*arguments)
        return value, changes | {"metrics": {"loss": value / 2, "size": jnp.float32(4)}}

    finish = lambda key, model, frozen: model.params["w"]  # noqa: E731
    stage = gradient_stage("train", begin, bits, optax.sgd(0.1), epochs=1, batch_size=4, finish=finish)
    plain = gradient_stage("train", begin, loss, optax.sgd(0.1), epochs=1, batch_size=4)
    (states, metrics), (_, expected) = train(stage), train(plain)
    assert stage.finalize(KEY, states[-1], None).shape == (2,)
    np.testing.assert_allclose(metrics[0]["loss"], expected[0]["loss"] / 2, rtol=1e-6)
    assert metrics[0]["size"] == 4


def test_moving_averages_are_made_after_the_step():
    def average(key, model, frozen, batch):
        return model._replace(center=0.5 * model.center + 0.5 * model.params["w"])

    quiet = lambda *arguments: (loss(*arguments)[0], {})  # noqa: E731
    stage = gradient_stage("train", begin, quiet, optax.sgd(0.1), epochs=1, batch_size=4, after_step=average)
    states, _ = train(stage)
    expected = np.zeros(2)
    for state in states:
        expected = 0.5 * expected + 0.5 * np.asarray(state.model.params["w"])
        np.testing.assert_allclose(state.model.center, expected, rtol=1e-6)


class Game(NamedTuple):
    params: dict


def test_two_losses_take_turns_with_an_optimizer_and_a_key_each():
    """As in a GAN: the second player sees the first one's move, and only its own parameters change."""

    def start(key, state, frozen, spec):
        return Game({"critic": jnp.ones(2), "generator": jnp.full(2, 0.5)})

    def critic(params, model, key, frozen, batch):
        fake = model.params["generator"] + jax.random.normal(key, (2,))
        return jnp.mean((batch.x - fake) @ params), {}

    def generator(params, model, key, frozen, batch):
        return -jnp.sum(model.params["critic"] * (params + jax.random.normal(key, (2,)))), {}

    descents = (Descent(critic, optax.sgd(0.1), "critic"), Descent(generator, optax.adam(0.01), "generator"))
    states, metrics = train(gradient_stage("play", start, descents, epochs=1, batch_size=4))
    c, g, adam = jnp.ones(2), jnp.full(2, 0.5), optax.adam(0.01)
    state = adam.init(g)
    for i, x in enumerate(DATA):
        keys = [jax.random.fold_in(jax.random.fold_in(KEY, i), turn) for turn in range(2)]
        first = np.mean((x - g - jax.random.normal(keys[0], (2,))) @ c)
        c = c - 0.1 * (x - g - jax.random.normal(keys[0], (2,))).mean(0)
        second = -np.sum(c * (g + jax.random.normal(keys[1], (2,))))
        with jax.numpy_dtype_promotion("standard"):
            updates, state = adam.update(-c, state)
        g = g + updates
        np.testing.assert_allclose(states[i].model.params["critic"], c, rtol=1e-5)
        np.testing.assert_allclose(states[i].model.params["generator"], g, rtol=1e-5)
        np.testing.assert_allclose(metrics[i]["critic_loss"], first, rtol=1e-5)
        np.testing.assert_allclose(metrics[i]["loss"], (first + second) / 2, rtol=1e-5)


def test_inner_steps_over_parts_of_a_batch():
    """A step for each half of a batch in a random order; the loss is their mean."""

    def halves(key, model, frozen, batch):
        return batch.x[jax.random.permutation(key, 4)].reshape(2, 2, 2)

    def of_half(params, model, key, frozen, half):
        return jnp.mean((half @ params["w"] - model.fixed) ** 2), {"center": model.center + 1}

    stage = gradient_stage("train", begin, [Descent(of_half, optax.sgd(0.1), parts=halves)], epochs=1, batch_size=4)
    states, metrics = train(stage)
    w = np.asarray(jax.random.normal(KEY, (2,)))
    for i, x in enumerate(DATA):
        order, values = jax.random.permutation(jax.random.fold_in(jax.random.fold_in(KEY, i), 0), 4), []
        for half in x[order].reshape(2, 2, 2):
            values.append(np.mean((half @ w - 2) ** 2))
            w = w - 0.1 * (2 * (half @ w - 2)[:, None] * half).mean(0)
        np.testing.assert_allclose(states[i].model.params["w"], w, rtol=1e-5)
        np.testing.assert_allclose(metrics[i]["loss"], np.mean(values), rtol=1e-5)
    np.testing.assert_array_equal(states[-1].model.center, [6, 6])


def test_one_loss_needs_an_optimizer_and_several_bring_theirs():
    with pytest.raises(ValueError, match="one loss needs an optimizer"):
        gradient_stage("train", begin, loss, epochs=1, batch_size=4)
    with pytest.raises(ValueError, match="several bring their own"):
        gradient_stage("train", begin, [Descent(loss, optax.sgd(0.1))], optax.sgd(0.1), epochs=1, batch_size=4)


def test_shuffled_parts_hold_every_row_once():
    rows = {"a": jnp.arange(14), "b": 10 * jnp.arange(14.0)[:, None]}
    shuffled = jax.jit(shuffled_parts, static_argnums=2)
    parts = shuffled(KEY, rows, 4)
    assert parts["a"].shape == (3, 4) and len(set(parts["a"].ravel().tolist())) == 12
    assert not np.array_equal(parts["a"].ravel(), np.sort(parts["a"].ravel()))
    np.testing.assert_array_equal(parts["b"][..., 0], 10 * parts["a"])
    [one] = shuffled(KEY, jnp.arange(3), 4)
    assert sorted(one.tolist()) == [0, 1, 2]
