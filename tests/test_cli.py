"""The command line from end to end on tiny images, what it says to mistakes, and what an interruption leaves behind."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from PIL import Image

import jaxad
from jaxad import files, methods, runs
from jaxad.backbones import backbone
from jaxad.cli import main
from jaxad.data import Dataset, open_data
from jaxad.methods import METHODS
from jaxad.report.runs import load_run
from jaxad.runs import directory as rundir

SMALL = ("--image-size", "64", "--batch-size", "4")
MODEL = {"model.json", "model.safetensors", "recipe.json", "threshold.json"}


def save_image(path: Path, seed: int, size: tuple[int, int] = (48, 40), scratch: bool = False) -> None:
    pixels = np.random.default_rng(seed).integers(90, 160, (*size, 3), dtype=np.uint8)
    if scratch:
        pixels[10:20, 5:30] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def backbone_options(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Random weights, so that no test needs the real ones."""
    path = tmp_path_factory.mktemp("weights") / "pdn_small.safetensors"
    modules = backbone("pdn_small").init(jax.random.key(0))["params"]
    tensors = {f"{name}.{leaf}": np.asarray(leaves[leaf]) for name, leaves in modules.items() for leaf in leaves}
    safetensors.numpy.save_file(tensors, path)
    return ("--backbone", "pdn_small", "--weights", str(path), *SMALL)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat folder: two days with the same file names, two sizes, two endings for one name."""
    root = tmp_path_factory.mktemp("data") / "photos"
    for i in range(4):
        save_image(root / "monday" / f"{i}.png", i)
        save_image(root / "tuesday" / f"{i}.png", i + 10, (32, 64))
    save_image(root / "tuesday" / "0.bmp", 20)
    return root


@pytest.fixture(scope="module")
def mvtec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "parts"
    for offset, category in ((0, "bolt"), (100, "nut")):
        for i in range(6):
            save_image(root / category / "train" / "good" / f"{i}.png", offset + i)
        for i in range(3):
            save_image(root / category / "test" / "good" / f"{i}.png", offset + 10 + i)
            save_image(root / category / "test" / "scratch" / f"{i}.png", offset + 20 + i, scratch=True)
            mask = np.zeros((48, 40), np.uint8)
            mask[10:20, 5:30] = 255
            path = root / category / "ground_truth" / "scratch" / f"{i}_mask.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(path)
    return root


@pytest.fixture(scope="module")
def flat_run(tmp_path_factory: pytest.TempPathFactory, photos: Path, backbone_options: tuple[str, ...]) -> Path:
    output = tmp_path_factory.mktemp("runs")
    assert main(["fit", str(photos), *backbone_options, "--output", str(output)]) == 0
    return output / "patchcore" / "photos" / "photos"


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_fit_of_a_flat_folder_writes_a_model_and_the_recipe(flat_run: Path):
    assert files_below(flat_run) >= MODEL and not (flat_run / "checkpoint").exists()
    recipe = files.read_json(flat_run / "recipe.json")
    assert (recipe["method"], recipe["dataset"], recipe["category"]) == ("patchcore", "photos", "photos")
    assert recipe["hyperparameters"]["coreset_sampling_ratio"] == 0.1
    assert recipe["n_train"] == 7 and recipe["n_heldout"] == 2
    assert recipe["seconds"]["compile"] > 0 and recipe["seconds"]["fit"] > 0 and recipe["peak_bytes"] > 0
    assert recipe["command"].startswith("jaxad fit ")
    threshold = files.read_json(flat_run / "threshold.json")
    assert threshold["image"]["source"] == threshold["pixel"]["source"] == "held-out normals"


def test_score_writes_rows_overlays_and_maps_in_the_tree_of_the_images(flat_run: Path, photos: Path, tmp_path: Path):
    assert main(["score", str(flat_run), str(photos), "--output", str(tmp_path), "--overlays", "--maps"]) == 0
    names = {str(path.relative_to(photos)) for path in photos.rglob("*.*")}
    assert files_below(tmp_path / "overlays") == {f"{name}.png" for name in names}
    assert files_below(tmp_path / "maps") == {f"{name}.tiff" for name in names}
    rows = read_csv(tmp_path / "scores.csv")
    threshold = files.read_json(flat_run / "threshold.json")["image"]["value"]
    assert {row["path"] for row in rows} == {str(photos / name) for name in names}
    assert {(row["label"], row["defect"]) for row in rows} == {("", "")}
    assert [row["prediction"] for row in rows] == [str(int(float(row["score"]) > threshold)) for row in rows]
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [(line["path"], line["score"]) for line in lines] == [(row["path"], float(row["score"])) for row in rows]
    assert {(line["label"], line["defect"]) for line in lines} == {(None, None)}
    prediction = jaxad.load(flat_run).predict(photos)
    np.testing.assert_allclose([float(row["score"]) for row in rows], prediction.pred_score, rtol=1e-5)
    assert prediction.anomaly_map is not None
    for name, heat in zip(prediction.paths, prediction.anomaly_map, strict=True):
        relative = Path(name).relative_to(photos)
        with Image.open(name) as image, Image.open(tmp_path / "maps" / f"{relative}.tiff") as found:
            assert found.mode == "F" and found.size == image.size
            np.testing.assert_allclose(np.asarray(found).mean(), heat.mean(), rtol=0.05)
        with Image.open(tmp_path / "overlays" / f"{relative}.png") as found:
            assert found.size == image.size


def test_score_writes_beside_the_run_by_default_and_takes_any_folder(flat_run: Path, mvtec: Path):
    source = mvtec / "bolt" / "test"  # good beside scratch: no folder to learn from, but one to score
    assert main(["score", str(flat_run), str(source)]) == 0
    assert len(read_csv(flat_run / "scores" / "test" / "scores.csv")) == 6


@pytest.fixture(scope="module")
def parts_runs(tmp_path_factory: pytest.TempPathFactory, mvtec: Path, backbone_options: tuple[str, ...]) -> Path:
    output = tmp_path_factory.mktemp("runs")
    options = ("--method", "padim", "--n-features", "8", "--layers", "layer1", "layer2", "--holdout", "0.34")
    assert main(["fit", str(mvtec), *options, *backbone_options, "--output", str(output)]) == 0
    return output


def test_evaluate_all_categories_and_report(parts_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = parts_runs / "padim" / "parts"
    before = (folder / "bolt" / "threshold.json").read_bytes()
    page = tmp_path / "report.html"
    assert main(["evaluate", str(parts_runs), "--report", str(page)]) == 0
    table = capsys.readouterr().out
    assert [word in table for word in ("bolt", "nut", "Mean", "AUPRO")] == [True] * 4
    assert (folder / "bolt" / "threshold.json").read_bytes() == before
    assert page.read_text().count("<details") == 2
    for category in ("bolt", "nut"):
        assert files_below(folder / category) == MODEL | {"metrics.json", "scores.csv", "scores.jsonl", "examples.npz"}
        found = files.read_json(folder / category / "metrics.json")
        assert (found["n_test"], found["n_anomalous"], found["oracle"]) == (6, 3, False)
        rows = read_csv(folder / category / "scores.csv")
        assert [(row["label"], row["defect"]) for row in rows] == [("0", "good")] * 3 + [("1", "scratch")] * 3
        good, bad = np.array([float(row["score"]) for row in rows]).reshape(2, 3)
        assert found["metrics"]["image_AUROC"] == pytest.approx((bad[:, None] > good).mean())
        assert files.read_json(folder / category / "recipe.json")["seconds"]["score_per_image"] > 0


def test_only_oracle_takes_thresholds_from_the_test_set(parts_runs: Path, tmp_path: Path):
    run_dir = tmp_path / "nut"
    shutil.copytree(parts_runs / "padim" / "parts" / "nut", run_dir)
    before = (run_dir / "threshold.json").read_bytes()
    assert main(["evaluate", str(run_dir), "--oracle"]) == 0
    found = files.read_json(run_dir / "metrics.json")
    sources = [found["thresholds"][kind]["source"] for kind in ("image", "pixel")]
    assert found["oracle"] is True and sources == ["oracle (test set)"] * 2
    assert load_run(run_dir).threshold.source == "oracle (test set)"
    assert (run_dir / "threshold.json").read_bytes() == before  # no other command gets to see them
    assert main(["evaluate", str(run_dir)]) == 0
    assert files.read_json(run_dir / "metrics.json")["oracle"] is False
    assert load_run(run_dir).threshold.source == "held-out normals"
    score_run = ["score", str(run_dir), files.read_json(run_dir / "recipe.json")["source"]]
    assert main([*score_run, "--output", str(tmp_path)]) == 0
    assert [row["label"] for row in read_csv(tmp_path / "scores.csv")] == ["0"] * 3 + ["1"] * 3


def test_benchmark_gives_what_fit_and_evaluate_give(
    mvtec: Path, flat_run: Path, backbone_options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    common = [str(mvtec), "--category", "bolt", *backbone_options]
    command = ["benchmark", *common, "--methods", "patchcore", "--seeds", "2", "--output", str(tmp_path)]
    assert main([*command, "--report", str(tmp_path / "report.html")]) == 0
    captured = capsys.readouterr()
    assert "±" in captured.out and "standard deviation over 2 seeds" in captured.out
    assert captured.err.rstrip().endswith("report.html")
    assert main(["fit", *common, "--seed", "1", "--output", str(tmp_path)]) == 0
    alone = tmp_path / "patchcore" / "parts" / "bolt"
    assert main(["evaluate", str(alone)]) == 0
    benchmarked = files.read_json(tmp_path / "seed1" / "patchcore" / "parts" / "bolt" / "metrics.json")
    assert benchmarked["metrics"] == pytest.approx(files.read_json(alone / "metrics.json")["metrics"], abs=1e-3)


def test_a_benchmark_of_all_methods_leaves_out_those_that_the_backbone_does_not_suit(
    mvtec: Path,
    backbone_options: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(methods, "METHODS", {name: METHODS[name] for name in ("padim", "efficientad", "stfpm")})
    assert main(["benchmark", str(mvtec), *backbone_options, "--output", str(tmp_path)]) == 0
    told = capsys.readouterr().err
    assert "without efficientad: efficientad learns from photographs of other things" in told
    assert "without stfpm: " in told and sorted(path.name for path in tmp_path.iterdir()) == ["padim"]


def test_categories_of_about_as_many_images_are_fitted_together() -> None:
    """The rest would be padded."""
    counts = {"a": 30, "b": 5, "c": 12, "d": 6, "e": 11, "f": 10}
    opened = open_data({name: np.zeros((n, 64, 64, 3), np.uint8) for name, n in counts.items()})
    trains = {name: opened[name].train for name in counts}
    groups = runs._groups(jaxad.Detector("padim"), trains, 2, False, 1, None)
    assert [categories for _, categories, _, _ in groups] == [("a",) * 2, ("b", "d", "f") * 2, ("c", "e") * 2]


def test_detectors_with_the_same_features_share_them(
    mvtec: Path, backbone_options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    decoded = []
    images = Dataset.images
    monkeypatch.setattr(Dataset, "images", lambda self, indices: decoded.extend(indices) or images(self, indices))
    options = {"weights": backbone_options[3], "image_size": 64, "layers": ("layer2",)}
    detectors = [jaxad.Detector("patchcore", **options), jaxad.Detector("padim", n_features=4, **options)]
    detectors[1].frozen = detectors[0].load_frozen()
    train = open_data(mvtec, category="bolt", preprocess=detectors[0].preprocess)["bolt"].train
    shared = runs.shared_caches(detectors)
    assert shared[0] is shared[1] is not None and runs.shared_caches([detectors[0]]) == [None]
    for one, cache in zip(detectors, shared, strict=True):
        runs.fit_runs([one], [train], [tmp_path / one.method_name], {}, cache=cache)
    assert len(decoded) == len(train)
    limits = detectors[1].color_limits()
    detectors[1].fit(train)
    np.testing.assert_allclose(limits, detectors[1].color_limits(), rtol=1e-5)


def test_all_categories_at_once_are_each_on_its_own(
    mvtec: Path, backbone_options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Also when they are fitted in steps, and on a mesh of eight devices."""
    together, alone = tmp_path / "together", tmp_path / "alone"
    common = [str(mvtec), *backbone_options, "--method", "patchcore"]
    assert main(["fit", *common, "--category", "nut", "--output", str(alone)]) == 0
    one = alone / "patchcore" / "parts" / "nut"
    wanted = safetensors.numpy.load_file(one / "model.safetensors")
    for i, more in enumerate([[], ["--classes-per-step", "1"], ["--devices", "8"]]):
        output = together / str(i)
        assert main(["fit", *common, *more, "--output", str(output)]) == 0
        assert "2 categories" in capsys.readouterr().err
        run_dir = output / "patchcore" / "parts"
        found = safetensors.numpy.load_file(run_dir / "nut" / "model.safetensors")
        assert {name: leaf.shape for name, leaf in found.items()} == {n: leaf.shape for n, leaf in wanted.items()}
        for name, leaf in found.items():
            np.testing.assert_allclose(leaf, wanted[name], rtol=1e-4, atol=1e-5)
        assert sorted(path.name for path in run_dir.iterdir()) == ["bolt", "nut"]
        assert files_below(run_dir / "nut") == MODEL
        thresholds = [files.read_json(path / "threshold.json") for path in (run_dir / "nut", one)]
        assert thresholds[0]["image"]["value"] == pytest.approx(thresholds[1]["image"]["value"], rel=1e-4)
        assert main(["evaluate", str(run_dir / "nut")]) == 0


def test_one_model_for_all_categories(
    mvtec: Path, backbone_options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["benchmark", str(mvtec), "--unified", "--methods", "padim", *backbone_options, "--output", str(tmp_path)]
    assert main([*command, "--report", str(tmp_path / "report.html")]) == 0
    table = capsys.readouterr().out
    assert "parts (unified)" in table and all(word in table for word in ("bolt", "nut", "Mean"))
    run_dir = tmp_path / "padim" / "parts" / "unified"
    assert files_below(run_dir) > MODEL and {path.name for path in run_dir.iterdir() if path.is_dir()} == {
        "bolt",
        "nut",
    }
    recipe = files.read_json(run_dir / "recipe.json")
    assert recipe["category"] == "unified" and recipe["n_train"] + recipe["n_heldout"] == 12
    before = files.read_json(run_dir / "bolt" / "metrics.json")
    assert main(["evaluate", str(run_dir)]) == 0
    assert files.read_json(run_dir / "bolt" / "metrics.json") == before | {"source": recipe["source"]}
    assert rundir.find([tmp_path], "recipe.json") == [run_dir / "bolt", run_dir / "nut"]
    assert rundir.find([tmp_path], "model.json") == [run_dir]


@pytest.mark.parametrize(("name", "values"), [("coreset_sampling_ratio", ("0.1", "0.02")), ("num_neighbors", (1, 3))])
def test_a_sweep_is_a_fit_for_each_value(
    mvtec: Path, backbone_options: tuple[str, ...], tmp_path: Path, capsys, name: str, values: tuple
):
    """One fit, whose smaller coresets and fewer neighbors are those of fits of their own."""
    common = [str(mvtec), *backbone_options]
    swept = ["--sweep", f"{name}={values[0]},{values[1]}", "--output", str(tmp_path / "swept")]
    assert main(["benchmark", *common, "--methods", "patchcore", *swept]) == 0
    out = capsys.readouterr().out
    assert all(f"patchcore {name}={value}" in " ".join(out.split()) for value in values)
    for value in values:
        alone, option = tmp_path / str(value), f"--{name.replace('_', '-')}"
        assert main(["fit", *common, option, str(value), "--output", str(alone)]) == 0
        assert main(["evaluate", str(alone)]) == 0
        for category in ("bolt", "nut"):
            run_dir = tmp_path / "swept" / f"{name}={value}" / "patchcore" / "parts" / category
            one = alone / "patchcore" / "parts" / category
            found, wanted = (safetensors.numpy.load_file(d / "model.safetensors") for d in (run_dir, one))
            assert found["bank"].shape == wanted["bank"].shape and found["size"] == wanted["size"]
            np.testing.assert_allclose(found["bank"], wanted["bank"], rtol=1e-4, atol=1e-5)
            assert found["neighbors"] == wanted["neighbors"]
            metrics = [files.read_json(d / "metrics.json")["metrics"] for d in (run_dir, one)]
            assert metrics[0] == pytest.approx(metrics[1], abs=1e-4)
            loaded = jaxad.load(run_dir)
            assert loaded.hyperparameters[name] == float(value)


MISTAKES = {
    "missing folder": (["fit", "nowhere"], "no such file or folder: nowhere"),
    "no images": (["fit", "empty"], "no images found in empty"),
    "corrupt image": (["fit", "corrupt"], "a.png"),
    "unknown method": (["fit", "photos", "--method", "patchcor"], "the method must be one of"),
    "bad hyper-parameter": (["fit", "photos", "--coreset-sampling-ratio", "2"], "must be in (0, 1], got 2.0"),
    "unknown category": (["fit", "parts", "--category", "gear"], "no category 'gear' in parts"),
    "missing weights": (
        ["fit", "photos", "--backbone", "resnet18"],
        "weights resnet18.tv_in1k are not on this machine",
    ),
    "no labels": (["benchmark", "photos", "--methods", "padim"], "needs test images, got none for photos"),
    "no model": (["score", "empty", "photos"], "no fitted model in empty"),
    "no run": (["report", "empty"], "no run in empty"),
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
        (["fit", "demo", "--holdout", "much"], "Error parsing --holdout: could not convert string to float: 'much'"),
        (["score", "run", "images", "--overlay", "1"], "--overlay"),
        (["weights"], "weights wants one of list, fetch, import, got nothing"),
        (["weights", "fetch"], "Missing from jaxad weights fetch: NAME"),
    ],
)
def test_wrong_options_are_one_line_and_code_2(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    assert main(argv) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and words in told


def test_help_shows_the_options_of_the_method(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as raised:
        main(["fit", "--help", "--method", "padim"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert raised.value.code == 0
    assert "--n-features {None}|INT|{all} Channels drawn at random" in text and "(default: 0.01)" in text
    assert "--holdout FLOAT" in text and "--coreset-sampling-ratio" not in text


def test_lists(capsys: pytest.CaptureFixture[str]):
    assert main(["list"]) == 0 and main(["weights", "list"]) == 0 and main([]) == 0
    text = capsys.readouterr().out
    assert [word in text for word in ("patchcore", "arXiv:2106.08265", "wide_resnet50_2", "benchmark")] == [True] * 4


def test_a_full_disk_leaves_the_old_run_alone(
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
    assert "is of other settings or data: deleted" in capsys.readouterr().err
    assert files_below(run_dir) == MODEL


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
            shutil.rmtree(output)  # it was faster: once more
        kills += process.returncode == -signal.SIGKILL
    last = subprocess.run([*command, str(output)], check=True, **streams)
    assert resumed + ("resuming from" in last.stderr) > 0
    assert files_below(output) == files_below(tmp_path / "whole")
    for model in (tmp_path / "whole").rglob("model.safetensors"):
        assert (output / model.relative_to(tmp_path / "whole")).read_bytes() == model.read_bytes()


def has_checkpoint(output: Path) -> bool:
    """Whether a run below has saved one; while it is looked for, temporary folders may vanish."""
    try:
        return any(map(rundir.saved, output.rglob("checkpoint")))
    except FileNotFoundError:
        return False


def test_two_processes_do_not_fit_into_one_directory(
    photos: Path, backbone_options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["fit", str(photos), *backbone_options, "--output", str(tmp_path)]
    run_dir = tmp_path / "patchcore" / "photos" / "photos"
    run_dir.mkdir(parents=True)
    with rundir.alone(run_dir):
        assert main(command) == 2
    assert f"another process is fitting into {run_dir}: wait for it" in capsys.readouterr().err
    assert main(command) == 0


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError("No space left on device")])
def test_a_stopped_score_leaves_the_old_files_alone(
    stop: BaseException | type[BaseException], flat_run: Path, photos: Path, tmp_path: Path, monkeypatch
):
    command = ["score", str(flat_run), str(photos), "--overlays", "--maps", "--output"]
    drawn = []

    def draw_two(path: Path, heat: np.ndarray) -> None:
        drawn.append(save_tiff(path, heat))
        if len(drawn) > 2:
            raise stop

    save_tiff = runs.save_tiff
    assert main([*command, str(tmp_path / "old")]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "old").rglob("*") if path.is_file()}
    with monkeypatch.context() as patched:
        patched.setattr(runs, "save_tiff", draw_two)
        for output in ("old", "new/er"):
            assert main([*command, str(tmp_path / output)]) in (2, 130)
    assert {path: path.read_bytes() for path in (tmp_path / "old").rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    (tmp_path / "old" / ".staging").mkdir()  # of a run that was killed
    (tmp_path / "old" / ".staging" / "half.png").touch()
    assert main([*command, str(tmp_path / "old")]) == 0
    assert {path for path in (tmp_path / "old").rglob("*") if path.is_file()} == before.keys()


def test_outputs_are_files_and_links_stay_links(flat_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "link.html").symlink_to("page.html")
    assert main(["report", str(flat_run), "--output", str(tmp_path / "link.html")]) == 0
    assert (tmp_path / "link.html").is_symlink() and "</html>" in (tmp_path / "page.html").read_text()
    os.mkfifo(tmp_path / "pipe")
    assert main(["report", str(flat_run), "--output", str(tmp_path / "pipe")]) == 2
    assert f"the output must be a file, but {tmp_path / 'pipe'} is something else" in capsys.readouterr().err
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    ("file", "content", "command", "words"),
    [
        ("recipe.json", '{"x": 1}', "evaluate", "recipe.json lacks category, dataset, peak_bytes, seconds"),
        ("recipe.json", "[]", "report", "recipe.json must hold a JSON object, got []"),
        ("metrics.json", '{"metrics": {"image_AUROC": "x"}}', "report", "metrics.json must hold numbers by metric"),
        ("threshold.json", '{"image": {"value": "abc"}}', "evaluate", "threshold.json: a threshold must be a finite"),
    ],
)
def test_damaged_run_files_are_named(file, content, command, words, parts_runs: Path, tmp_path: Path, capsys):
    run_dir = tmp_path / "nut"
    shutil.copytree(parts_runs / "padim" / "parts" / "nut", run_dir)
    (run_dir / file).write_text(content)
    assert main([command, str(run_dir), *(["--output", str(tmp_path / "r.html")] if command == "report" else [])]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
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


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_help_page(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as raised:
        main(["fit", "demo", "--method", name, "--help"])
    assert raised.value.code == 0 and "--batch-size" in capsys.readouterr().out
