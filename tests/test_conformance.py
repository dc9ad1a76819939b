"""What every method must do, whatever it computes; one run a row of `tests/cases.py`."""

import functools
import gc
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad import artifact
from jaxad.backbones import backbone
from jaxad.base import Batch, Frozen, Key, Method, PyTree, State
from jaxad.driver.fit import abstract_state
from tests.cases import CASES, IMAGE_SIZE

B = 4
"""Images a batch; three batches hold N images and two rows of padding."""
N = 10
ROWS = 3 * B
KEY = jax.random.key(0)


def photographs(seed: int, n: int) -> np.ndarray:
    """Gratings with noise, of one kind a seed."""
    rng = np.random.default_rng(seed)
    y, x = np.indices(IMAGE_SIZE)
    clean = 128 + 60 * np.sin((x * (seed + 1) + y) / 3)[..., None] * np.array([1.0, 0.8, 0.6])
    return np.clip(clean + rng.normal(0, 12, (n, *IMAGE_SIZE, 3)), 0, 255).astype(np.uint8)


def defective(images: np.ndarray) -> np.ndarray:
    """The images with a bright square on each."""
    images = images.copy()
    images[:, 20:36, 24:40] = 255
    return images


@functools.cache
def embed_program(embed):
    return jax.jit(embed)


@functools.cache
def frozen_of(names: tuple[str, ...], seed: int) -> Frozen:
    made = tuple(backbone(name).init(jax.random.key(seed + i)) for i, name in enumerate(names))
    return made if len(made) > 1 else made[0]


def frozen_for(name: str, seed: int) -> Frozen:
    """The weights of a row, and the photographs that it learns from too."""
    frozen = frozen_of(CASES[name].backbones, seed)
    return frozen | {"auxiliary": photographs(8, 3)} if CASES[name].make().auxiliary != "none" else frozen


def rows(x: PyTree, index: Any) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[np.asarray(index)], x)


def nonsense(dtype: Any) -> Any:
    """NaN, or of integers the largest."""
    return jnp.asarray(math.nan if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).max, dtype)


def stacked(x: PyTree, n: int, size: int, padding: bool = False) -> Batch:
    """Batches of `size` from n embedded images; padding rows repeat the first index and hold images or nonsense."""
    steps = math.ceil(n / size)
    valid = np.arange(steps * size) < n
    index = np.where(valid, np.arange(steps * size), 0)

    def cut(leaf):
        leaf = leaf[index]
        if padding:
            leaf = jnp.where(valid.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, nonsense(leaf.dtype))
        return leaf.reshape(steps, size, *leaf.shape[1:])

    shape = (steps, size)
    return Batch(
        jax.tree.map(cut, x),
        jnp.asarray(valid.reshape(shape)),
        jnp.zeros(shape, jnp.int32),
        None,
        jnp.asarray(index.reshape(shape), jnp.int32),
        jnp.arange(steps, dtype=jnp.float32) / steps,
    )


def spec_of(x: PyTree, n: int) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((n, *leaf.shape[1:]), leaf.dtype), x)


def learn(method: Method, n: int, classes: bool = False):
    """All stages over the same batches, step by step; with `classes`, of which every argument but `frozen` has an axis,
    in one program."""

    def program(fn, axes):
        return jax.jit(jax.vmap(fn, axes) if classes else fn)

    init = program(lambda key, frozen, x: method.init(key, frozen, spec_of(x, n)), (0, None, 0))
    fold_in = program(jax.random.fold_in, (0, None))
    stages = [
        (program(stage.update, (0, 0, None, 0)), program(stage.finalize, (0, 0, None))) for stage in method.stages
    ]

    def run(key: Key, frozen: Frozen, batches: Batch) -> State:
        axis = int(classes)
        steps = [
            jax.tree.map(functools.partial(jnp.take, indices=i, axis=axis), batches)
            for i in range(batches.valid.shape[axis])
        ]
        state = init(key, frozen, steps[0].x)
        for s, (update, finalize) in enumerate(stages):
            stage_key = fold_in(key, s)
            for step in range(method.stages[s].epochs * len(steps)):
                state, _ = update(fold_in(stage_key, step), state, frozen, steps[step % len(steps)])
            state = finalize(stage_key, state, frozen)
        return state

    return run


class Fitted(NamedTuple):
    method: Method
    frozen: Frozen
    embed: Any
    learn: Any
    score: Any
    train: PyTree
    test: PyTree
    """The unseen images, embedded."""
    state: State


@functools.cache
def unseen() -> np.ndarray:
    """Two normal images, then the same with a defect."""
    images = photographs(0, ROWS + 2)[ROWS:]
    return np.concatenate([images, defective(images)])


@functools.cache
def fitted(name: str, longer: bool = False) -> Fitted:
    case = CASES[name]
    method, frozen = case.make(longer), frozen_for(name, 0)
    embed = embed_program(method.embed)
    train = embed(frozen, photographs(0, ROWS))
    test = embed(frozen, unseen())
    program = learn(method, ROWS)
    state = program(KEY, frozen, stacked(train, N, B))
    return Fitted(method, frozen, embed, program, jax.jit(method.score), train, test, state)


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def assert_equal(a: PyTree, b: PyTree) -> None:
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a: PyTree, b: PyTree, tolerance: float) -> None:
    """Integers exactly; floats within the tolerance, times the largest entry of their array."""

    def check(x, y):
        if jnp.issubdtype(x.dtype, jnp.floating):
            np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * float(np.abs(y).max(initial=0)))
        else:
            np.testing.assert_array_equal(x, y)

    jax.tree.map(check, a, b)


def test_shapes_and_types(name):
    case, f = CASES[name], fitted(name)
    scores = f.score(f.state, f.frozen, f.test)
    assert scores.image.shape == (B,) and scores.image.dtype == jnp.float32
    assert np.isfinite(scores.image).all()
    if case.pixel:
        assert scores.pixel.shape == (B, *IMAGE_SIZE) and scores.pixel.dtype == jnp.float32
        assert np.isfinite(scores.pixel).all()
    else:
        assert scores.pixel is None
    assert all(leaf.shape[0] == B for leaf in jax.tree.leaves(f.test))


def test_uint8_and_float_images_are_the_same(name):
    f = fitted(name)
    image = photographs(0, B)
    assert_close(f.embed(f.frozen, image), f.embed(f.frozen, image.astype(np.float32) / 255), 1e-4)


def test_state_keeps_its_shape_within_a_stage(name):
    f = fitted(name)
    batch = jax.eval_shape(lambda b: jax.tree.map(lambda leaf: leaf[0], b), stacked(f.train, N, B))
    state = jax.eval_shape(lambda key: f.method.init(key, f.frozen, spec_of(f.train, N)), KEY)
    for stage in f.method.stages:
        after, metrics = jax.eval_shape(stage.update, KEY, state, f.frozen, batch)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
        assert all(value.shape == () for value in metrics.values())
        state = jax.eval_shape(stage.finalize, KEY, after, f.frozen)


def test_memory_of_the_state(name):
    """A streaming method's state is of one size however many images there are; the others say that theirs is not."""
    f = fitted(name)

    def types(n):
        state = jax.eval_shape(lambda key: f.method.init(key, f.frozen, spec_of(f.train, n)), KEY)
        return jax.tree.map(jax.typeof, state)

    assert (types(10) == types(10_000)) == CASES[name].streaming


def test_tracers_do_not_leak_and_nothing_is_captured(name):
    """Weights come in as arguments: no program has a constant of more than a heat map's resampling matrices."""
    f = fitted(name)
    batch = jax.tree.map(lambda leaf: leaf[0], stacked(f.train, N, B))
    image = photographs(0, B)
    gc.collect()
    gc.freeze()  # leaks are looked for among all that the collector sees, so let it see what is made here alone
    with jax.checking_leaks():
        programs = [jax.make_jaxpr(f.method.embed)(f.frozen, image)]
        state = jax.eval_shape(lambda key: f.method.init(key, f.frozen, spec_of(f.train, N)), KEY)
        for stage in f.method.stages:
            programs.append(jax.make_jaxpr(stage.update)(KEY, state, f.frozen, batch))
            program, state = jax.make_jaxpr(stage.finalize, return_shape=True)(KEY, state, f.frozen)
            programs.append(program)
        programs.append(jax.make_jaxpr(f.method.score)(state, f.frozen, f.test))
    gc.unfreeze()
    limit = sum(IMAGE_SIZE) * max(IMAGE_SIZE) * 4 + CASES[name].constants
    for program in programs:
        assert sum(np.asarray(const).nbytes for const in program.consts) <= limit


def test_padding_never_changes_anything(name):
    """Rows that are not valid may hold NaN or another image, and carry the index of a valid one."""
    f = fitted(name)
    assert_equal(f.learn(KEY, f.frozen, stacked(f.train, N, B, padding=True)), f.state)


def test_batch_size_and_room_for_more_images_do_not_change_the_scores(name):
    """Three batches of four with two rows of padding in room for 12 are two full batches of five in room for 10.

    Methods that ask for a number of images a step keep it.
    """
    f = fitted(name)
    size = 5 if all(stage.batch_size is None for stage in f.method.stages) else B
    other = learn(f.method, N)(KEY, f.frozen, stacked(f.train, N, size))
    assert_close(f.score(other, f.frozen, f.test), f.score(f.state, f.frozen, f.test), 1e-4)


def test_same_key_same_state(name):
    f = fitted(name)
    assert_equal(f.learn(KEY, f.frozen, stacked(f.train, N, B)), f.state)
    other = f.learn(jax.random.key(1), f.frozen, stacked(f.train, N, B))
    same = all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(f.state), strict=True))
    assert same != CASES[name].random


def test_scores_are_per_image(name):
    """Neither the other images of the batch nor their order nor their number matters."""
    f = fitted(name)
    scores = f.score(f.state, f.frozen, f.test)
    order = np.array([2, 0, 3, 1])
    assert_close(f.score(f.state, f.frozen, rows(f.test, order)), rows(scores, order), CASES[name].tolerance / 10)
    poisoned = jax.tree.map(lambda leaf: leaf.at[1:].set(nonsense(leaf.dtype)), f.test)
    assert_close(rows(f.score(f.state, f.frozen, poisoned), [0]), rows(scores, [0]), 1e-6)
    assert_close(f.score(f.state, f.frozen, rows(f.test, [2])), rows(scores, [2]), 1e-5)


def test_defects_score_higher(name):
    case = CASES[name]
    if not case.finds:
        pytest.skip("a test cannot afford the training with which it finds a defect: see the results of its recipe")
    f = fitted(name, longer=True) if case.longer else fitted(name)
    scores = f.score(f.state, f.frozen, f.test)
    assert scores.image[2:].min() > scores.image[:2].max()
    if case.pixel:
        inside = scores.pixel[2:, 20:36, 24:40].mean((1, 2))
        assert (inside > scores.pixel[2:].mean((1, 2))).all()


def test_vmap_over_classes_is_a_loop(name):
    """Two classes of 12 and 9 images, fitted and scored in one program; the weights are shared."""
    f = fitted(name)
    counts, images = (ROWS, 9), [photographs(seed, ROWS) for seed in (0, 1)]
    embedded = [f.embed(f.frozen, i) for i in images]
    classes = [stacked(x, n, B) for x, n in zip(embedded, counts, strict=True)]
    keys = jax.random.split(KEY, 2)
    together = learn(f.method, ROWS, classes=True)(keys, f.frozen, stack(classes))
    apart = [f.learn(key, f.frozen, batches) for key, batches in zip(keys, classes, strict=True)]
    tests = [rows(x, range(B)) for x in embedded]
    scores = jax.jit(jax.vmap(f.method.score, (0, None, 0)))(together, f.frozen, stack(tests))
    for i, (state, test) in enumerate(zip(apart, tests, strict=True)):
        assert_close(rows(scores, i), f.score(state, f.frozen, test), 10 * CASES[name].tolerance)


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def test_weights_are_an_argument(name):
    """Other weights in the same compiled functions give other scores; the same ones where none are used."""
    f = fitted(name)
    other = frozen_for(name, 7)
    batches = stacked(f.embed(other, photographs(0, ROWS)), N, B)
    scores = f.score(f.learn(KEY, other, batches), other, f.embed(other, unseen()))
    own = f.score(f.state, f.frozen, f.test)
    if CASES[name].weights:
        assert not np.allclose(scores.image, own.image, rtol=1e-3)
    else:
        assert_equal(scores, own)


def test_saved_and_loaded_bit_for_bit(name, tmp_path):
    f = fitted(name)
    artifact.save_state(tmp_path, f.state)
    loaded = artifact.load_state(tmp_path, abstract_state(f.method, f.frozen, spec_of(f.train, ROWS)))
    assert jax.tree.map(jax.typeof, loaded) == jax.tree.map(jax.typeof, f.state)
    assert jax.tree.structure(loaded) == jax.tree.structure(f.state)
    assert_equal(loaded, f.state)
