"""Fitting one class: the driver's steps, with a toy method whose every number a hand-written loop gives as well."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.base import Auxiliary, Batch, Method, Stage
from jaxad.data import Preprocess, open_data
from jaxad.driver import program, schedule
from jaxad.driver.execution import Execution
from jaxad.driver.fit import fit, states
from jaxad.driver.record import NonFiniteLoss
from jaxad.driver.schedule import Schedule
from jaxad.driver.scoring import score_all
from jaxad.methods import padim
from tests.driver.toy import (
    CLASSES,
    DATA,
    FROZEN,
    KEY,
    TOY,
    N,
    ToyModel,
    ToyState,
    assert_equal,
    carry_on,
    execution,
    mean_color,
    photographs,
    toy,
)


@pytest.fixture
def chunks(monkeypatch):
    """The arguments of all chunks: the number of the first step, and the stacked batches of the only class."""
    seen = []
    call = program.Program.__call__

    def spy(self, *args):
        if isinstance(args[0], ToyState):
            _, _, _, batches, _, _, steps = args
            seen.append((int(steps[0]), jax.tree.map(lambda leaf: np.asarray(leaf)[0], batches)))
        return call(self, *args)

    monkeypatch.setattr(program.Program, "__call__", spy)
    return seen


def plain_loop(method, data, key, chosen):
    """The driver's result for the batches that it chose, from a plain loop."""
    x = mean_color(FROZEN, jnp.asarray(data.images(range(len(data)))))
    state = method.stages[0].init(jax.random.fold_in(key, 0), None, FROZEN, x)
    stage_key = jax.random.fold_in(key, 2)
    update = jax.jit(method.stages[1].update)
    for step, index in enumerate(chosen):
        batch = Batch(
            jax.tree.map(lambda leaf, i=index: leaf[i], x),
            jnp.ones(len(index), bool),
            jnp.zeros(len(index), jnp.int32),
            None,
            jnp.asarray(index, jnp.int32),
        )
        state, _ = update(jax.random.fold_in(stage_key, step), state, FROZEN, batch)
    return method.stages[1].finalize(jax.random.fold_in(stage_key, 1 << 30), state, FROZEN)


def test_equals_a_loop_over_shuffled_full_batches(chunks):
    fitted = fit(TOY, FROZEN, DATA, KEY, execution(batch_size=8))
    trained = [batches for _, batches in chunks if batches.valid.shape[1] == 4]
    assert all(batches.valid.all() for batches in trained)
    chosen = np.concatenate([batches.index for batches in trained])
    assert chosen.shape == (3 * 5, 4)
    epochs = chosen.reshape(3, 20)
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    np.testing.assert_allclose(fitted.state.weight, plain_loop(TOY, DATA, KEY, chosen).weight, rtol=1e-5)
    assert_equal(fitted.state.noise, plain_loop(TOY, DATA, KEY, chosen[:0]).noise)
    assert fitted.metrics["loss"].shape == (15,) and (fitted.metrics["valid"] == 4).all()


def test_steps_in_chunks(chunks, monkeypatch):
    monkeypatch.setattr(schedule, "chunk_steps", lambda: 8)
    whole = fit(TOY, FROZEN, DATA, KEY).state
    assert [(step, len(batches.valid)) for step, batches in chunks] == [(0, 1), (1, 1), (0, 8), (8, 7)]
    monkeypatch.setattr(schedule, "chunk_steps", lambda: 2)
    chunks.clear()
    shorter = fit(TOY, FROZEN, DATA, KEY).state
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), shorter, whole)
    assert [(step, len(batches.valid)) for step, batches in chunks[2:5]] == [(0, 2), (2, 2), (4, 2)]


def test_the_device_has_the_next_chunk_while_the_host_reads_the_loss_of_one(chunks, tmp_path):
    def chunks_before_first_loss(**options) -> int:
        """How many chunks of training were submitted before the progress of the first was reported."""
        submitted, before = [], len(chunks)

        def progress(part, done, total):
            if part == "train" and done:
                submitted.append(len(chunks) - before - 2)  # less those of counting

        fit(TOY, FROZEN, DATA, KEY, execution(progress=progress, **options))
        return submitted[0]

    assert chunks_before_first_loss() == 2
    assert chunks_before_first_loss(checkpoint_dir=tmp_path, checkpoint_seconds=0) == 1, (
        "a loss must be known before its state is saved"
    )


@pytest.mark.parametrize(("batch_size", "steps"), [(5, 5), (21, 1), (40, 1)])
def test_without_shuffling_every_image_counts_once_an_epoch(chunks, batch_size, steps):
    fitted = fit(toy(epochs=2, batch_size=None, shuffle=False), FROZEN, DATA, KEY, execution(batch_size=batch_size))
    assert fitted.metrics["valid"].sum() == 2 * N and len(fitted.metrics["valid"]) == 2 * steps
    index = np.concatenate([batches.index[batches.valid] for _, batches in chunks])
    np.testing.assert_array_equal(index, np.tile(np.arange(N), 3))


def test_shuffling_fewer_images_than_a_batch():
    """They come several times, all of them about equally often."""
    fitted = fit(toy(epochs=2, batch_size=50), FROZEN, photographs(7), KEY)
    np.testing.assert_array_equal(fitted.metrics["valid"], [50, 50])


def test_the_embedding_batch_size_does_not_matter():
    assert_equal(
        fit(TOY, FROZEN, DATA, KEY, execution(batch_size=8)).state,
        fit(TOY, FROZEN, DATA, KEY, execution(batch_size=3)).state,
    )


def test_the_key_decides():
    model, again, other = (fit(TOY, FROZEN, DATA, key).state for key in (KEY, KEY, jax.random.key(4)))
    assert_equal(again, model)
    assert not np.array_equal(other.weight, model.weight)


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
    fit(TOY, FROZEN, DATA, KEY, execution(batch_size=8, progress=lambda *call: calls.append(call)))
    for stage, total in (("count", N), ("train", 3 * N)):
        done = [d for name, d, t in calls if name == stage and t == total]
        assert done == sorted(done) and done[-1] == total and len(done) > 2
    assert {name for name, _, _ in calls} == {"count", "finish count", "train", "finish train"}


def test_compile_time_is_measured_apart():
    first = fit(toy(), FROZEN, DATA, KEY)
    assert first.compile_seconds > 0 and first.run_seconds > 0
    method = toy()
    fit(method, FROZEN, DATA, KEY)
    again = fit(method, FROZEN, DATA, KEY)
    assert again.compile_seconds < first.compile_seconds


def test_masks_and_labels_reach_the_method():
    seen = []

    def update(key, state, frozen, batch):
        jax.debug.callback(lambda *a: seen.append(a), batch.label, batch.index, batch.valid)
        return state, {}

    stage = Stage("observe", lambda key, state, frozen, spec: jnp.zeros(1), update)
    method = Method(mean_color, (stage,), TOY.score)
    fit(method, FROZEN, photographs(5), KEY, execution(batch_size=3))
    jax.effects_barrier()
    assert sorted(int(i) for _, index, valid in seen for i in index[valid]) == list(range(5))
    assert all((label == 0).all() for label, _, _ in seen)


def test_a_real_method_through_the_driver(tmp_path):
    """PaDiM's streamed state from 5 batches is that from one; checkpoints do not touch it."""
    from jaxad.backbones import backbone

    frozen = backbone("pdn_small").init(KEY)
    method = padim(backbone="pdn_small", layers=("layer1",), image_size=(32, 32), n_features=4)
    images = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)
    data = open_data(images, preprocess=Preprocess(None))["arrays"].train
    small = fit(method, frozen, data, KEY, execution(batch_size=2, checkpoint_dir=tmp_path, checkpoint_seconds=0)).state
    again = fit(method, frozen, data, KEY, execution(batch_size=2, checkpoint_dir=tmp_path)).state
    whole = fit(method, frozen, data, KEY, execution(batch_size=9)).state
    assert_equal(small, again)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), small, whole)


@pytest.mark.parametrize("sizes", [(3,), (4,), (9,), (3, 4, 21), (1, 8)])
def test_a_stage_that_shuffles_is_given_full_batches_of_real_images(sizes):
    """Of classes smaller than, equal to and larger than a batch; every image of an epoch is another one, if it can."""
    stage = Stage("train", carry_on, TOY.stages[1].update, epochs=2, batch_size=4, shuffle=True)
    plan = Schedule(stage, sizes, jax.random.split(KEY, len(sizes)), batch_size=16, shards=1)
    for step in range(plan.total):
        index, valid = plan.block(step)
        assert index.shape == valid.shape == (len(sizes), 1, 4)
        for c, size in enumerate(sizes):
            assert (index[c] < size).all()
            if step < plan.steps[c]:
                assert valid[c].all()
                assert len(set(index[c, 0].tolist())) == min(4, size)
            else:
                assert not valid[c].any()  # the driver keeps the state of a class whose steps are over
    assert plan.steps.tolist() == [2 * max(1, size // 4) for size in sizes]


def test_a_stage_that_does_not_shuffle_marks_the_padding_of_its_last_batch():
    plan = Schedule(TOY.stages[0], (5, 2), jax.random.split(KEY, 2), batch_size=4, shards=2)
    blocks = [plan.block(step) for step in range(plan.total)]
    assert [valid[0].sum() for _, valid in blocks] == [4, 1] and [valid[1].sum() for _, valid in blocks] == [2, 0]
    assert np.concatenate([index[0][valid[0]] for index, valid in blocks]).tolist() == list(range(5))


def test_the_driver_is_an_iterator_of_states():
    """Every state on the way can be read; the last one is the fitted one."""
    weights, snapshots = [], []
    for snapshot in states(TOY, FROZEN, CLASSES, KEY):
        snapshots.append(snapshot)
        if snapshot.stage.name == "train" and not snapshot.finished:
            weights.append(np.asarray(snapshot.state.weight))
    trained = [s for s in snapshots if s.stage.name == "train" and not s.finished]
    assert [s.steps for s in trained] == list(range(1, 16))
    assert [s.epochs for s in trained] == [step // 5 for step in range(1, 16)]
    assert [s.stage.name for s in snapshots if s.finished] == ["count", "train"]
    assert isinstance(snapshots[-1].state, ToyModel)
    np.testing.assert_array_equal(weights[-1], snapshots[-1].state.weight)
    assert len({w.tobytes() for w in weights}) == 15
    first = [w[1] for w in weights[:5]]  # the second class has 2 steps an epoch, 6 in all
    assert not np.array_equal(first[0], first[-1]) and np.array_equal(weights[5][1], weights[-1][1])


def test_auxiliary_photographs_reach_the_methods_that_ask_for_them():
    def update(key, state, frozen, batch):
        return jnp.full((), -1.0) if batch.auxiliary is None else batch.auxiliary.astype(jnp.float32).sum(), {}

    stage = Stage("sum", lambda key, state, frozen, spec: jnp.zeros(()), update)
    method, two = Method(mean_color, (stage,), TOY.score), np.full((2, 3, 3, 3), 2, np.uint8)
    assert fit(method, FROZEN, DATA, KEY, auxiliary=two).state == -1
    asking = method._replace(auxiliary=Auxiliary())
    assert fit(asking, FROZEN, DATA, KEY, auxiliary=two).state == float(two.sum())
    assert fit(asking, FROZEN, DATA, KEY).state == -1
    with pytest.raises(ValueError, match="photographs of other things too: give them as auxiliary"):
        fit(method._replace(auxiliary=Auxiliary(needed=True)), FROZEN, DATA, KEY)


def test_a_stage_begins_with_what_the_one_before_left_and_sees_the_size_of_the_training_set():
    def begin(key, state, frozen, spec):
        return {"before": state, "images": jnp.int32(spec["color"].shape[0]), "draw": jax.random.normal(key)}

    def keep(key, state, frozen, batch):
        return state, {}

    stages = tuple(Stage(name, begin, keep, lambda key, state, frozen: state["images"]) for name in ("one", "two"))
    last = stages[1]._replace(finalize=lambda key, state, frozen: state)
    state = fit(Method(mean_color, (stages[0], last), TOY.score), FROZEN, DATA, KEY, Execution(batch_size=4)).state
    assert (state["before"], state["images"]) == (N, N)
    finish = jax.random.fold_in(jax.random.fold_in(KEY, 1), 1 << 30)
    np.testing.assert_array_equal(state["draw"], jax.random.normal(jax.random.fold_in(finish, 1)))
