"""What a user does wrong is one line and exit code 2."""

import math
import shutil
from pathlib import Path

import pytest

from jaxad.cli import main
from tests.cli.images import save_image

MISTAKES = {
    "missing folder": (["fit", "nowhere"], "no such file or folder: nowhere"),
    "no images": (["fit", "empty"], "no images found in empty"),
    "corrupt image": (["fit", "corrupt"], "a.png"),
    "unknown method": (
        ["fit", "photos", "--method", "patchcor"],
        "no method is called 'patchcor'",
    ),
    "bad hyperparameter": (["fit", "photos", "--coreset-sampling-ratio", "2"], "must be in (0, 1], got 2.0"),
    "unknown category": (["fit", "parts", "--category", "gear"], "no category 'gear' in parts"),
    "no group": (["fit", "photos", "--group-by", r"(part\d)"], r"finds no group in monday/0.png: it must match every"),
    "missing weights": (
        ["fit", "photos", "--backbone", "resnet18"],
        "weights resnet18.tv_in1k are not on this machine",
    ),
    "no labels": (["benchmark", "photos", "--methods", "padim"], "needs test images, got none for photos"),
    "no model": (["score", "empty", "photos"], "no fitted model in empty"),
    "no run": (["report", "empty"], "no run in empty"),
    "both holdouts": (["fit", "photos", "--holdout", "0.2", "--cross-holdout", "3"], "exclude each other"),
    "too many devices": (["fit", "photos", "--devices", "99"], "devices must be within 1..8 (those that JAX sees"),
    "processes without --distributed": (["fit", "photos", "--num-processes", "2"], "need --distributed: add it"),
    "no sweep": (["benchmark", "parts", "--methods", "padim", "--sweep", "sigma=1,2"], "can sweep nothing at once"),
    "a sweep of one value": (["benchmark", "parts", "--sweep", "sigma=1"], "needs two different values"),
    "unknown command": (["train", "photos"], "no command 'train'"),
    "no photographs": (["fit", "photos", "--method", "efficientad"], "efficientad learns from photographs of other"),
    "offline": (["weights", "fetch", "resnet18"], "JAXAD_OFFLINE is set"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_code_2(
    mistake: str,
    photos: Path,
    mvtec: Path,
    backbone_options: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    (tmp_path / "photos").symlink_to(photos)
    (tmp_path / "parts").symlink_to(mvtec)
    (tmp_path / "empty").mkdir()
    save_image(tmp_path / "corrupt" / "b.png", 0)
    (tmp_path / "corrupt" / "a.png").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXAD_OFFLINE", "1")
    monkeypatch.setattr("jaxad.progress.LINE_SECONDS", math.inf)
    argv, words = MISTAKES[mistake]
    if argv[0] in ("fit", "benchmark") and "--backbone" not in argv:
        argv = [*argv, *backbone_options]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("jaxad: error: ") and words in err
    assert not (tmp_path / "runs").exists()


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAXAD_DEBUG", "1")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        main(["fit", "nowhere"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["fit"], "Missing from jaxad fit: SOURCE"),
        (["fit", "demo", "--sede", "1"], "Unrecognized options: --sede, 1; did you mean --seed INT?"),
        (["fit", "demo", "--fpr", "much"], "Error parsing --fpr: could not convert string to float: 'much'"),
        (["score", "run", "images", "--overlay", "1"], "--overlay"),
        (["weights"], "weights wants one of list, fetch, import, got nothing"),
        (["weights", "fetch"], "Missing from jaxad weights fetch: NAME"),
    ],
)
def test_wrong_options_are_one_line_and_code_2(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    assert main(argv) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and words in message


@pytest.mark.parametrize(
    ("file", "content", "command", "words"),
    [
        ("recipe.json", '{"x": 1}', "evaluate", "recipe.json: recipe lacks category, dataset, peak_bytes"),
        ("recipe.json", "[]", "report", "recipe.json must hold a JSON object, got []"),
        ("metrics.json", '{"metrics": {"image_AUROC": "x"}}', "report", "metrics.image_AUROC must be a number"),
        ("metrics.json", '{"metrics": {"image_AUROC": 1}}', "report", "metrics.json has no checksum"),
        ("threshold.json", '{"image": {"value": 3.5}}', "evaluate", "threshold.json is not what model.json names"),
    ],
)
def test_damaged_run_files_are_named(file, content, command, words, parts_runs: Path, tmp_path: Path, capsys):
    run_dir = tmp_path / "nut"
    shutil.copytree(parts_runs / "padim" / "parts" / "nut", run_dir)
    (run_dir / file).write_text(content)
    assert main([command, str(run_dir), *(["--output", str(tmp_path / "r.html")] if command == "report" else [])]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
