"""A fit that was stopped or killed resumes with the same result."""

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxad
from jaxad.base import Method, Stage
from jaxad.driver import schedule
from jaxad.driver.checkpoint import Saver
from jaxad.driver.execution import Checkpoint
from jaxad.driver.fit import fit, fit_classes
from tests.driver.toy import (
    CLASSES,
    DATA,
    FROZEN,
    KEY,
    LONG,
    TOY,
    Stop,
    assert_equal,
    execution,
    mean_color,
    photographs,
    stopping_after,
)
from tests.examples import slow_after


def states_in(directory: Path) -> list[Path]:
    """The checkpoints of the only group of classes."""
    return list((directory / "classes_0").iterdir())


@pytest.mark.parametrize(("calls", "steps"), slow_after(1, [(8, 2), (2, None), (5, 2), (7, None), (12, 2)]))
def test_classes_that_were_stopped_resume_bit_for_bit(calls, steps, tmp_path):
    options = dict(classes_per_step=steps, batch_size=8)
    whole = fit_classes(TOY, FROZEN, CLASSES, KEY, execution(**options)).state
    options |= dict(checkpoint_dir=tmp_path, checkpoint_seconds=0)
    stopped = stopping_after(calls)
    try:
        fit_classes(TOY, FROZEN, CLASSES, KEY, execution(progress=stopped, **options))
    except Stop:
        assert any(tmp_path.rglob("*"))
    assert_equal(fit_classes(TOY, FROZEN, CLASSES, KEY, execution(**options)).state, whole)


@pytest.mark.slow
def test_a_fit_resumes_on_other_devices(tmp_path):
    """Eight devices continue what one began."""
    whole = fit(LONG, FROZEN, photographs(24), KEY, execution(batch_size=8)).state
    options = dict(batch_size=8, checkpoint_dir=tmp_path, checkpoint_seconds=0)
    with pytest.raises(Stop):
        fit(LONG, FROZEN, photographs(24), KEY, execution(progress=stopping_after(8), **options))
    resumed = fit(LONG, FROZEN, photographs(24), KEY, execution(mesh=jaxad.make_mesh("data"), **options)).state
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), resumed, whole)


@pytest.fixture(scope="module")
def uninterrupted():
    return fit(TOY, FROZEN, DATA, KEY, execution(batch_size=8)).state


@pytest.mark.parametrize("calls", slow_after(2, [2, 7, 1, 3, 4, 5, 6, 8]))
def test_a_run_that_was_stopped_resumes_bit_for_bit(calls, tmp_path, uninterrupted):
    options = dict(batch_size=8, checkpoint_dir=tmp_path / "run", checkpoint_seconds=0)
    with pytest.raises(Stop):
        fit(TOY, FROZEN, DATA, KEY, execution(progress=stopping_after(calls), **options))
    assert_equal(fit(TOY, FROZEN, DATA, KEY, execution(**options)).state, uninterrupted)


def test_resuming_does_not_start_over(tmp_path, decoded, uninterrupted):
    options = dict(batch_size=8, checkpoint_dir=tmp_path, checkpoint_seconds=0)
    with pytest.raises(Stop):
        fit(TOY, FROZEN, DATA, KEY, execution(progress=stopping_after(7), **options))
    resumed = fit(TOY, FROZEN, DATA, KEY, execution(**options))
    assert 0 < len(resumed.metrics["loss"]) < 15
    decoded.clear()
    finished = fit(TOY, FROZEN, DATA, KEY, execution(**options))
    assert_equal(finished.state, uninterrupted)
    assert not decoded and finished.metrics == {}


def test_resuming_in_the_middle_of_an_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "chunk_steps", lambda: 2)
    uninterrupted = fit(TOY, FROZEN, DATA, KEY, execution(batch_size=8)).state
    options = dict(batch_size=8, checkpoint_dir=tmp_path, checkpoint_seconds=0)
    for calls, saved in ((8, 4), (3, 8), (2, 10)):
        with pytest.raises(Stop):
            fit(TOY, FROZEN, DATA, KEY, execution(progress=stopping_after(calls), **options))
        assert sorted(int(path.name) % Saver.STRIDE for path in states_in(tmp_path)) == [saved - 2, saved]
    assert_equal(fit(TOY, FROZEN, DATA, KEY, execution(**options)).state, uninterrupted)


def test_checkpoints_are_not_saved_before_their_time(tmp_path):
    fit(TOY, FROZEN, DATA, KEY, execution(checkpoint_dir=tmp_path, checkpoint_seconds=1e6))
    assert not states_in(tmp_path)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    """Of gradient descent two: the newest may turn out to be broken."""
    fit(TOY, FROZEN, DATA, KEY, execution(checkpoint_dir=tmp_path, checkpoint_seconds=0))
    assert len(states_in(tmp_path)) == 2


def test_a_checkpoint_of_another_fit_is_refused(tmp_path):
    options = dict(checkpoint_dir=tmp_path, checkpoint_seconds=0)
    fit(TOY, FROZEN, DATA, KEY, execution(**options))
    for method, data, key in ((TOY, DATA, jax.random.key(8)), (TOY, photographs(9), KEY)):
        with pytest.raises(ValueError, match=f"same fit .*: delete {tmp_path}/classes_0"):
            fit(method, FROZEN, data, key, execution(**options))


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    inits = (lambda key, state, frozen, spec, n=n: jnp.zeros(n) for n in (2, 3))
    method, other = (Method(mean_color, (Stage("keep", init, keep),), TOY.score) for init in inits)
    options = dict(checkpoint_dir=tmp_path, checkpoint_seconds=0)
    fit(method, FROZEN, DATA, KEY, execution(**options))
    with pytest.raises(ValueError, match=f"damaged or of another method: delete {tmp_path}/classes_0"):
        fit(other, FROZEN, DATA, KEY, execution(**options))


def keep(key, state, frozen, batch):
    return state, {}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax abandons tasks that failed
def test_a_damaged_checkpoint_is_one_clear_error(tmp_path):
    options = dict(checkpoint_dir=tmp_path, checkpoint_seconds=0)
    fit(TOY, FROZEN, DATA, KEY, execution(**options))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    contents = {path: path.read_bytes() for path in files}
    model = fit(TOY, FROZEN, DATA, KEY).state
    refused = 0
    for damaged in files:
        damaged.write_bytes(contents[damaged][: len(contents[damaged]) // 2])
        try:
            assert_equal(fit(TOY, FROZEN, DATA, KEY, execution(**options)).state, model)  # a file that is not needed
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
from tests.driver.toy import DATA, FROZEN, KEY, LONG, execution
from jaxad.driver.fit import fit

directory, seconds = sys.argv[1], float(sys.argv[2])
timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL))

def progress(part, done, total):
    if part == "train" and not timer.is_alive():
        timer.start()

options = execution(batch_size=8, checkpoint_dir=directory, checkpoint_seconds=0, progress=progress)
fit(LONG, FROZEN, DATA, KEY, options)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    """Killed at some moment of stepping or saving, twice over, then finished here."""
    whole = fit(LONG, FROZEN, DATA, KEY, execution(batch_size=8)).state
    for seconds in np.random.default_rng().uniform(0.05, 0.6, 2):
        command = [sys.executable, "-c", CHILD, str(tmp_path / "run"), str(seconds)]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert child.returncode == -signal.SIGKILL, child.stderr
    assert any((tmp_path / "run").iterdir())
    resumed = fit(
        LONG, FROZEN, DATA, KEY, execution(batch_size=8, checkpoint_dir=tmp_path / "run", checkpoint_seconds=0)
    )
    assert_equal(resumed.state, whole)


@pytest.mark.slow
def test_a_full_disk_is_one_error_and_the_last_checkpoint_stays(tmp_path):
    program = (
        "import logging, resource, sys, numpy as np; from jaxad.driver.checkpoint import Saver\n"
        "from jaxad.driver.execution import Checkpoint\n"
        "logging.getLogger('absl').setLevel(logging.CRITICAL)\n"
        "try:\n"
        "    with Saver(Checkpoint(sys.argv[1], 0.0), {}) as saver:\n"
        "        saver.save(0, 1, {'x': np.ones(100)})\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "        saver.save(0, 2, {'x': np.random.rand(100_000)})\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(jaxad.__file__).parents[1], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"cannot save a checkpoint in {tmp_path} (") and "File too large" in done.stdout
    assert done.stderr == ""
    with Saver(Checkpoint(tmp_path, 0.0), {}) as saver:
        assert saver.restore(lambda stage: {"x": np.zeros(100)})[:2] == (0, 1)
