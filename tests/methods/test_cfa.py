"""CFA: its memory, loss and score against numpy in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.base import Batch
from jaxad.methods.cfa import CfaTraining, Memory, cfa
from jaxad.ops.heatmap import upsample_blur

KEY = jax.random.key(0)
X = {"layer1": np.random.default_rng(0).normal(size=(5, 6, 4, 7)).astype(np.float32)}


def patches(x: np.ndarray) -> np.ndarray:
    """Means of 3x3 patches, then row and column."""
    b, h, w, _ = x.shape
    padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    mean = sum(padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)) / 9
    rows, columns = np.meshgrid(np.linspace(-1, 1, h), np.linspace(-1, 1, w), indexing="ij")
    return np.concatenate([mean, np.broadcast_to(np.stack([rows, columns], -1), (b, h, w, 2))], -1)


def described(descriptor: Any, x: np.ndarray) -> np.ndarray:
    kernel, bias = (np.asarray(descriptor["params"][name], np.float64) for name in ("kernel", "bias"))
    return patches(x) @ kernel + bias


def batch_of(x: dict[str, np.ndarray], valid: np.ndarray) -> Batch:
    n = len(valid)
    zeros = jnp.zeros(n, jnp.int32)
    return Batch(jax.tree.map(jnp.asarray, x), jnp.asarray(valid), zeros, None, jnp.arange(n, dtype=jnp.int32), 0.0)


def made(**options: Any) -> Any:
    method = cfa(backbone="pdn_small", layers=("layer1",), image_size=(12, 8), **options)
    spec = {"layer1": jax.ShapeDtypeStruct(X["layer1"].shape, jnp.float32)}
    return method, method.init(KEY, None, spec)


@pytest.mark.parametrize("gamma_d", [1, 3])
def test_the_memory_is_the_mean_descriptor_of_every_position(gamma_d):
    method, state = made(gamma_d=gamma_d)
    valid = np.array([True, True, False, True, True])
    dirty = {"layer1": np.where(valid[:, None, None, None], X["layer1"], np.nan)}
    collected, _ = method.stages[0].update(KEY, state, None, batch_of(dirty, valid))
    trained = method.stages[0].finalize(KEY, collected, None)
    expected = described(state.descriptor, X["layer1"][valid]).mean(0).reshape(24, -1)
    assert expected.shape[1] == 7 // gamma_d
    np.testing.assert_allclose(trained.memory.centers, expected, atol=1e-5)


@pytest.mark.parametrize("radius", [1e-5, 1.3])
def test_loss_and_its_gradient(radius):
    """With a radius beyond the hard negatives, both terms are there."""
    method, state = made(weight_decay=0.0)
    centers = np.random.default_rng(1).normal(size=(9, 7)).astype(np.float32)
    training = method.stages[0].finalize(KEY, state._replace(images=jnp.ones(())), None)
    params = {"descriptor": state.descriptor, "radius": jnp.float32(radius)}
    training = CfaTraining(training.trained._replace(params=params), Memory(jnp.asarray(centers), None))
    valid = np.array([True, False, True, True, False])

    def loss(found: np.ndarray, r: float) -> float:
        squared = np.sort(((found[:, :, None] - centers) ** 2).sum(-1), -1)[..., :6]
        attraction = np.maximum(squared[..., :3] - r**2, 0).mean()
        repulsion = np.maximum(r**2 - squared[..., 3:] - 0.1, 0).mean()
        return (attraction + repulsion) / 1e-3

    found = described(state.descriptor, X["layer1"][valid]).reshape(3, 24, 7)
    after, metrics = jax.jit(method.stages[1].update)(KEY, training, None, batch_of(X, valid))
    np.testing.assert_allclose(metrics["loss"], loss(found, radius), rtol=1e-5)
    step = 1e-6
    slope = (loss(found, radius + step) - loss(found, radius - step)) / (2 * step)
    moment = jax.tree.leaves(after.trained.optimizer, is_leaf=lambda leaf: hasattr(leaf, "mu"))[0].mu["radius"]
    np.testing.assert_allclose(moment, 0.1 * slope, rtol=1e-3, atol=1e-4)  # Adam's first moment after one step


def test_score_weighs_the_nearest_distance_by_its_softmin():
    method, state = made()
    centers = np.random.default_rng(1).normal(size=(9, 7)).astype(np.float32)
    training = method.stages[0].finalize(KEY, state._replace(images=jnp.ones(())), None)
    fitted = method.stages[1].finalize(KEY, training._replace(memory=Memory(jnp.asarray(centers), None)), None)
    scores = jax.jit(method.score)(fitted, None, jax.tree.map(jnp.asarray, X))
    found = described(state.descriptor, X["layer1"])
    distance = np.sort(np.sqrt(((found[..., None, :] - centers) ** 2).sum(-1)), -1)[..., :3]
    weight = np.exp(-distance[..., 0]) / np.exp(-distance).sum(-1)
    expected = upsample_blur(jnp.asarray(weight * distance[..., 0], jnp.float32), (12, 8), 4.0)
    np.testing.assert_allclose(scores.pixel, expected, atol=1e-5)
    np.testing.assert_allclose(scores.image, np.asarray(scores.pixel).max((1, 2)))


def test_a_compressed_memory_holds_fewer_vectors():
    method, state = made(gamma_c=3)
    collected, _ = method.stages[0].update(KEY, state, None, batch_of(X, np.ones(5, bool)))
    assert method.stages[0].finalize(KEY, collected, None).memory.centers.shape == (8, 7)
    with pytest.raises(ValueError, match="gamma_c must leave at least 6"):
        made(gamma_c=5)
