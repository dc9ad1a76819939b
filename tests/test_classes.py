"""Every method on several classes at once, and on meshes of 8 virtual devices, is one class on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxad
from jaxad.data import Dataset, Preprocess, open_data
from jaxad.driver import mesh as meshes
from jaxad.driver.fit import class_state, fit, fit_classes, score_all, score_classes
from tests.cases import CASES
from tests.test_conformance import assert_close, defective, frozen_for, photographs

KEY = jax.random.key(5)
COUNTS = (12, 7, 9)
BATCH = 4


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def open_images(seed: int, n: int) -> tuple[Dataset, Dataset]:
    """Training and test images of a class; half of the latter have a defect."""
    images = photographs(seed, n + 6)
    test = np.concatenate([images[n : n + 3], defective(images[n + 3 :])])
    opened = open_data({f"class{seed}": images[:n], "test": test}, preprocess=Preprocess(None))
    return opened[f"class{seed}"].train, opened["test"].train


CLASSES = [open_images(seed, n) for seed, n in enumerate(COUNTS)]
TRAIN, TEST = ([part[i] for part in CLASSES] for i in (0, 1))


@functools.cache
def made(name: str):
    return CASES[name].make(), frozen_for(name, 0)


@functools.cache
def apart(name: str):
    """Each class on its own: states and scores."""
    method, frozen = made(name)
    states = [fit(method, frozen, data, KEY, batch_size=BATCH).state for data in TRAIN]
    return states, [
        score_all(method, state, frozen, data, batch_size=BATCH) for state, data in zip(states, TEST, strict=True)
    ]


def collected(stream, classes: int):
    """What `score_classes` yields, by class."""
    parts = [[] for _ in range(classes)]
    for c, index, scores in stream:
        assert list(index) == list(range(len(parts[c]) * BATCH, len(parts[c]) * BATCH + len(index)))
        parts[c].append(scores)
    return [jax.tree.map(lambda *leaves: np.concatenate(leaves), *part) for part in parts]


def assert_same_scores(name: str, scores, wanted) -> None:
    """Images and pixels have the same scores; where heat maps jump, nearly all pixels."""
    tolerance = CASES[name].tolerance
    assert_close(scores.image, wanted.image, tolerance)
    if CASES[name].jumps:
        same = np.isclose(scores.pixel, wanted.pixel, rtol=1e-5, atol=1e-5 * float(np.abs(wanted.pixel).max()))
        assert same.mean() > 0.9
    else:
        assert_close(scores.pixel, wanted.pixel, tolerance)


def assert_same_classes(name: str, state, scores) -> None:
    """The classes equal those apart: scores, and where the shapes are the same the state."""
    method, frozen = made(name)
    states, wanted = apart(name)
    for c, data in enumerate(TRAIN):
        own = class_state(method, frozen, state, c, data)
        assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, states[c])
        if CASES[name].determined:
            assert_close(own, states[c], 1e-5)
        assert_same_scores(name, scores[c], wanted[c])


def test_classes_at_once_are_the_classes_apart(name):
    method, frozen = made(name)
    state = fit_classes(method, frozen, TRAIN, KEY, batch_size=BATCH).state
    scores = collected(score_classes(method, state, frozen, TEST, batch_size=BATCH), 3)
    assert_same_classes(name, state, scores)


def test_classes_on_a_mesh(name, monkeypatch):
    """Also with every part of the state sharded that can be, however small; three classes fill up to four."""
    monkeypatch.setattr(meshes, "SHARD_BYTES", 0)
    mesh = jaxad.make_mesh(shape=(2, 4))
    method, frozen = made(name)
    state = fit_classes(method, frozen, TRAIN, KEY, mesh=mesh, batch_size=BATCH).state
    scores = collected(score_classes(method, state, frozen, TEST, mesh=mesh, batch_size=BATCH), 3)
    assert_same_classes(name, state, scores)


def test_one_class_on_a_mesh(name, monkeypatch):
    monkeypatch.setattr(meshes, "SHARD_BYTES", 0)
    mesh = jaxad.make_mesh("data")
    method, frozen = made(name)
    _, wanted = apart(name)
    state = fit(method, frozen, TRAIN[1], KEY, mesh=mesh, batch_size=8).state
    scores = score_all(method, state, frozen, TEST[1], mesh=mesh, batch_size=8)
    assert_same_scores(name, scores, wanted[1])
