"""What every method must do, whatever it computes; one fit a row of `tests/cases.py` serves all tests of that row."""

import dataclasses
import functools
import gc
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.command import RESULTS
from jaxad import artifact
from jaxad.base import Batch, Method, PyTree, State
from jaxad.driver.execution import Execution
from jaxad.driver.fit import Group, fit, states
from jaxad.driver.mesh import Layout
from jaxad.driver.programs import fit_programs, score_program
from jaxad.driver.scoring import score_all
from jaxad.files import read_json
from tests.cases import CASES, FITTED, IMAGE_SIZE, OF_EACH_KIND, SEVERAL_CLASSES, rows_of
from tests.rows import (
    EXECUTION,
    KEY,
    B,
    N,
    abstract_states,
    assert_close,
    assert_equal,
    auxiliary_for,
    datasets,
    frozen_for,
    photographs,
    row,
    spec,
)


@pytest.fixture(params=rows_of(FITTED))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def rows(x: PyTree, index: Any) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[np.asarray(index)], x)


def nonsense(dtype: Any) -> Any:
    """NaN, or the largest integer."""
    return jnp.asarray(math.nan if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).max, dtype)


@functools.cache
def embedder(embed: Any) -> Any:
    return jax.jit(embed)


def of_gradient(method: Method) -> bool:
    return any(stage.shuffle for stage in method.stages)


def abstract_batch(method: Method, frozen: Any) -> Batch:
    """Shapes and types of a batch of one class."""
    integer, auxiliary = jax.ShapeDtypeStruct((B,), jnp.int32), auxiliary_for(method)
    return Batch(
        spec(method, frozen, B),
        jax.ShapeDtypeStruct((B,), bool),
        integer,
        None,
        integer,
        jax.ShapeDtypeStruct((), jnp.float32),
        None if auxiliary is None else jax.ShapeDtypeStruct(auxiliary.shape, auxiliary.dtype),
    )


def test_the_programs_of_a_row_are_counted_and_estimated(name):
    """One for every part, and two to embed: batches of the driver's size and of the stages' own. `fit` and `score` find
    those that `estimate` compiled."""
    r = row(name)
    assert r.programs_after_estimate == 0
    parts = 1 + 2 * len(r.method.stages) + 1
    assert parts <= r.programs <= parts + 2
    assert {need.name for need in r.plan.needs} >= {"start", "score", *(stage.name for stage in r.method.stages)}


def test_shapes_and_types(name):
    scores = row(name).scores
    assert scores.image.shape == (B,) and scores.image.dtype == jnp.float32
    assert np.isfinite(scores.image).all()
    if CASES[name].pixel:
        assert scores.pixel.shape == (B, *IMAGE_SIZE) and scores.pixel.dtype == jnp.float32
        assert np.isfinite(scores.pixel).all()
    else:
        assert scores.pixel is None
    assert all(leaf.shape[0] == B for leaf in jax.tree.leaves(row(name).test))


def test_uint8_and_float_images_are_the_same(name):
    r, image = row(name), photographs(0, B)
    embed = embedder(r.method.embed)
    assert_close(embed(r.frozen, image), embed(r.frozen, image.astype(np.float32) / 255), 1e-4)


def test_memory_of_the_state(name):
    """A streaming method's state is of one size however many images there are; the others say that theirs is not."""
    few, many = (jax.tree.map(jax.typeof, abstract_states(name, n)[:-1]) for n in (N, 10_000))
    assert (few == many) == CASES[name].streaming


def test_only_the_stage_that_needs_a_buffer_holds_it(name):
    """The state in which a gradient stage ends has no part that grows with the training images."""
    for stage, few, many in zip(
        row(name).method.stages, *(abstract_states(name, n) for n in (N, 10_000)), strict=False
    ):
        if stage.shuffle:
            assert jax.tree.map(jax.typeof, few) == jax.tree.map(jax.typeof, many)


@pytest.mark.parametrize("name", rows_of(SEVERAL_CLASSES))
def test_tracers_do_not_leak(name):
    r = row(name)
    batch, images = abstract_batch(r.method, r.frozen), spec(r.method, r.frozen, N)
    gc.collect()
    gc.freeze()  # leaks are searched for among all that the collector sees: only what is made here
    with jax.checking_leaks():
        jax.eval_shape(r.method.embed, r.frozen, photographs(0, B))
        state = None
        for stage in r.method.stages:
            init = functools.partial(stage.init, spec=images)
            state = jax.eval_shape(init, KEY, state, r.frozen)
            jax.eval_shape(stage.update, KEY, state, r.frozen, batch)
            state = jax.eval_shape(stage.finalize, KEY, state, r.frozen)
        jax.eval_shape(r.method.score, state, r.frozen, r.test)
    gc.unfreeze()


def copied(state: State) -> State:
    """A copy that survives the donation of the state."""
    return jax.tree.map(lambda leaf: leaf.copy(), state)


def beginnings(name: str) -> dict[int, State]:
    """The states with which the stages begin that do not shuffle."""
    r = row(name)
    train, key = datasets(0, N)[0], jax.random.fold_in(KEY, 0)[None]
    programs = fit_programs(r.method, Layout(), N, IMAGE_SIZE)
    begin, number = {0: programs.start(key, r.frozen)}, 0
    if len(r.method.stages) > 1:
        for snapshot in states(r.method, r.frozen, [train], KEY, EXECUTION, auxiliary=auxiliary_for(r.method)):
            if snapshot.finished:
                number += 1
                begin[number] = copied(snapshot.state)
    return {number: state for number, state in begin.items() if number < len(r.method.stages)}


def test_padding_never_changes_anything(name):
    """In stages that collect: rows that are not valid hold NaN or another image, and the index of a valid one."""
    r = row(name)
    if all(stage.shuffle for stage in r.method.stages):
        pytest.skip("no stage of it is ever given padding")
    programs = fit_programs(r.method, Layout(), N, IMAGE_SIZE)
    x = embedder(r.method.embed)(r.frozen, photographs(0, B))
    valid = np.array([True, True, True, False])
    poisoned = jax.tree.map(lambda leaf: leaf.at[-1].set(nonsense(leaf.dtype)), x)
    for number, state in beginnings(name).items():
        if r.method.stages[number].shuffle:
            continue

        def update(x: PyTree, number: int = number, state: State = state) -> State:
            batch = Batch(x, jnp.asarray(valid), jnp.zeros(B, jnp.int32), None, jnp.arange(B) % 3, jnp.float32(0))
            batch = jax.tree.map(lambda leaf: leaf[None, None], batch)
            key, active, steps = KEY[None], jnp.ones((1, 1), bool), np.zeros(1, np.int32)
            arguments = (key, active, batch, r.frozen, auxiliary_for(r.method), steps)
            return programs.updates[number](copied(state), *arguments)[0]

        assert_equal(update(poisoned), update(x))


def test_batch_size_and_room_for_more_images_do_not_change_the_scores(name):
    """Three batches of four with two rows of padding in room for 12 are two full batches of five in room for 10."""
    r = row(name)
    if of_gradient(r.method):
        pytest.skip("its steps depend on the batch size, which the stage sets")
    train, test = datasets(0, N)
    ten, keys = train.subset(range(10)), KEY[None]
    padded = Group(r.method, r.frozen, [ten], keys, EXECUTION, None).run(room=N)
    state = fit(r.method, r.frozen, ten, KEY, Execution(batch_size=5)).state
    padded = jax.tree.map(lambda leaf: leaf[0], padded)
    scores = score_all(r.method, state, r.frozen, test, EXECUTION)
    assert_close(score_all(r.method, padded, r.frozen, test, EXECUTION), scores, 1e-4)


@pytest.mark.parametrize("name", rows_of(OF_EACH_KIND))
def test_same_key_same_state(name):
    r = row(name)
    assert_equal(r.fit(), r.state)
    other = r.fit(jax.random.key(1))
    same = all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(r.state), strict=True))
    assert same != CASES[name].random


def test_scores_are_per_image(name):
    """Neither the other images of the batch nor their order matters."""
    r = row(name)
    scores, order = r.score(r.test), np.array([2, 0, 3, 1])
    assert_close(r.score(rows(r.test, order)), rows(scores, order), CASES[name].tolerance / 10)
    poisoned = jax.tree.map(lambda leaf: leaf.at[1:].set(nonsense(leaf.dtype)), r.test)
    assert_close(rows(r.score(poisoned), [0]), rows(scores, [0]), 1e-6)


@pytest.mark.parametrize("name", rows_of({"padim"}))
def test_ignored_pixels_enter_no_score(name):
    """Where the defect is ignored, images have the scores that they have without it; elsewhere it is found."""
    r, test = row(name), datasets(0, N)[1]
    mask = np.zeros(IMAGE_SIZE, bool)
    mask[18:38, 22:42] = True
    records = tuple(record._replace(ignore=(mask,)) for record in test.records)
    scores = score_all(r.method, r.state, r.frozen, dataclasses.replace(test, records=records), EXECUTION)
    assert_equal(rows(scores, [0, 1]), rows(scores, [2, 3]))
    if scores.pixel is not None:
        smallest = np.where(mask, np.inf, scores.pixel).min((1, 2))
        np.testing.assert_array_equal(scores.pixel[:, mask], np.repeat(smallest[:, None], mask.sum(), 1))


@pytest.mark.slow
def test_the_number_of_images_does_not_matter(name):
    r = row(name)
    single = score_program(r.method, Layout(), None, False)
    scores = single(r.state, r.frozen, jax.tree.map(lambda leaf: leaf[None, None, 2:3], r.test))
    assert_close(jax.tree.map(lambda leaf: leaf[0], scores), rows(r.score(r.test), [2]), 1e-5)


@pytest.mark.parametrize("name", rows_of({name for name in FITTED if not CASES[name].longer}))
def test_defects_score_higher(name):
    """Where a test can afford the training that this takes; else the results of the method's recipes show it."""
    case = CASES[name]
    if not case.finds:
        results = [read_json(path) for path in RESULTS.glob(f"{case.method}_*.json")]
        assert max(result["metrics"]["image_AUROC"]["mean"] for result in results) > 0.9
        return
    scores = (row(name, True) if case.longer else row(name)).scores
    assert scores.image[2:].min() > scores.image[:2].max()
    if case.pixel:
        inside = scores.pixel[2:, 20:36, 24:40].mean((1, 2))
        assert (inside > scores.pixel[2:].mean((1, 2))).all()


@pytest.mark.parametrize("name", rows_of(OF_EACH_KIND))
def test_weights_are_an_argument(name):
    """Other weights in the same compiled functions give other scores; the same ones where none are used."""
    r = row(name)
    if not r.method.pretrained:
        pytest.skip("it has none")
    other = frozen_for(name, 7)
    x = embedder(r.method.embed)(other, datasets(0, N)[1].images(range(B)))
    scores, expected = r.score(x, r.fit(frozen=other), other), r.scores
    if CASES[name].weights:
        assert not np.allclose(scores.image, expected.image, rtol=1e-3)
    else:
        assert_close(scores, expected, 1e-6)


def test_saved_and_loaded_bit_for_bit(name, tmp_path):
    r = row(name)
    artifact.save_state(tmp_path, r.state)
    loaded = artifact.load_state(tmp_path, abstract_states(name, N)[-1])
    assert jax.tree.map(jax.typeof, loaded) == jax.tree.map(jax.typeof, r.state)
    assert_equal(loaded, r.state)
