"""CFA: its memory, and the search in it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.base import Batch
from jaxad.methods.cfa import CfaModel, Memory, cfa
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


def begin(method: Any, descriptor: Any, memory: Memory) -> Any:
    """The training state before the first step."""
    model = CfaModel({"descriptor": descriptor}, memory)
    return jax.jit(lambda model: method.stages[1].init(KEY, model, None, None))(model)


def test_the_memory_is_the_mean_descriptor_of_every_position():
    """The scale applies to the features, not to their position."""
    method, state = tiny(gamma_d=3, feature_scale=0.25)
    valid = np.array([True, True, False, True, True])
    padded = {"layer1": np.where(valid[:, None, None, None], X["layer1"], np.nan)}
    sums, _ = jax.jit(method.stages[0].update)(KEY, state, None, batch_of(padded, valid))
    model = jax.jit(method.stages[0].finalize)(KEY, sums, None)
    expected = describe(state.descriptor, 0.25 * X["layer1"][valid]).mean(0).reshape(24, -1)
    assert expected.shape[1] == 2
    np.testing.assert_allclose(model.memory.centers, expected, atol=1e-5)


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
