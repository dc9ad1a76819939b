"""Several classes at once, and meshes of 8 virtual devices, give what one class on one device gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxad
from jaxad.base import Scores, State
from jaxad.data.ignore import regions
from jaxad.driver import mesh as meshes
from jaxad.driver.execution import Execution
from jaxad.driver.fit import Group, fit, fit_classes
from jaxad.driver.programs import class_state
from jaxad.driver.scoring import score_all, score_classes
from tests.cases import CASES, IMAGE_SIZE, SEVERAL_CLASSES, rows_of
from tests.rows import EXECUTION, KEY, B, N, assert_close, auxiliary_for, datasets, row

COUNTS = (N, 7, 9)
TRAIN, TEST = zip(*(datasets(seed, n) for seed, n in enumerate(COUNTS)), strict=True)


@functools.lru_cache(maxsize=2)
def single_classes(name: str) -> tuple[list[State], list[Scores]]:
    """The states and scores of each class by itself, in the programs of the row: all have room for the largest."""
    r = row(name)
    states, scores = [], []
    for data, test in zip(TRAIN, TEST, strict=True):
        group = Group(r.method, r.frozen, [data], KEY[None], EXECUTION, auxiliary_for(r.method))
        state = group.run(room=N)
        states.append(class_state(r.method, r.frozen, state, 0, data))
        padded = jax.tree.map(lambda leaf: leaf[0], state)
        scores.append(score_all(r.method, padded, r.frozen, test, EXECUTION))
    return states, scores


def by_class(stream, classes: int) -> list[Scores]:
    """What `score_classes` yields, by class."""
    parts = [[] for _ in range(classes)]
    for c, index, scores in stream:
        assert list(index) == list(range(len(parts[c]) * B, len(parts[c]) * B + len(index)))
        parts[c].append(scores)
    return [jax.tree.map(lambda *leaves: np.concatenate(leaves), *part) for part in parts]


def assert_same_scores(name: str, scores: Scores, expected: Scores) -> None:
    """Images and pixels have the same scores; where heat maps jump, nearly all pixels."""
    tolerance = CASES[name].tolerance
    assert_close(scores.image, expected.image, tolerance)
    if CASES[name].jumps:
        same = np.isclose(scores.pixel, expected.pixel, rtol=1e-5, atol=1e-5 * float(np.abs(expected.pixel).max()))
        assert same.mean() > 0.9
    else:
        assert_close(scores.pixel, expected.pixel, tolerance)


def assert_same_classes(name: str, state: State, scores: list[Scores]) -> None:
    """All classes equal those by themselves: scores, shapes, and where the data determine it the state."""
    r, (states, expected) = row(name), single_classes(name)
    for c, data in enumerate(TRAIN):
        cut = class_state(r.method, r.frozen, state, c, data)
        assert jax.tree.map(jnp.shape, cut) == jax.tree.map(jnp.shape, states[c])
        if CASES[name].determined:
            assert_close(cut, states[c], 1e-5)
        assert_same_scores(name, scores[c], expected[c])


def fit_and_score(name: str, execution: Execution) -> tuple[State, list[Scores]]:
    r = row(name)
    state = fit_classes(r.method, r.frozen, TRAIN, KEY, execution, auxiliary=auxiliary_for(r.method)).state
    return state, by_class(score_classes(r.method, state, r.frozen, TEST, execution), len(TRAIN))


@pytest.mark.parametrize("name", rows_of(SEVERAL_CLASSES))
def test_classes_at_once_are_the_classes_one_by_one(name):
    assert_same_classes(name, *fit_and_score(name, EXECUTION))


@pytest.mark.parametrize("name", rows_of(SEVERAL_CLASSES))
def test_classes_on_a_mesh(name, monkeypatch):
    """Also with every part of the state sharded that can be, however small; three classes fill up to four."""
    monkeypatch.setattr(meshes, "SHARD_BYTES", 0)
    assert_same_classes(name, *fit_and_score(name, EXECUTION._replace(mesh=jaxad.make_mesh(shape=(2, 4)))))


@pytest.mark.parametrize("name", rows_of(SEVERAL_CLASSES))
def test_one_class_on_a_mesh(name, monkeypatch):
    monkeypatch.setattr(meshes, "SHARD_BYTES", 0)
    r, execution = row(name), Execution(mesh=jaxad.make_mesh("data"), batch_size=8)
    _, expected = single_classes(name)
    state = fit(r.method, r.frozen, TRAIN[1], KEY, execution, auxiliary=auxiliary_for(r.method)).state
    scores = score_all(r.method, state, r.frozen, TEST[1], execution)
    assert_same_scores(name, scores, expected[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["padim", "cfa", "mahalanobis_ad"])
def test_classes_with_masks_of_their_own_on_a_mesh(name):
    """The first class ignores its corner, the second a side of one of its images, the third nothing."""
    corner, side = np.zeros((2, *IMAGE_SIZE), bool)
    corner[:20, :30], side[:, 40:] = True, True
    half = [record._replace(ignore=(side,) if i else ()) for i, record in enumerate(TEST[1].records)]
    train = [TRAIN[0].ignoring(regions(corner)), *TRAIN[1:]]
    test = [TEST[0].ignoring(regions(corner)), dataclasses.replace(TEST[1], records=tuple(half)), TEST[2]]
    r, execution = row(name), EXECUTION._replace(mesh=jaxad.make_mesh(shape=(2, 4)))
    state = fit_classes(r.method, r.frozen, train, KEY, execution).state
    scores = by_class(score_classes(r.method, state, r.frozen, test, execution), len(train))
    for c, data in enumerate(train):
        expected = score_all(
            r.method, fit(r.method, r.frozen, data, KEY, EXECUTION).state, r.frozen, test[c], EXECUTION
        )
        assert_close(scores[c], expected, 1e-4)
