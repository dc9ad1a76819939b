"""Interruptions, kills and full disks: nothing half-written, and fits resume."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy

import jaxad
from jaxad import artifact, files
from jaxad.cli import main
from jaxad.runs import directory as rundir
from jaxad.runs import scoring
from tests.cli.images import MODEL, files_below, save_image
from tests.examples import slow_after


def test_a_full_disk_does_not_touch_the_old_run(
    flat_run: Path, photos: Path, backbone_options: tuple[str, ...], tmp_path: Path, monkeypatch, capsys
):
    run_dir = tmp_path / "patchcore" / "photos" / "photos"
    shutil.copytree(flat_run, run_dir)
    before = {name: (run_dir / name).read_bytes() for name in ("model.json", "model.safetensors", "threshold.json")}

    def full(tensors: dict, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise safetensors.SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(artifact, "save_file", full)
    assert main(["fit", str(photos), "--seed", "1", *backbone_options, "--output", str(tmp_path)]) == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert {name: (run_dir / name).read_bytes() for name in before} == before
    assert not list(run_dir.glob(".*.tmp"))


def test_an_interrupted_fit_resumes_and_others_do_not(
    photos: Path, backbone_options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    command = ["fit", str(photos), *backbone_options, "--output", str(tmp_path), "--checkpoint-seconds", "0"]
    run_dir = tmp_path / "patchcore" / "photos" / "photos"
    with monkeypatch.context() as patched:
        patched.setattr(jaxad.Detector, "save", interrupt)
        assert main(command) == 130
        assert capsys.readouterr().err.splitlines()[-1] == "jaxad: interrupted"
    assert (run_dir / "checkpoint").is_dir() and not (run_dir / "model.json").exists()
    shutil.copytree(run_dir, tmp_path / "copy")
    assert main(command) == 0
    assert f"resuming from {run_dir / 'checkpoint'}" in capsys.readouterr().err
    resumed = (run_dir / "model.safetensors").read_bytes()
    shutil.rmtree(run_dir)
    assert main(command) == 0
    assert (run_dir / "model.safetensors").read_bytes() == resumed
    shutil.rmtree(run_dir)
    shutil.copytree(tmp_path / "copy", run_dir)
    capsys.readouterr()
    assert main([*command, "--seed", "1"]) == 0
    assert "belongs to other settings or data: deleted" in capsys.readouterr().err
    assert files_below(run_dir) == MODEL


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_fit_killed_again_and_again_ends_with_the_same_model(
    mvtec: Path, backbone_options: tuple[str, ...], tmp_path: Path, seed: int
):
    """Five kills -9 or more at random moments of each of four fits, of one class and of two at once."""
    category = ("all", "bolt")[seed % 2]
    common = ["fit", str(mvtec), "--category", category, *backbone_options, "--batch-size", "1"]
    command = [sys.executable, "-m", "jaxad", *common, "--checkpoint-seconds", "0", "--output"]
    cached = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    streams = dict(stderr=subprocess.PIPE, text=True, env=os.environ | cached)
    for name in ("whole", "again"):  # the second time nothing is compiled
        started = time.monotonic()
        subprocess.run([*command, str(tmp_path / name)], check=True, **streams)
    usual, rng = time.monotonic() - started, np.random.default_rng()
    output, resumed, kills = tmp_path / "killed", 0, 0
    while kills < 5:
        process = subprocess.Popen([*command, str(output)], **streams)
        if kills % 2 == 0:  # most of so short a fit comes before any checkpoint, and little after it
            while process.poll() is None and not has_checkpoint(output):
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.05) * usual)
        else:
            time.sleep(rng.uniform(0.2, 0.95) * usual)
        process.kill()
        resumed += "resuming from" in process.communicate()[1]
        if process.returncode == 0:
            shutil.rmtree(output)  # it ended before the kill: again
        kills += process.returncode == -signal.SIGKILL
    last = subprocess.run([*command, str(output)], check=True, **streams)
    assert resumed + ("resuming from" in last.stderr) > 0
    assert files_below(output) == files_below(tmp_path / "whole")
    for model in (tmp_path / "whole").rglob("model.safetensors"):
        assert (output / model.relative_to(tmp_path / "whole")).read_bytes() == model.read_bytes()


def has_checkpoint(output: Path) -> bool:
    """Whether a run below has saved one; temporary folders may vanish meanwhile."""
    try:
        return any(map(rundir.has_state, output.rglob("checkpoint")))
    except FileNotFoundError:
        return False


def test_two_processes_do_not_fit_into_one_directory(
    photos: Path, backbone_options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["fit", str(photos), *backbone_options, "--output", str(tmp_path)]
    run_dir = tmp_path / "patchcore" / "photos" / "photos"
    run_dir.mkdir(parents=True)
    with rundir.locked(run_dir):
        assert main(command) == 2
    assert f"another process is fitting into {run_dir}: wait for it" in capsys.readouterr().err
    assert main(command) == 0


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError("No space left on device")])
def test_a_stopped_score_does_not_touch_the_old_files(
    stop: BaseException | type[BaseException], flat_run: Path, photos: Path, tmp_path: Path, monkeypatch
):
    command = ["score", str(flat_run), str(photos), "--overlays", "--maps", "--output"]
    drawn = []

    def draw_two(path: Path, heat: np.ndarray) -> None:
        drawn.append(save_tiff(path, heat))
        if len(drawn) > 2:
            raise stop

    save_tiff = scoring.save_tiff
    assert main([*command, str(tmp_path / "old")]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "old").rglob("*") if path.is_file()}
    with monkeypatch.context() as patched:
        patched.setattr(scoring, "save_tiff", draw_two)
        for output in ("old", "new/er"):
            assert main([*command, str(tmp_path / output)]) in (2, 130)
    assert {path: path.read_bytes() for path in (tmp_path / "old").rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    (tmp_path / "old" / files.STAGES[0]).mkdir()  # of a run that was killed
    (tmp_path / "old" / files.STAGES[0] / "half.png").touch()
    command.remove("--maps")
    assert main([*command, str(tmp_path / "old")]) == 0
    kept = {path for path in before if "maps" not in path.parts}
    assert {path for path in (tmp_path / "old").rglob("*") if path.is_file()} == kept


def test_runs_and_scores_of_other_images_are_refused(
    flat_run: Path, photos: Path, backbone_options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Also where the folders have the same name; a new model of the same images forgets the old one's scores."""
    runs, other = tmp_path / "runs", tmp_path / "photos"
    run_dir = runs / "patchcore" / "photos" / "photos"
    shutil.copytree(flat_run, run_dir)
    shutil.copytree(photos, other)
    before = files_below(runs)
    fit, score = ["fit", *backbone_options, "--output", str(runs)], ["score", str(run_dir)]
    assert main([*fit, str(other)]) == 2
    assert "photos holds results of another source, " in capsys.readouterr().err and files_below(runs) == before
    for name in ("2024.05.01", "2024.05.02", "day/2024.05.01"):
        save_image(other / name / "0.png", 0)
    assert [main([*score, str(other / name)]) for name in ("2024.05.01", "2024.05.02")] == [0, 0]
    assert main([*score, str(other / "day" / "2024.05.01")]) == 2
    assert "replace them with --overwrite, or give another folder with --output" in capsys.readouterr().err
    assert main([*score, str(other / "day" / "2024.05.01"), "--overwrite"]) == 0
    rows = [(run_dir / "scores" / day / "scores.csv").read_text() for day in ("2024.05.01", "2024.05.02")]
    assert str(other / "day") in rows[0] and str(other / "2024.05.02") in rows[1]
    assert main([*fit, str(photos)]) == 0
    assert files_below(run_dir) == MODEL


@pytest.mark.parametrize("number", slow_after(1, [signal.SIGKILL, signal.SIGINT]))
def test_a_killed_fit_leaves_nothing_half_written(
    number: signal.Signals, photos: Path, backbone_options: tuple[str, ...], tmp_path: Path
):
    command = ["fit", str(photos), *backbone_options, "--output", str(tmp_path)]
    run_dir = tmp_path / "patchcore" / "photos" / "photos"
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxad", *command],
        cwd=Path(jaxad.__file__).parents[1],
        env=os.environ | {"XLA_FLAGS": ""},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (run_dir / "checkpoint").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130 and errors.endswith("jaxad: interrupted\n")
        assert list(tmp_path.iterdir()) == []
    else:
        assert process.returncode == -signal.SIGKILL
        assert not any((run_dir / name).exists() for name in MODEL)
    assert main(command) == 0
    assert files_below(run_dir) == MODEL


AFTER = [("import", 0.2), ("import", 1), ("import", 3), *(("fit", seconds) for seconds in (0, 0.25, 0.5, 1, 2))]


@pytest.mark.parametrize(("begins", "seconds"), slow_after(1, AFTER))
def test_ctrl_c_is_one_line_whatever_runs(
    begins: str, seconds: float, photos: Path, backbone_options: tuple[str, ...], tmp_path: Path
):
    """While modules are imported, and while programs are compiled and run, which would swallow an exception.

    A fit that was done when the signal came leaves its whole model.
    """
    start = "import jaxad.__main__; print('ready', flush=True); jaxad.__main__.main()"
    command = ["fit", str(photos), *backbone_options, "--output", str(tmp_path / "runs")]
    options = dict(env=os.environ | {"XLA_FLAGS": ""}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", start, *command], **options) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        while begins == "fit" and not (tmp_path / "runs").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=30)[1]
    run_dir = tmp_path / "runs" / "patchcore" / "photos" / "photos"
    finished = begins == "fit" and run_dir.exists() and files_below(run_dir) == MODEL
    if not (finished and process.returncode == 0):
        assert process.returncode == 130 and errors.splitlines()[-1] == "jaxad: interrupted", errors
        assert errors.count("interrupted") == 1 and "Traceback" not in errors
    assert finished or list(tmp_path.iterdir()) == []
