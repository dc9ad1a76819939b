"""Every program of every row is traced and lowered for TPUs and CUDA GPUs, on machines without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxad
from jaxad.base import Batch
from jaxad.driver import mesh as meshes
from jaxad.driver.embedding import embed_program
from jaxad.driver.mesh import Layout
from jaxad.driver.programs import fit_programs, score_program
from tests.cases import CASES, IMAGE_SIZE
from tests.rows import B, N, abstract_states, auxiliary_for, frozen_for, method_for, spec

PLATFORMS = ("tpu", "cuda")
SHARDED = ("patchcore", "patchcore-stream", "padim", "spade", "mahalanobis_ad")
"""Rows whose operations exchange parts of the state between devices."""


def lower(name: str, layout: Layout, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowers embed, start, every update and finish, and score; checks their constants and the shapes of states."""
    method, frozen = method_for(name), jax.tree.map(jax.typeof, frozen_for(name))
    states = abstract_states(name, N)
    auxiliary = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), auxiliary_for(method))

    def stacked(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((classes, *shape), dtype)

    def of_all(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return stacked(leaf.shape, leaf.dtype)

    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")  # the loops of accelerators, not those of CPUs
    keys, size = stacked((), jax.eval_shape(jax.random.key, 0).dtype), B * layout.data_shards
    x = jax.tree.map(lambda leaf: stacked((2, size, *leaf.shape[1:]), leaf.dtype), spec(method, frozen, size))
    integers, steps = stacked((2, size), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    batch = Batch(x, stacked((2, size), jnp.bool_), integers, None, integers, stacked((2,), jnp.float32))
    programs = fit_programs(method, layout, N, IMAGE_SIZE)

    most = sum(IMAGE_SIZE) * max(IMAGE_SIZE) * 4 + CASES[name].constants

    def check(program, *args):
        """The shapes and types of the result; no constant is larger than a heat map's resampling matrices."""
        with layout.ambient():
            function = jax.jit(program._fn)
            traced = function.trace(*args)
            exported = jax.export.export(function, platforms=PLATFORMS)(*args)
        assert exported.platforms == PLATFORMS
        assert sum(np.asarray(constant).nbytes for constant in traced.jaxpr.consts) <= most
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), traced.out_info)

    images = stacked((1, size, *IMAGE_SIZE, 3), jnp.uint8)
    check(embed_program(method.embed, layout, layout.rows(size)), frozen, images)
    check(programs.start, keys, frozen)
    for number in range(len(method.stages)):
        state = jax.tree.map(of_all, states[number])
        active = stacked((2,), jnp.bool_)
        updated, metrics = check(programs.updates[number], state, keys, active, batch, frozen, auxiliary, steps)
        assert updated == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
        assert all(shape == (classes, 2) for shape, _ in metrics.values())
        check(programs.finishes[number], keys, state, frozen)
    state = jax.tree.map(of_all, states[-1])
    x = jax.tree.map(lambda leaf: stacked((1, *leaf.shape[2:]), leaf.dtype), x)
    check(score_program(method, layout, None, True), state, frozen, x)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("classes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_every_program_is_lowered_for_accelerators(name, classes, monkeypatch):
    lower(name, Layout(), classes, monkeypatch)


@pytest.mark.parametrize("name", SHARDED)
def test_programs_of_classes_on_a_mesh_are_lowered_for_accelerators(name, monkeypatch):
    monkeypatch.setattr(meshes, "SHARD_BYTES", 0)
    lower(name, Layout(jaxad.make_mesh(shape=(2, 4))), 2, monkeypatch)


def test_all_rows_take_the_devices_that_there_are():
    """The mesh above has all of the virtual devices."""
    assert np.prod(jax.device_count()) == 8
