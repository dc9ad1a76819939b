"""CFA: its memory, loss and score against numpy in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.base import Batch
from jaxad.methods.cfa import CfaModel, Memory, cfa
from jaxad.ops.heatmap import upsample_blur
from jaxad.ops.knn import sketch

KEY = jax.random.key(0)
X = {"layer1": np.random.default_rng(0).normal(size=(5, 6, 4, 7)).astype(np.float32)}
SPEC = {"layer1": jax.ShapeDtypeStruct(X["layer1"].shape, jnp.float32)}


def patches(x: np.ndarray) -> np.ndarray:
    """Means of 3x3 patches, then row and column."""
    b, h, w, _ = x.shape
    padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    mean = sum(padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)) / 9
    rows, columns = np.meshgrid(np.linspace(-1, 1, h), np.linspace(-1, 1, w), indexing="ij")
    return np.concatenate([mean, np.broadcast_to(np.stack([rows, columns], -1), (b, h, w, 2))], -1)


def describe(descriptor: Any, x: np.ndarray) -> np.ndarray:
    kernel, bias = (np.asarray(descriptor["params"][name], np.float64) for name in ("kernel", "bias"))
    return patches(x) @ kernel + bias


def batch_of(x: dict[str, np.ndarray], valid: np.ndarray | None = None) -> Batch:
    n = len(x["layer1"])
    valid = np.ones(n, bool) if valid is None else valid
    zeros, index = jnp.zeros(n, jnp.int32), jnp.arange(n, dtype=jnp.int32)
    return Batch(jax.tree.map(jnp.asarray, x), jnp.asarray(valid), zeros, None, index, jnp.float32(0))


def tiny(**options: Any) -> Any:
    """The method, and its state before the first image."""
    method = cfa(backbone="pdn_small", layers=("layer1",), image_size=(12, 8), **options)
    return method, jax.jit(lambda: method.stages[0].init(KEY, None, None, SPEC))()


def begin(method: Any, descriptor: Any, memory: Memory, radius: float = 1e-5) -> Any:
    """The training state before the first step."""
    model = CfaModel({"descriptor": descriptor}, memory)
    state = jax.jit(lambda model: method.stages[1].init(KEY, model, None, None))(model)
    params = state.model.params
    assert params["radius"] == np.float32(1e-5)
    return state._replace(model=state.model._replace(params=params | {"radius": jnp.float32(radius)}))


@pytest.mark.parametrize(("gamma_d", "feature_scale"), [(1, 1.0), (3, 0.25)])
def test_the_memory_is_the_mean_descriptor_of_every_position(gamma_d, feature_scale):
    """The scale applies to the features, not to their position."""
    method, state = tiny(gamma_d=gamma_d, feature_scale=feature_scale)
    valid = np.array([True, True, False, True, True])
    padded = {"layer1": np.where(valid[:, None, None, None], X["layer1"], np.nan)}
    sums, _ = jax.jit(method.stages[0].update)(KEY, state, None, batch_of(padded, valid))
    model = jax.jit(method.stages[0].finalize)(KEY, sums, None)
    expected = describe(state.descriptor, feature_scale * X["layer1"][valid]).mean(0).reshape(24, -1)
    assert expected.shape[1] == 7 // gamma_d
    np.testing.assert_allclose(model.memory.centers, expected, atol=1e-5)


def test_training_step():
    """The loss, with both of its terms, and three steps of AdamW with AMSGrad, against numpy."""
    decay, rate = 0.01, 1e-3
    method, sums = tiny(weight_decay=decay, learning_rate=rate)
    centers = (0.3 * np.random.default_rng(1).normal(size=(9, 7))).astype(np.float32)
    training = begin(method, sums.descriptor, Memory(jnp.asarray(centers), None), 0.8)
    x = patches(X["layer1"]).reshape(-1, 9)
    kernel, bias, radius = (
        np.asarray(leaf, np.float64)
        for leaf in (*(sums.descriptor["params"][name] for name in ("kernel", "bias")), 0.8)
    )
    first, second, largest = ([np.zeros_like(p) for p in (kernel, bias, radius)] for _ in range(3))
    update = jax.jit(method.stages[1].update)
    for step in range(1, 4):
        difference = (x @ kernel + bias)[:, None] - centers
        squared = (difference**2).sum(-1)
        nearest = np.argsort(squared, -1)[:, :6]
        squared = np.take_along_axis(squared, nearest, 1)
        attraction, repulsion = squared[:, :3] - radius**2, radius**2 - squared[:, 3:] - 0.1
        assert (attraction > 0).any() and (repulsion > 0).any()
        loss = (np.maximum(attraction, 0).mean() + np.maximum(repulsion, 0).mean()) / 1e-3
        sign = np.concatenate([attraction > 0, -1.0 * (repulsion > 0)], 1) / (1e-3 * attraction.size)
        pull = (2 * sign[..., None] * np.take_along_axis(difference, nearest[..., None], 1)).sum(1)
        gradients = x.T @ pull, pull.sum(0), -2 * radius * sign.sum()

        training, metrics = update(KEY, training, None, batch_of(X))
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
        steps = []
        for i, (p, g) in enumerate(zip((kernel, bias, radius), gradients, strict=True)):
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.999 * second[i] + 0.001 * g**2
            largest[i] = np.maximum(largest[i], second[i])
            size = np.sqrt(largest[i] / (1 - 0.999**step)) + 1e-8
            steps.append(p * (1 - rate * decay) - rate * first[i] / (1 - 0.9**step) / size)
        kernel, bias, radius = steps
        params = training.model.params
        np.testing.assert_allclose(params["radius"], radius, rtol=1e-5)
        np.testing.assert_allclose(params["descriptor"]["params"]["kernel"], kernel, atol=2e-5)
        np.testing.assert_allclose(params["descriptor"]["params"]["bias"], bias, atol=2e-5)


def test_training_searches_a_large_memory_by_its_sketch():
    rng = np.random.default_rng(0)
    x = {"layer1": rng.normal(size=(2, 4, 4, 140)).astype(np.float32)}
    centers = jnp.asarray(rng.normal(size=(2100, 140)), jnp.float32)
    method = cfa(backbone="pdn_small", layers=("layer1",), image_size=(4, 4))
    spec = {"layer1": jax.ShapeDtypeStruct((2, 4, 4, 140), jnp.float32)}
    descriptor = jax.jit(lambda: method.stages[0].init(KEY, None, None, spec))().descriptor
    prepared = jax.jit(sketch)(centers, jnp.ones(2100, bool))
    assert prepared is not None
    update = jax.jit(method.stages[1].update)
    (sketched, with_sketch), (exhaustive, without) = (
        update(KEY, begin(method, descriptor, Memory(centers, first_pass)), None, batch_of(x))
        for first_pass in (prepared, None)
    )
    np.testing.assert_allclose(with_sketch["loss"], without["loss"], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), sketched.model.params, exhaustive.model.params
    )


def test_score_weights_the_nearest_distance_by_its_softmin():
    method, sums = tiny()
    centers = np.random.default_rng(1).normal(size=(9, 7)).astype(np.float32)
    training = begin(method, sums.descriptor, Memory(jnp.asarray(centers), None))
    fitted = jax.jit(method.stages[1].finalize)(KEY, training, None)
    assert set(fitted.params) == {"descriptor"}  # the radius is not needed any more
    scores = jax.jit(method.score)(fitted, None, jax.tree.map(jnp.asarray, X))
    descriptors = describe(sums.descriptor, X["layer1"])
    distance = np.sort(np.sqrt(((descriptors[..., None, :] - centers) ** 2).sum(-1)), -1)[..., :3]
    weight = np.exp(-distance[..., 0]) / np.exp(-distance).sum(-1)
    expected = upsample_blur(jnp.asarray(weight * distance[..., 0], jnp.float32), (12, 8), 4.0)
    np.testing.assert_allclose(scores.pixel, expected, atol=1e-5)
    np.testing.assert_allclose(scores.image, np.asarray(scores.pixel).max((1, 2)))


def test_a_compressed_memory_holds_means_of_positions():
    method, sums = tiny(gamma_c=3)
    descriptor = sums.descriptor
    sums, _ = jax.jit(method.stages[0].update)(KEY, sums, None, batch_of(X))
    centers = np.asarray(method.stages[0].finalize(KEY, sums, None).memory.centers)
    assert centers.shape == (8, 7)
    positions = describe(descriptor, X["layer1"]).mean(0).reshape(24, 7)
    cluster = ((positions[:, None] - centers) ** 2).sum(-1).argmin(1)
    for i in set(cluster.tolist()):
        np.testing.assert_allclose(centers[i], positions[cluster == i].mean(0), atol=1e-5)
    with pytest.raises(ValueError, match="gamma_c must leave at least 6"):
        tiny(gamma_c=5)
