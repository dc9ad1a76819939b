"""Several real processes of two CPU devices each: the results of one process, and what becomes of a killed one."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from jaxad import files
from jaxad.backbones import backbone

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
COUNTS = {"bolt": 12, "nut": 7}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two categories of unequal size, in the MVTec layout."""
    root = tmp_path_factory.mktemp("data") / "parts"
    rng = np.random.default_rng(0)
    for category, n in COUNTS.items():
        parts = {"train/good": n, "test/good": 3, "test/scratch": 3}
        for part, count in parts.items():
            (root / category / part).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(90, 160, (64, 64, 3), dtype=np.uint8)
                if part == "test/scratch":
                    pixels[10:30, 20:40] = 255
                Image.fromarray(pixels).save(root / category / part / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    path = tmp_path_factory.mktemp("weights") / "pdn_small.safetensors"
    modules = backbone("pdn_small").init(jax.random.key(0))["params"]
    tensors = {f"{name}.{leaf}": np.asarray(leaves[leaf]) for name, leaves in modules.items() for leaf in leaves}
    safetensors.numpy.save_file(tensors, path)
    return ("--backbone", "pdn_small", "--weights", str(path), "--image-size", "64")


def start(processes: int, command: Sequence[str]) -> list[subprocess.Popen]:
    """One command in several processes that know of each other, or in one that is alone."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    several = ["--distributed", "--coordinator", f"localhost:{port}", "--num-processes", str(processes)]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    commands = [
        [sys.executable, "-m", "jaxad", *command, *([*several, "--process-id", str(i)] if processes > 1 else [])]
        for i in range(processes)
    ]
    return [subprocess.Popen(one, **streams) for one in commands]


def finish(started: Sequence[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    outputs = [process.communicate(timeout=240) for process in started]
    return [(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]


def done(started: Sequence[subprocess.Popen]) -> list[tuple[int, str, str]]:
    results = finish(started)
    assert [code for code, _, _ in results] == [0] * len(results), results
    return results


@pytest.fixture(scope="module")
def alone(source: Path, options: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes."""
    output = tmp_path_factory.mktemp("alone")
    done(start(1, benchmark(source, options, output)))
    return output


def benchmark(source: Path, options: Sequence[str], output: Path) -> list[str]:
    methods = ["--methods", "patchcore", "padim", "--batch-size", "4"]
    return ["benchmark", str(source), *methods, *options, "--output", str(output)]


def metrics_below(output: Path) -> dict[str, dict]:
    return {str(path.relative_to(output)): files.read_json(path)["metrics"] for path in output.rglob("metrics.json")}


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_are_one(source: Path, options, alone: Path, tmp_path: Path, processes: int):
    first, *others = done(start(processes, benchmark(source, options, tmp_path)))
    assert "Mean" in first[1] and all(out == err == "" for _, out, err in others)
    found, wanted = metrics_below(tmp_path), metrics_below(alone)
    assert len(found) == 4 and found.keys() == wanted.keys()
    for name, metrics in wanted.items():
        assert found[name] == pytest.approx(metrics, abs=1e-6)
    for model in alone.rglob("model.safetensors"):
        one = safetensors.numpy.load_file(model)
        several = safetensors.numpy.load_file(tmp_path / model.relative_to(alone))
        assert one.keys() == several.keys()
        for name, leaf in one.items():
            np.testing.assert_allclose(several[name], leaf, rtol=1e-4, atol=1e-4)


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("killed", [1, 0])
def test_a_killed_process_ends_the_job_and_the_rerun_resumes(source: Path, options, tmp_path: Path, killed: int):
    output = tmp_path / "killed"
    command = ["fit", str(source), "--category", "bolt", *options, "--batch-size", "1", "--checkpoint-seconds", "0"]
    done(start(2, [*command, "--output", str(tmp_path / "whole")]))
    run_dir = output / "patchcore" / "parts" / "bolt"
    started = start(2, [*command, "--output", str(output)])
    wait_for(lambda: any(path.name.isdigit() for path in (run_dir / "checkpoint" / "state").glob("*")))
    started[killed].send_signal(signal.SIGKILL)
    results = finish(started)
    assert results[killed][0] == -signal.SIGKILL
    code, out, err = results[1 - killed]
    assert code == 3 and out == ""
    assert err.splitlines()[-1].startswith("jaxad: error: lost contact with another process: start the same command")
    assert not (run_dir / "model.json").exists()
    first, _ = done(start(2, [*command, "--output", str(output)]))
    assert "resuming from" in first[2]
    whole = safetensors.numpy.load_file(tmp_path / "whole" / "patchcore" / "parts" / "bolt" / "model.safetensors")
    resumed = safetensors.numpy.load_file(run_dir / "model.safetensors")
    for name, leaf in whole.items():
        np.testing.assert_array_equal(resumed[name], leaf)
    assert not (run_dir / "checkpoint").exists()
    shutil.rmtree(output)


MISTAKES = {
    "a part of the three": (
        ["--num-processes", "2"],
        "--coordinator, --num-processes and --process-id belong together",
    ),
    "no port": (["--coordinator", "host", "--num-processes", "2", "--process-id", "0"], "must be HOST:PORT"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(source: Path, mistake: str):
    arguments, words = MISTAKES[mistake]
    [process] = start(1, ["fit", str(source), "--distributed", *arguments])
    [(code, out, err)] = finish([process])
    assert code == 2 and out == "" and words in err and len(err.splitlines()) == 1


def test_a_port_in_use_is_one_line(source: Path):
    with socket.create_server(("", 0)) as taken:
        several = ["--coordinator", f"localhost:{taken.getsockname()[1]}", "--num-processes", "2", "--process-id", "0"]
        [(code, out, err)] = finish(start(1, ["fit", str(source), "--distributed", *several]))
    assert code == 2 and out == "" and "must be free" in err and len(err.splitlines()) == 1
