"""The driver, with a toy gradient method whose every number a hand-written loop gives as well."""

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxad
from jaxad.base import Method, Scores, Stage
from jaxad.data import Dataset, Preprocess, open_data
from jaxad.driver import embedding, program
from jaxad.driver import fit as module
from jaxad.driver.checkpoint import Saver
from jaxad.driver.embedding import EmbeddingCache, Storage
from jaxad.driver.fit import NonFiniteLoss, class_state, fit, fit_classes, score, score_all, score_classes
from jaxad.driver.mesh import mesh_shape
from jaxad.methods import padim

KEY = jax.random.key(3)
N = 21


class ToyState(NamedTuple):
    weight: jax.Array
    optimizer: optax.OptState
    seen: jax.Array
    """How often every training image was learned from."""


class ToyModel(NamedTuple):
    weight: jax.Array
    noise: jax.Array


OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def mean_color(frozen, image):
    return {"color": image.astype(jnp.float32).mean((1, 2)) / 255 * frozen}


def toy(*, epochs=3, batch_size: int | None = 4, shuffle=True, rate=1.0) -> Method:
    """Counts images in one stage, then learns a weight by noisy gradient steps in another."""

    def init(key, frozen, spec):
        n = spec["color"].shape[0]
        weight = jax.random.normal(key, (3,))
        return ToyState(weight, OPTIMIZER.init(weight), jnp.zeros(n, jnp.int32))

    def count(key, state, frozen, batch):
        row = jnp.where(batch.valid, batch.index, len(state.seen))
        return state._replace(seen=state.seen.at[row].add(1, mode="drop")), {}

    def loss(weight, key, batch):
        noise = jax.random.normal(key, (3,)) * 0.01
        error = (batch.x["color"] @ (weight + noise) - 1.0) ** 2
        return jnp.where(batch.valid, error, 0).sum() / batch.valid.sum().astype(jnp.float32)

    def train(key, state, frozen, batch):
        value, gradient = jax.value_and_grad(loss)(state.weight, key, batch)
        updates, optimizer = OPTIMIZER.update(gradient * rate, state.optimizer)
        row = jnp.where(batch.valid, batch.index, len(state.seen))
        seen = state.seen.at[row].add(1, mode="drop")
        new = ToyState(optax.apply_updates(state.weight, updates), optimizer, seen)
        return new, {"loss": value, "valid": batch.valid.sum()}

    def finalize(key, state, frozen):
        return ToyModel(state.weight, jax.random.normal(key, (2,)))

    def score(state, frozen, x):
        return Scores((x["color"] @ state.weight - 1.0) ** 2, None)

    stages = (
        Stage("count", count),
        Stage("train", train, finalize, epochs=epochs, batch_size=batch_size, shuffle=shuffle),
    )
    return Method(mean_color, init, stages, score)


TOY = toy()
LONG = toy(epochs=12)
FROZEN = jnp.float32(2.0)


def photographs(n=N, seed=0) -> Dataset:
    images = np.random.default_rng(seed).integers(0, 256, (n, 6, 5, 3), np.uint8)
    return open_data(images, preprocess=Preprocess(None))["arrays"].train


DATA = photographs()


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def decoded(monkeypatch):
    """The number of images decoded so far, as a list of batches."""
    calls = []
    images = Dataset.images

    def counted(self, indices):
        calls.extend(indices)
        return images(self, indices)

    monkeypatch.setattr(Dataset, "images", counted)
    return calls


@pytest.fixture
def chunks(monkeypatch):
    """What the chunks of all stages were given: the number of the first step, and the stacked batches."""
    seen = []
    call = program.Program.__call__

    def spy(self, *args):
        if isinstance(args[0], ToyState):
            _, _, _, batches, _, steps = args
            seen.append((int(steps[0]), jax.tree.map(np.asarray, batches)))
        return call(self, *args)

    monkeypatch.setattr(program.Program, "__call__", spy)
    return seen


def by_hand(method, data, key, chosen):
    """The driver's result for the batches that it chose, as a plain loop."""
    x = mean_color(FROZEN, jnp.asarray(data.images(range(len(data)))))
    state = method.init(jax.random.fold_in(key, 0), FROZEN, x)
    stage_key = jax.random.fold_in(key, 2)
    update = jax.jit(method.stages[1].update)
    for step, index in enumerate(chosen):
        batch = module.Batch(
            jax.tree.map(lambda leaf, i=index: leaf[i], x),
            jnp.ones(len(index), bool),
            jnp.zeros(len(index), jnp.int32),
            None,
            jnp.asarray(index, jnp.int32),
        )
        state, _ = update(jax.random.fold_in(stage_key, step), state, FROZEN, batch)
    return method.stages[1].finalize(jax.random.fold_in(stage_key, 1 << 30), state, FROZEN)


def test_equals_a_loop_over_shuffled_full_batches(chunks):
    fitted = fit(TOY, FROZEN, DATA, KEY, batch_size=8)
    trained = [batches for _, batches in chunks if batches.valid.shape[1] == 4]
    assert all(batches.valid.all() for batches in trained)
    chosen = np.concatenate([batches.index for batches in trained])
    assert chosen.shape == (3 * 5, 4)
    epochs = chosen.reshape(3, 20)
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    np.testing.assert_allclose(fitted.state.weight, by_hand(TOY, DATA, KEY, chosen).weight, rtol=1e-5)
    assert_equal(fitted.state.noise, by_hand(TOY, DATA, KEY, chosen[:0]).noise)
    assert fitted.metrics["loss"].shape == (15,) and (fitted.metrics["valid"] == 4).all()


def test_steps_in_chunks(chunks, monkeypatch):
    monkeypatch.setattr(module, "chunk", lambda: 8)
    whole = fit(TOY, FROZEN, DATA, KEY).state
    assert [(step, len(batches.valid)) for step, batches in chunks] == [(0, 1), (1, 1), (0, 8), (8, 7)]
    monkeypatch.setattr(module, "chunk", lambda: 2)
    chunks.clear()
    assert_equal(fit(TOY, FROZEN, DATA, KEY).state, whole)
    assert [(step, len(batches.valid)) for step, batches in chunks[2:5]] == [(0, 2), (2, 2), (4, 2)]


def test_the_device_has_the_next_chunk_when_the_host_looks_at_one(chunks, tmp_path):
    def first_look(**options) -> int:
        """How many chunks of training were sent before the progress of the first was told."""
        sent, counted = [], len(chunks)

        def progress(what, done, total):
            if what == "train" and done:
                sent.append(len(chunks) - counted - 2)  # less those of counting

        fit(TOY, FROZEN, DATA, KEY, progress=progress, **options)
        return sent[0]

    assert first_look() == 2
    assert first_look(checkpoint_dir=tmp_path, checkpoint_seconds=0) == 1, (
        "a loss must be known before its state is kept"
    )


@pytest.mark.parametrize(("batch_size", "steps"), [(5, 5), (21, 1), (40, 1)])
def test_without_shuffling_every_image_counts_once_an_epoch(chunks, batch_size, steps):
    fitted = fit(toy(epochs=2, batch_size=None, shuffle=False), FROZEN, DATA, KEY, batch_size=batch_size)
    assert fitted.metrics["valid"].sum() == 2 * N and len(fitted.metrics["valid"]) == 2 * steps
    index = np.concatenate([batches.index[batches.valid] for _, batches in chunks])
    np.testing.assert_array_equal(index, np.tile(np.arange(N), 3))


def test_shuffling_fewer_images_than_a_batch():
    """They come several times, all of them about equally often."""
    fitted = fit(toy(epochs=2, batch_size=50), FROZEN, photographs(7), KEY)
    np.testing.assert_array_equal(fitted.metrics["valid"], [50, 50])


def test_the_embedding_batch_size_does_not_matter():
    assert_equal(fit(TOY, FROZEN, DATA, KEY, batch_size=8).state, fit(TOY, FROZEN, DATA, KEY, batch_size=3).state)


def test_the_key_decides():
    model, again, other = (fit(TOY, FROZEN, DATA, key).state for key in (KEY, KEY, jax.random.key(4)))
    assert_equal(again, model)
    assert not np.array_equal(other.weight, model.weight)


def test_images_are_decoded_once_for_all_stages_and_epochs(decoded):
    fit(TOY, FROZEN, DATA, KEY)
    assert sorted(decoded) == list(range(N))


def test_images_are_decoded_once_for_all_methods_of_a_cache(decoded):
    cache = EmbeddingCache()
    state = fit(TOY, FROZEN, DATA, KEY, cache=cache).state
    fit(LONG, FROZEN, DATA.subset(range(N)), KEY, cache=cache)
    score_all(TOY, state, FROZEN, DATA, cache=cache)
    assert sorted(decoded) == list(range(N))
    score_all(TOY, state, FROZEN, DATA.subset([3, 4]), cache=cache)
    assert sorted(decoded) == sorted([*range(N), 0, 1])


def test_a_cache_tells_weights_apart():
    cache = EmbeddingCache()
    fit(TOY, FROZEN, DATA, KEY, cache=cache)
    other = jnp.float32(0.5)
    assert_equal(fit(TOY, other, DATA, KEY, cache=cache).state, fit(TOY, other, DATA, KEY).state)
    assert [kept.frozen for kept in cache.values()] == [FROZEN, other]  # held, so that no others take their id


@pytest.mark.parametrize("axes", [None, (3, 2)])
def test_embeddings_kept_on_the_device_are_those_of_the_host(axes, decoded):
    mesh = None if axes is None else jaxad.make_mesh(shape=axes)
    cache = EmbeddingCache(Storage("device"))
    there = fit_classes(TOY, FROZEN, CLASSES, KEY, mesh=mesh, cache=cache).state
    assert len(decoded) == 21 + 9 + 3
    assert all(isinstance(leaf, jax.Array) for one in cache.values() for leaf in jax.tree.leaves(one.get(np.arange(2))))
    assert_equal(there, fit_classes(TOY, FROZEN, CLASSES, KEY, mesh=mesh).state)
    for c, index, scores in score_classes(TOY, there, FROZEN, CLASSES, mesh=mesh, cache=cache):
        state = jax.tree.map(lambda leaf, c=c: leaf[c], there)
        np.testing.assert_allclose(scores.image, score_all(TOY, state, FROZEN, CLASSES[c]).image[index], rtol=1e-5)


@pytest.mark.parametrize("place", ["host", "device"])
def test_embeddings_kept_in_bfloat16_are_rounded_from_the_first_epoch_on(place):
    def rounded(frozen, image):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), mean_color(frozen, image))

    cache = EmbeddingCache(Storage(place, "bfloat16"))
    half = fit(TOY, FROZEN, DATA, KEY, cache=cache).state
    assert_equal(half, fit(TOY._replace(embed=rounded), FROZEN, DATA, KEY).state)
    assert next(iter(cache.values())).room == (N * 3 * 2, N * 3 * 2)
    assert next(iter(cache.values())).get(np.arange(2))["color"].dtype == jnp.bfloat16


@pytest.mark.parametrize("storage", [Storage("disk"), Storage(dtype="int8")])  # pyright: ignore[reportArgumentType]
def test_embeddings_are_kept_where_and_as_one_can(storage):
    with pytest.raises(ValueError, match=r'^cache(_dtype)? must be "\w+" or "\w+", got "\w+"$'):
        EmbeddingCache(storage)


def test_embeddings_that_do_not_fit_are_computed_anew(decoded, monkeypatch):
    kept = fit(TOY, FROZEN, DATA, KEY).state
    decoded.clear()
    monkeypatch.setattr(embedding, "CACHE_BYTES", 10)
    assert_equal(fit(TOY, FROZEN, DATA, KEY).state, kept)
    assert N + 30 < len(decoded) <= N + 3 * 20  # an image that a chunk holds twice is decoded once


def test_a_loss_that_is_not_finite_stops_and_is_located():
    with pytest.raises(NonFiniteLoss, match=r"got (nan|inf) in stage train, epoch \d+, step \d+: ") as raised:
        fit(toy(rate=1e30), FROZEN, DATA, KEY)
    epoch, step = (int(word.strip(":,")) for word in str(raised.value).split() if word.strip(":,").isdigit())
    assert epoch == (step - 1) // 5 + 1 and step <= 15


def test_no_images():
    with pytest.raises(ValueError, match="at least one normal image, got none"):
        fit(TOY, FROZEN, DATA.subset(slice(0)), KEY)
    with pytest.raises(ValueError, match="at least one image, got none"):
        score_all(TOY, ToyModel(jnp.zeros(3), jnp.zeros(2)), FROZEN, DATA.subset(slice(0)))


def test_progress_adds_up():
    calls = []
    fit(TOY, FROZEN, DATA, KEY, batch_size=8, progress=lambda *call: calls.append(call))
    for stage, total in (("count", N), ("train", 3 * N)):
        done = [d for name, d, t in calls if name == stage and t == total]
        assert done == sorted(done) and done[-1] == total and len(done) > 2
    assert {name for name, _, _ in calls} == {"count", "finish count", "train", "finish train"}


def test_compile_time_is_told_apart():
    first = fit(toy(), FROZEN, DATA, KEY)
    assert first.compile_seconds > 0 and first.run_seconds > 0
    method = toy()
    fit(method, FROZEN, DATA, KEY)
    again = fit(method, FROZEN, DATA, KEY)
    assert again.compile_seconds < first.compile_seconds


def test_scores_come_batch_by_batch(decoded):
    model = fit(TOY, FROZEN, DATA, KEY).state
    decoded.clear()
    calls = []
    stream = score(TOY, model, FROZEN, DATA, batch_size=4, progress=lambda *call: calls.append(call))
    first, scores = next(stream)
    assert list(first) == [0, 1, 2, 3] and isinstance(scores.image, np.ndarray) and len(decoded) <= 8
    parts = [(first, scores), *stream]
    assert np.concatenate([part for part, _ in parts]).tolist() == list(range(N)) and len(parts[-1][0]) == 1
    image = np.concatenate([s.image for _, s in parts])
    color = DATA.images(range(N)).mean((1, 2)) / 255 * 2
    np.testing.assert_allclose(image, (color @ np.asarray(model.weight) - 1) ** 2, rtol=1e-4, atol=1e-5)
    assert calls[-1] == ("score", N, N) and len(calls) == 7
    np.testing.assert_allclose(score_all(TOY, model, FROZEN, DATA, batch_size=N).image, image, rtol=1e-5)


def test_scores_that_are_not_finite_name_the_image():
    data = photographs(3)
    with pytest.raises(ValueError, match=r"scores must be finite, got nan for array\[0\]"):
        score_all(TOY, ToyModel(jnp.full(3, jnp.nan), jnp.zeros(2)), FROZEN, data)

    def overflow(state, frozen, x):
        image = jnp.arange(len(x["color"]), dtype=jnp.float32)
        return Scores(image, jnp.zeros((len(image), 2, 2)).at[:, 1, 0].set(jnp.where(image == 1, jnp.inf, 0)))

    with pytest.raises(ValueError, match=r"scores must be finite, got inf for array\[1\]"):
        score_all(TOY._replace(score=overflow), ToyModel(jnp.zeros(3), jnp.zeros(2)), FROZEN, data)


def test_masks_and_labels_reach_the_method():
    seen = []

    def update(key, state, frozen, batch):
        jax.debug.callback(lambda *a: seen.append(a), batch.label, batch.index, batch.valid)
        return state, {}

    method = Method(mean_color, lambda key, frozen, spec: jnp.zeros(1), (Stage("look", update),), TOY.score)
    fit(method, FROZEN, photographs(5), KEY, batch_size=3)
    jax.effects_barrier()
    assert sorted(int(i) for _, index, valid in seen for i in index[valid]) == list(range(5))
    assert all((label == 0).all() for label, _, _ in seen)


CLASSES = [photographs(n, seed) for seed, n in enumerate((21, 9, 3))]
"""Of 5, 2 and 1 steps an epoch; the last has fewer images than a batch."""


@pytest.mark.parametrize("shape", [None, (1, 8), (2, 4), (8, 1)])
@pytest.mark.parametrize("steps", [None, 2])
def test_gradient_steps_of_several_classes_are_those_of_each(shape, steps):
    mesh = None if shape is None else jaxad.make_mesh(shape=shape)
    together = fit_classes(TOY, FROZEN, CLASSES, KEY, mesh=mesh, classes_per_step=steps)
    assert together.state.weight.shape == (3, 3) and together.metrics["loss"].shape == (3, 15)
    parts = [[], [], []]
    for c, index, scores in score_classes(TOY, together.state, FROZEN, CLASSES, mesh=mesh, classes_per_step=steps):
        parts[c].append((index, scores.image))
    for c, data in enumerate(CLASSES):
        alone = fit(TOY, FROZEN, data, KEY)
        own = class_state(TOY, FROZEN, together.state, c, data)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), own, alone.state)
        loss = together.metrics["loss"][c]
        assert np.isnan(loss[len(alone.metrics["loss"]) :]).all()
        np.testing.assert_allclose(loss[: len(alone.metrics["loss"])], alone.metrics["loss"], rtol=1e-4, atol=1e-6)
        assert np.concatenate([index for index, _ in parts[c]]).tolist() == list(range(len(data)))
        image = np.concatenate([image for _, image in parts[c]])
        np.testing.assert_allclose(image, score_all(TOY, alone.state, FROZEN, data).image, rtol=1e-4, atol=1e-5)


def test_gradients_of_a_batch_that_devices_share():
    method = toy(batch_size=8)
    alone = fit(method, FROZEN, photographs(32), KEY).state
    shared = fit(method, FROZEN, photographs(32), KEY, mesh=jaxad.make_mesh("data")).state
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), shared, alone)


def test_a_key_for_each_class_is_a_sweep_over_seeds():
    keys = jax.random.split(KEY, 3)
    together = fit_classes(TOY, FROZEN, [DATA] * 3, keys)
    for c in range(3):
        alone = fit(TOY, FROZEN, DATA, keys[c]).state
        np.testing.assert_allclose(together.state.weight[c], alone.weight, rtol=1e-5, atol=1e-6)
        assert_equal(together.state.noise[c], alone.noise)


def test_classes_are_decoded_once(decoded):
    cache = EmbeddingCache()
    state = fit_classes(TOY, FROZEN, CLASSES, KEY, cache=cache).state
    list(score_classes(TOY, state, FROZEN, CLASSES, cache=cache))
    assert len(decoded) == 21 + 9 + 3
    fit_classes(TOY, FROZEN, CLASSES[1:], KEY, cache=cache)
    assert len(decoded) == 21 + 9 + 3


def test_an_empty_class_is_scored_as_nothing():
    state = fit_classes(TOY, FROZEN, CLASSES, KEY).state
    some = [CLASSES[0], CLASSES[1].subset([]), CLASSES[2]]
    assert {c for c, _, _ in score_classes(TOY, state, FROZEN, some)} == {0, 2}
    assert list(score_classes(TOY, state, FROZEN, [CLASSES[0].subset([])] * 3)) == []


def test_classes_that_do_not_fit_together():
    other = open_data(np.zeros((3, 4, 4, 3), np.uint8), preprocess=Preprocess(None))["arrays"].train
    with pytest.raises(ValueError, match="images of one size and a key each, got 2 with"):
        fit_classes(TOY, FROZEN, [DATA, other], KEY)
    with pytest.raises(ValueError, match="images of one size and a key each, got 2 with"):
        fit_classes(TOY, FROZEN, [DATA, DATA], jax.random.split(KEY, 3))
    with pytest.raises(ValueError, match="at least one normal image, got none of"):
        fit_classes(TOY, FROZEN, [DATA, DATA.subset([])], KEY)


def test_the_loss_of_a_class_that_is_not_finite_names_it():
    images = {"fine": np.zeros((9, 6, 5, 3), np.uint8), "wild": np.full((9, 6, 5, 3), 255, np.uint8)}
    data = [split.train for split in open_data(images, preprocess=Preprocess(None)).values()]
    with pytest.raises(NonFiniteLoss, match=r"in stage train of wild, epoch \d+, step \d+: "):
        fit_classes(toy(rate=1e30), FROZEN, data, KEY)


@pytest.mark.parametrize("calls", [2, 5, 7, 8, 12])
@pytest.mark.parametrize("steps", [None, 2])
def test_classes_that_were_stopped_resume_bit_for_bit(calls, steps, tmp_path):
    options = dict(classes_per_step=steps, batch_size=8)
    whole = fit_classes(TOY, FROZEN, CLASSES, KEY, **options).state
    options |= dict(checkpoint_dir=tmp_path, checkpoint_seconds=0)
    stopped = stopping_after(calls)
    try:
        fit_classes(TOY, FROZEN, CLASSES, KEY, progress=stopped, **options)
    except Stop:
        assert any(tmp_path.rglob("*"))
    assert_equal(fit_classes(TOY, FROZEN, CLASSES, KEY, **options).state, whole)


def test_a_checkpoint_goes_on_on_other_devices(tmp_path):
    """Eight devices take up what one began."""
    whole = fit(LONG, FROZEN, photographs(24), KEY, batch_size=8).state
    options = dict(batch_size=8, checkpoint_dir=tmp_path, checkpoint_seconds=0)
    with pytest.raises(Stop):
        fit(LONG, FROZEN, photographs(24), KEY, progress=stopping_after(8), **options)
    resumed = fit(LONG, FROZEN, photographs(24), KEY, mesh=jaxad.make_mesh("data"), **options).state
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), resumed, whole)


MESHES = {
    "another name": (("class", "model"), None, 'must be "class" and "data"'),
    "twice the same": (("data", "data"), None, 'must be "class" and "data"'),
    "too many devices": ((), (4, 4), r"8 together, got \(4, 4\)"),
    "a number missing": ((), (8,), r"got \(8,\)"),
}


@pytest.mark.parametrize("mistake", MESHES)
def test_meshes_that_cannot_be(mistake):
    axes, shape, words = MESHES[mistake]
    with pytest.raises(ValueError, match=words):
        jaxad.make_mesh(*axes, shape=shape)


def test_meshes():
    assert dict(jaxad.make_mesh().shape) == {"class": 1, "data": 8}
    assert dict(jaxad.make_mesh("data").shape) == {"data": 8}
    assert dict(jaxad.make_mesh("data", "class", shape=(2, 2)).shape) == {"data": 2, "class": 2}
    assert [mesh_shape(8, classes) for classes in (1, 3, 4, 15)] == [(1, 8), (2, 4), (4, 2), (8, 1)]
    assert mesh_shape(6, 4) == (3, 2)


class Stop(Exception):
    pass


def stopping_after(calls):
    """A progress callback that raises at that call."""
    count = iter(range(calls))

    def progress(what, done, total):
        if next(count, None) is None:
            raise Stop

    return progress


@pytest.fixture(scope="module")
def uninterrupted():
    return fit(TOY, FROZEN, DATA, KEY, batch_size=8).state


@pytest.mark.parametrize("calls", range(1, 9))
def test_a_run_that_was_stopped_resumes_bit_for_bit(calls, tmp_path, uninterrupted):
    options = dict(batch_size=8, checkpoint_dir=tmp_path / "run", checkpoint_seconds=0)
    with pytest.raises(Stop):
        fit(TOY, FROZEN, DATA, KEY, progress=stopping_after(calls), **options)
    assert_equal(fit(TOY, FROZEN, DATA, KEY, **options).state, uninterrupted)


def test_resuming_does_not_start_over(tmp_path, decoded, uninterrupted):
    options = dict(batch_size=8, checkpoint_dir=tmp_path, checkpoint_seconds=0)
    with pytest.raises(Stop):
        fit(TOY, FROZEN, DATA, KEY, progress=stopping_after(7), **options)
    resumed = fit(TOY, FROZEN, DATA, KEY, **options)
    assert 0 < len(resumed.metrics["loss"]) < 15
    decoded.clear()
    finished = fit(TOY, FROZEN, DATA, KEY, **options)
    assert_equal(finished.state, uninterrupted)
    assert not decoded and finished.metrics == {}


def test_resuming_in_the_middle_of_an_epoch(tmp_path, monkeypatch, uninterrupted):
    monkeypatch.setattr(module, "chunk", lambda: 2)
    options = dict(batch_size=8, checkpoint_dir=tmp_path, checkpoint_seconds=0)
    for calls, saved in ((8, 4), (3, 8), (2, 10)):
        with pytest.raises(Stop):
            fit(TOY, FROZEN, DATA, KEY, progress=stopping_after(calls), **options)
        assert sorted(int(path.name) % Saver.STRIDE for path in tmp_path.iterdir()) == [saved - 2, saved]
    assert_equal(fit(TOY, FROZEN, DATA, KEY, **options).state, uninterrupted)


def test_checkpoints_wait_their_time(tmp_path):
    fit(TOY, FROZEN, DATA, KEY, checkpoint_dir=tmp_path, checkpoint_seconds=1e6)
    assert not any(tmp_path.iterdir())


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    """Of gradient descent two: the newest may turn out to be broken."""
    fit(TOY, FROZEN, DATA, KEY, checkpoint_dir=tmp_path, checkpoint_seconds=0)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_checkpoint_of_another_fit_is_refused(tmp_path):
    options = dict(checkpoint_dir=tmp_path, checkpoint_seconds=0)
    fit(TOY, FROZEN, DATA, KEY, **options)
    for method, data, key in ((TOY, DATA, jax.random.key(8)), (TOY, photographs(9), KEY)):
        with pytest.raises(ValueError, match=f"same fit .*: delete {tmp_path}"):
            fit(method, FROZEN, data, key, **options)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    inits = (lambda key, frozen, spec, n=n: jnp.zeros(n) for n in (2, 3))
    method, other = (Method(mean_color, init, (Stage("keep", keep),), TOY.score) for init in inits)
    options = dict(checkpoint_dir=tmp_path, checkpoint_seconds=0)
    fit(method, FROZEN, DATA, KEY, **options)
    with pytest.raises(ValueError, match=f"damaged or of another method: delete {tmp_path}"):
        fit(other, FROZEN, DATA, KEY, **options)


def keep(key, state, frozen, batch):
    return state, {}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax abandons tasks that failed
def test_a_damaged_checkpoint_is_one_clear_error(tmp_path):
    options = dict(checkpoint_dir=tmp_path, checkpoint_seconds=0)
    fit(TOY, FROZEN, DATA, KEY, **options)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    contents = {path: path.read_bytes() for path in files}
    model = fit(TOY, FROZEN, DATA, KEY).state
    refused = 0
    for damaged in files:
        damaged.write_bytes(contents[damaged][: len(contents[damaged]) // 2])
        try:
            assert_equal(fit(TOY, FROZEN, DATA, KEY, **options).state, model)  # a file that does not matter
        except ValueError as error:
            assert f"delete {tmp_path}" in str(error)
            refused += 1
        for path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents[path])
    gc.collect()  # the abandoned tasks, while they are expected
    assert refused >= 2


CHILD = """
import os, random, signal, sys, threading
import jax
from tests.test_fit import DATA, FROZEN, KEY, LONG
from jaxad.driver.fit import fit

directory, seconds = sys.argv[1], float(sys.argv[2])
timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL))

def progress(what, done, total):
    if what == "train" and not timer.is_alive():
        timer.start()

fit(LONG, FROZEN, DATA, KEY, batch_size=8, checkpoint_dir=directory, checkpoint_seconds=0, progress=progress)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    """Killed at some moment of stepping or saving, twice over, then finished here."""
    whole = fit(LONG, FROZEN, DATA, KEY, batch_size=8).state
    for seconds in np.random.default_rng().uniform(0.05, 0.6, 2):
        command = [sys.executable, "-c", CHILD, str(tmp_path / "run"), str(seconds)]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert child.returncode == -signal.SIGKILL, child.stderr
    assert any((tmp_path / "run").iterdir())
    resumed = fit(LONG, FROZEN, DATA, KEY, batch_size=8, checkpoint_dir=tmp_path / "run", checkpoint_seconds=0)
    assert_equal(resumed.state, whole)


def test_a_real_method_through_the_driver(tmp_path):
    """PaDiM's streamed state from 5 batches is that from one; checkpoints do not touch it."""
    from jaxad.backbones import backbone

    frozen = backbone("pdn_small").init(KEY)
    method = padim(backbone="pdn_small", layers=("layer1",), image_size=(32, 32), n_features=4)
    images = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)
    data = open_data(images, preprocess=Preprocess(None))["arrays"].train
    small = fit(method, frozen, data, KEY, batch_size=2, checkpoint_dir=tmp_path, checkpoint_seconds=0).state
    again = fit(method, frozen, data, KEY, batch_size=2, checkpoint_dir=tmp_path).state
    whole = fit(method, frozen, data, KEY, batch_size=9).state
    assert_equal(small, again)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), small, whole)
