"""The commands from end to end on tiny images."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from PIL import Image

import jaxad
from jaxad import files, methods
from jaxad.cli import commands, main
from jaxad.data import Arrays, Dataset, open_data
from jaxad.driver.execution import Execution
from jaxad.learning import load_frozen
from jaxad.methods import METHODS
from jaxad.report.runs import load_run
from jaxad.runs import directory as rundir
from jaxad.runs.benchmarking import unsuited
from jaxad.runs.fitting import Job, fit_runs, job_groups, shared_caches
from jaxad.settings import Settings
from tests.cli.images import MODEL, files_below, read_csv, save_image
from tests.examples import slow_after


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


def test_thresholds_set_by_hand(flat_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_dir = tmp_path / "run"
    shutil.copytree(flat_run, run_dir)
    before = jaxad.load(flat_run)
    assert main(["threshold", str(run_dir), "--image", "3.2"]) == 0
    assert "image 3.2, edited by hand; pixel" in capsys.readouterr().err
    loaded = jaxad.load(run_dir)
    assert loaded.image_threshold and loaded.image_threshold.value == 3.2
    assert loaded.pixel_threshold == before.pixel_threshold
    assert main(["threshold", str(run_dir), "--image", "nan"]) == 2
    assert "a threshold must be a number" in capsys.readouterr().err
    assert main(["threshold", str(tmp_path), "--image", "1"]) == 2
    assert "no fitted model in" in capsys.readouterr().err


def test_score_writes_rows_and_pictures_in_the_folders_of_the_images(flat_run: Path, photos: Path, tmp_path: Path):
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
        with Image.open(name) as image, Image.open(tmp_path / "maps" / f"{relative}.tiff") as heat_map:
            assert heat_map.mode == "F" and heat_map.size == image.size
            np.testing.assert_allclose(np.asarray(heat_map).mean(), heat.mean(), rtol=0.05)
        with Image.open(tmp_path / "overlays" / f"{relative}.png") as overlay:
            assert overlay.size == image.size


def test_masks_of_what_to_ignore(flat_run: Path, mvtec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A defect that is ignored changes no score and is no pixel of any metric; overlays show what is ignored."""
    run, mask, normal = tmp_path / "run", tmp_path / "mask.png", mvtec / "bolt" / "test" / "good" / "0.png"
    shutil.copytree(flat_run, run)
    pixels = np.zeros((48, 40), np.uint8)
    pixels[10:20, 5:30] = 255
    Image.fromarray(pixels).save(mask)
    save_image(tmp_path / "pair" / "with.png", 10, scratch=True)
    shutil.copy(normal, tmp_path / "pair" / "without.png")
    options = ["--ignore", str(mask), "--overlays", "--output", str(tmp_path / "out")]
    assert main(["score", str(run), str(tmp_path / "pair"), *options]) == 0
    scores = [float(row["score"]) for row in read_csv(tmp_path / "out" / "scores.csv")]
    assert scores[0] == scores[1]
    with Image.open(tmp_path / "out" / "overlays" / "without.png") as overlay, Image.open(normal) as image:
        changed = (np.asarray(overlay) != np.asarray(image)).any(-1)
    assert changed[pixels > 0].mean() > 0.9
    assert main(["evaluate", str(run), "--source", str(mvtec / "bolt"), "--ignore", str(mask)]) == 0
    metrics = files.read_json(run / "metrics.json")
    assert 0.13 < metrics["ignored"] < 0.5
    assert "none of the" in metrics["reasons"]["pixel_AUROC"]
    assert "3 defects lie where pixels are ignored" in capsys.readouterr().err
    assert load_run(run).examples is not None and load_run(run).examples.ignored.any()


@pytest.mark.parametrize("image_size", ["64", pytest.param("None", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("default")
def test_broken_images_cost_nothing_but_themselves(
    image_size: str, backbone_options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for i in range(5):
        save_image(tmp_path / "photos" / f"{i}.png", i)
    (tmp_path / "photos" / "0.png").write_bytes(b"no image")
    options = ("--method", "mahalanobis_ad", *backbone_options, "--image-size", image_size)
    arguments = ["fit", str(tmp_path / "photos"), *options, "--output", str(tmp_path)]
    assert main(arguments) == 2
    refusal = capsys.readouterr().err.splitlines()[-1]
    assert "0.png (not a known image format)" in refusal and "--skip-broken" in refusal
    assert main([*arguments, "--skip-broken"]) == 0
    assert "warning: 1 of 5 images cannot be read and are left out: cannot decode" in capsys.readouterr().err
    run = tmp_path / "mahalanobis_ad" / "photos" / "photos"
    assert files.read_json(run / "recipe.json")["left_out"] == [str(tmp_path / "photos" / "0.png")]
    assert main(["score", str(run), str(tmp_path / "photos"), "--output", str(tmp_path / "out")]) == 1
    assert "4 images scored" in (said := capsys.readouterr().err) and "1 of 5 images cannot be read" in said
    rows = read_csv(tmp_path / "out" / "scores.csv")
    assert [bool(row["score"]) for row in rows] == [not row["error"] for row in rows] == [False, *[True] * 4]
    lines = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    assert [line["error"] or "" for line in lines] == [row["error"] for row in rows]
    assert "0.png" in lines[0]["error"] and lines[0]["score"] is None is lines[0]["prediction"]


def test_memory_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for error in (MemoryError("std::bad_alloc"), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")):
        monkeypatch.setattr("jaxad.cli.commands.run", lambda *_, error=error: (_ for _ in ()).throw(error))
        assert main(["weights", "list"]) == 2
        assert str(error) in (line := capsys.readouterr().err) and line.count("\n") == 1 and "--batch-size" in line


def test_score_writes_beside_the_run_by_default_and_takes_any_folder(flat_run: Path, mvtec: Path):
    source = mvtec / "bolt" / "test"  # good beside scratch: no folder to learn from, but one to score
    assert main(["score", str(flat_run), str(source)]) == 0
    assert len(read_csv(flat_run / "scores" / "test" / "scores.csv")) == 6


@pytest.mark.filterwarnings("default:.*file not read")
def test_sources_without_training_images_are_scored_and_evaluated_but_not_fitted(
    parts_runs: Path, mvtec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source, run = tmp_path / "bolt", tmp_path / "run"
    for part in ("test/good", "test/scratch", "ground_truth"):
        (source / part).parent.mkdir(parents=True, exist_ok=True)
        (source / part).symlink_to(mvtec / "bolt" / part)
    (source / "test/0.heic").touch()
    shutil.copytree(parts_runs / "padim/parts/bolt", run)
    paths = tmp_path / "paths.csv"
    paths.write_text("image_path\n" + "".join(f"{path}\n" for path in sorted((mvtec / "bolt/test").rglob("*.png"))))
    assert main(["evaluate", str(run), "--source", str(source)]) == 0
    assert files.read_json(run / "metrics.json")["n_test"] == 6
    assert main(["score", str(run), str(paths), "--output", str(tmp_path / "scores")]) == 0
    assert {row["label"] for row in read_csv(tmp_path / "scores/scores.csv")} == {""}
    capsys.readouterr()
    for data in (paths, source):
        assert main(["fit", str(data), "--output", str(tmp_path / "runs")]) == 2
        warning, _, error = capsys.readouterr().err.rpartition("jaxad: error: category ")
        assert (
            error.startswith(f"'{data.stem}' of {data.stem} has no normal training images") and error.count("\n") == 1
        )
    assert warning == f"jaxad: warning: 1 file not read in {source}: 1 of no known image format .heic (test/0.heic)\n"


def test_evaluate_all_categories_and_report(parts_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = parts_runs / "padim" / "parts"
    before = (folder / "bolt" / "threshold.json").read_bytes()
    page = tmp_path / "report.html"
    assert main(["evaluate", str(parts_runs), "--report", str(page)]) == 0
    table, messages = capsys.readouterr()
    assert [word in table for word in ("bolt", "nut", "Mean", "AUPRO", "at the threshold")] == [True] * 5
    for category in ("bolt", "nut"):
        assert f"{category}: 5 % false alarms need 19 held-out images, got 2, which guarantee 33.3 %\n" in messages
    assert (folder / "bolt" / "threshold.json").read_bytes() == before
    assert page.read_text().count("<details") == 2
    for category in ("bolt", "nut"):
        assert files_below(folder / category) == MODEL | {"metrics.json", "scores.csv", "scores.jsonl", "examples.npz"}
        metrics = files.read_json(folder / category / "metrics.json")
        assert (metrics["n_test"], metrics["n_anomalous"], metrics["oracle"]) == (6, 3, False)
        rows = read_csv(folder / category / "scores.csv")
        assert [(row["label"], row["defect"]) for row in rows] == [("0", "good")] * 3 + [("1", "scratch")] * 3
        good, bad = np.array([float(row["score"]) for row in rows]).reshape(2, 3)
        predicted = np.array([int(row["prediction"]) for row in rows])
        at_threshold = metrics["at_threshold"]["image"]
        assert at_threshold["threshold"] == files.read_json(folder / category / "threshold.json")["image"]["value"]
        assert at_threshold["FPR"]["value"] == predicted[:3].mean() and at_threshold["FPR"]["n"] == 3
        assert at_threshold["recall"]["value"] == predicted[3:].mean()
        assert at_threshold["recall_by_defect"] == {"scratch": at_threshold["recall"]}
        assert metrics["thresholds"] is None
        assert metrics["metrics"]["image_AUROC"] == pytest.approx((bad[:, None] > good).mean())
        assert files.read_json(folder / category / "recipe.json")["seconds"]["score_per_image"] > 0


def test_a_run_that_cannot_be_evaluated_does_not_cost_the_others(
    parts_runs: Path, mvtec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    unevaluated = shutil.ignore_patterns("metrics.json")
    runs = shutil.copytree(parts_runs / "padim" / "parts", tmp_path / "runs", ignore=unevaluated)
    assert main(["evaluate", str(runs), "--source", str(mvtec / "nut"), "--category", "none"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    lost = shutil.copytree(mvtec, tmp_path / "parts")
    (lost / "bolt" / "test" / "good" / "0.png").write_bytes(b"broken")
    assert main(["evaluate", str(runs), "--source", str(lost)]) == 1
    table, messages = capsys.readouterr()
    assert "nut" in table and f"jaxad: error: {runs / 'bolt'}: cannot decode" in messages
    evaluated = (runs / "nut" / "metrics.json").read_bytes()
    (runs / "nut" / "threshold.json").write_text("{}")
    assert main(["evaluate", str(runs)]) == 2  # before any work
    assert "nut/threshold.json is not what model.json names" in capsys.readouterr().err
    assert (runs / "nut" / "metrics.json").read_bytes() == evaluated and not (runs / "bolt" / "metrics.json").exists()


def test_a_cross_holdout_fits_all_images(
    mvtec: Path, backbone_options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = ["--category", "bolt", "--method", "padim", "--n-features", "8", "--layers", "layer1", *backbone_options]
    few = ["--cross-holdout", "3", "--fpr", "0.01", "--tail", "gpd", "--output", str(tmp_path)]
    assert main(["fit", str(mvtec), *options, *few]) == 0
    messages = capsys.readouterr().err
    assert "threshold from 6 held-out images: about 1 % false alarms" in messages and "6 images in" in messages
    assert "bolt: 1 % false alarms need 99 held-out images, got 6: the threshold is their highest score\n" in messages
    run_dir = tmp_path / "padim" / "parts" / "bolt"
    recipe = files.read_json(run_dir / "recipe.json")
    assert (recipe["n_train"], recipe["n_heldout"], recipe["cross_holdout"], recipe["holdout"]) == (6, 6, 3, 0.0)
    assert jaxad.load(run_dir).settings.cross_holdout == 3
    assert main(["evaluate", str(run_dir)]) == 0
    pixel = files.read_json(run_dir / "metrics.json")["at_threshold"]["pixel"]
    maps = jaxad.load(run_dir).predict(mvtec / "bolt" / "test" / "good").anomaly_map
    assert maps is not None and pixel["FPR"]["n"] == 3
    assert pixel["FPR"]["value"] == (maps > pixel["threshold"]).any((1, 2)).mean()


def test_only_oracle_takes_thresholds_from_the_test_set(parts_runs: Path, tmp_path: Path):
    run_dir = tmp_path / "nut"
    shutil.copytree(parts_runs / "padim" / "parts" / "nut", run_dir)
    before = (run_dir / "threshold.json").read_bytes()
    assert main(["evaluate", str(run_dir), "--oracle"]) == 0
    metrics = files.read_json(run_dir / "metrics.json")
    sources = [metrics["thresholds"][kind]["source"] for kind in ("image", "pixel")]
    best = metrics["at_threshold"]["image"]["F1"]["value"]
    assert best == pytest.approx(metrics["metrics"]["image_F1max"])
    assert metrics["oracle"] is True and sources == ["oracle (test set)"] * 2
    assert load_run(run_dir).threshold.source == "oracle (test set)"
    assert (run_dir / "threshold.json").read_bytes() == before  # no other command sees them
    assert main(["evaluate", str(run_dir)]) == 0
    assert files.read_json(run_dir / "metrics.json")["oracle"] is False
    assert load_run(run_dir).threshold.source == "held-out normals"
    score_run = ["score", str(run_dir), files.read_json(run_dir / "recipe.json")["source"]]
    assert main([*score_run, "--output", str(tmp_path)]) == 0
    assert [row["label"] for row in read_csv(tmp_path / "scores.csv")] == ["0"] * 3 + ["1"] * 3


def test_groups_are_held_out_whole_and_remembered(
    mvtec: Path, backbone_options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for i in range(16):
        save_image(tmp_path / "tiles" / "train" / "good" / f"t{i // 2}_{i % 2}.png", i)
    for name in ("good/t8_0.png", "scratch/x.png"):
        save_image(tmp_path / "tiles" / "test" / name, 99)
    common = ["fit", str(tmp_path / "tiles"), "--method", "mahalanobis_ad", "--holdout", "0.25", *backbone_options]
    assert main([*common, "--output", str(tmp_path / "images")]) == 0
    told = capsys.readouterr().err
    warned = "warning: tiles: most file names differ in the last part only, as t0_0.png and t0_1.png do: "
    assert told.count(warned) == 1 and "threshold from 4 held-out images: at most 20 % false alarms" in told
    recipe = files.read_json(tmp_path / "images/mahalanobis_ad/tiles/tiles/recipe.json")
    assert recipe["warning"].startswith("most file names") and recipe["group_by"] is None
    assert main([*common, "--output", str(tmp_path / "groups"), "--group-by", r"(t\d+)_"]) == 0
    told = capsys.readouterr().err
    assert "warning" not in told and "from 4 held-out images of 2 groups: at most 33.3 % false alarms" in told
    assert "5 % false alarms need 19 held-out groups, got 2, which guarantee 33.3 %" in told
    run_dir = tmp_path / "groups/mahalanobis_ad/tiles/tiles"
    recipe = files.read_json(run_dir / "recipe.json")
    assert recipe["warning"] is None and recipe["group_by"] == r"(t\d+)_"
    assert files.read_json(run_dir / "threshold.json")["image"]["n_groups"] == 2
    assert main(["evaluate", str(run_dir)]) == 0  # a defective image needs no group
    assert main(["evaluate", str(run_dir), "--source", str(mvtec), "--category", "bolt"]) == 0  # nor do other data


def test_groups_are_part_of_the_fingerprint():
    settings, images = [Settings.of("padim")], np.zeros((4, 8, 8, 1), np.uint8)
    marks = {
        rundir.fingerprint(settings, [open_data(Arrays(images, groups=groups))["arrays"].train])
        for groups in (None, ["a", "a", "b", "b"], ["a", "b", "a", "b"])
    }
    assert len(marks) == 3


def test_files_of_pages_are_part_of_the_fingerprint(tmp_path: Path):
    marks = set()
    for value in (0, 100):
        frames = [Image.new("L", (8, 8 + value), i + value) for i in range(2)]
        frames[0].save(tmp_path / "scan.tif", save_all=True, append_images=frames[1:])
        train = open_data(tmp_path, pages=True)[tmp_path.name].train
        assert len(train) == 2
        marks.add(rundir.fingerprint([Settings.of("padim")], [train]))
    assert len(marks) == 2


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
    single = tmp_path / "patchcore" / "parts" / "bolt"
    assert main(["evaluate", str(single)]) == 0
    benchmarked = files.read_json(tmp_path / "seed1" / "patchcore" / "parts" / "bolt" / "metrics.json")
    assert benchmarked["metrics"] == pytest.approx(files.read_json(single / "metrics.json")["metrics"], abs=1e-3)


def test_a_benchmark_of_all_methods_leaves_out_those_that_the_backbone_does_not_suit(
    mvtec: Path,
    backbone_options: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(methods, "names", lambda: ("efficientad", "padim", "stfpm"))
    assert main(["benchmark", str(mvtec), *backbone_options, "--output", str(tmp_path)]) == 0
    messages = capsys.readouterr().err
    assert "without efficientad: efficientad learns from photographs of other things" in messages
    assert "without stfpm: " in messages and sorted(path.name for path in tmp_path.iterdir()) == ["padim"]


def test_the_error_of_one_method_does_not_cost_the_others(
    mvtec: Path,
    backbone_options: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def failing(assignments, **options):
        if assignments[0].jobs[0].settings.method == "spade":
            raise RuntimeError("RESOURCE_EXHAUSTED:\nout of memory")
        return fit_all(assignments, **options)

    fit_all = commands.fit_all
    monkeypatch.setattr(commands, "fit_all", failing)
    command = ["benchmark", str(mvtec), *backbone_options, "--output", str(tmp_path), "--methods", "stfpm"]
    assert main([*command, "spade", "padim"]) == 1
    table, messages = capsys.readouterr()
    lines = messages.splitlines()
    assert lines[0].startswith("without stfpm: the backbone must be a ResNet")  # before anything runs
    assert "jaxad: error: spade: RuntimeError: RESOURCE_EXHAUSTED: out of memory" in lines
    assert "padim" in table and "spade" not in table and [path.name for path in tmp_path.iterdir()] == ["padim"]
    assert main([*command, "spade"]) == 2  # there is no other
    assert main(command) == 2 and main([*command, "padm"]) == 2
    assert "no method is called 'padm'" in capsys.readouterr().err


def test_methods_that_the_weights_do_not_suit_are_known_before(mvtec: Path, backbone_options: tuple[str, ...]):
    options = {"weights": backbone_options[3], "image_size": 64}
    deep, shallow = (Settings.of("mahalanobis_ad", layers=(layer,), **options) for layer in ("layer3", "layer1"))
    frozen = load_frozen(deep)
    weights = {deep.backbone: frozen | {"params": {name: frozen["params"][name] for name in ("conv1", "conv2")}}}
    trains = [splits.train for splits in open_data(mvtec, preprocess=deep.preprocess).values()]
    assert not unsuited([shallow], trains, weights)
    refusals = unsuited([deep], trains, weights)
    assert "got layers=('layer3',); choose among them or give complete weights" in str(refusals["mahalanobis_ad"])
    lost = dataclasses.replace(shallow, weights=(Path("nowhere.safetensors"),))
    assert "no weights file nowhere" in str(unsuited([lost], trains, {})["mahalanobis_ad"])


def test_categories_of_similar_numbers_of_images_share_a_program() -> None:
    """The rest would be padded."""
    counts = {"a": 30, "b": 5, "c": 12, "d": 6, "e": 11, "f": 10}
    opened = open_data({name: np.zeros((n, 64, 64, 3), np.uint8) for name, n in counts.items()})
    trains = {name: opened[name].train for name in counts}
    groups = job_groups(Settings.of("padim"), trains, 2, False, None)
    assert [tuple(job.category for job in jobs) for jobs in groups] == [("a",) * 2, ("b", "d", "f") * 2, ("c", "e") * 2]


def test_methods_on_the_same_features_share_them(
    mvtec: Path, backbone_options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    decoded = []
    images = Dataset.images
    monkeypatch.setattr(Dataset, "images", lambda self, indices: decoded.extend(indices) or images(self, indices))
    options = {"weights": backbone_options[3], "image_size": 64, "layers": ("layer2",)}
    settings = [Settings.of("patchcore", **options), Settings.of("padim", n_features=4, **options)]
    train, frozen = open_data(mvtec, category="bolt", preprocess=settings[0].preprocess)["bolt"].train, None
    shared = shared_caches(settings)
    assert shared[0] is shared[1] is not None and shared_caches([settings[0]]) == [None]
    frozen = load_frozen(settings[0])
    for method, cache in zip(settings, shared, strict=True):
        jobs, execution = [Job(method, "bolt", train)], Execution(cache=cache)
        learned = fit_runs(jobs, [tmp_path / method.method], {}, frozen=frozen, execution=execution)
    assert len(decoded) == len(train)
    limits = jaxad.Detector.from_settings(settings[1], learned.models[0], frozen).color_limits()
    np.testing.assert_allclose(limits, jaxad.Detector.from_settings(settings[1]).fit(train).color_limits(), rtol=1e-5)


def test_all_categories_at_once_are_the_categories_one_by_one(
    mvtec: Path, backbone_options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Also when they are fitted in steps, and on a mesh of eight devices."""
    all_at_once, single = tmp_path / "all", tmp_path / "single"
    common = [str(mvtec), *backbone_options, "--method", "patchcore"]
    assert main(["fit", *common, "--category", "nut", "--output", str(single)]) == 0
    nut = single / "patchcore" / "parts" / "nut"
    expected = safetensors.numpy.load_file(nut / "model.safetensors")
    for i, more in enumerate([[], ["--classes-per-step", "1"], ["--devices", "8"]]):
        output = all_at_once / str(i)
        assert main(["fit", *common, *more, "--output", str(output)]) == 0
        assert "2 categories" in capsys.readouterr().err
        run_dir = output / "patchcore" / "parts"
        state = safetensors.numpy.load_file(run_dir / "nut" / "model.safetensors")
        assert {name: leaf.shape for name, leaf in state.items()} == {n: leaf.shape for n, leaf in expected.items()}
        for name, leaf in state.items():
            np.testing.assert_allclose(leaf, expected[name], rtol=1e-4, atol=1e-5)
        assert sorted(path.name for path in run_dir.iterdir()) == ["bolt", "nut"]
        assert files_below(run_dir / "nut") == MODEL
        thresholds = [files.read_json(path / "threshold.json") for path in (run_dir / "nut", nut)]
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
    (run_dir / "bolt" / "metrics.json").unlink()
    assert main(["evaluate", str(run_dir), "--category", "bolt"]) == 0
    assert files.read_json(run_dir / "bolt" / "metrics.json") == before | {"source": recipe["source"]}
    assert (run_dir / "nut" / "metrics.json").exists() and not (run_dir / "metrics.json").exists()


@pytest.mark.parametrize(
    ("name", "values"),
    slow_after(1, [("coreset_sampling_ratio", ("0.1", "0.02")), ("num_neighbors", (1, 3))]),
)
def test_a_sweep_is_a_fit_for_each_value(
    mvtec: Path, backbone_options: tuple[str, ...], tmp_path: Path, capsys, name: str, values: tuple
):
    """One fit, whose smaller coresets and fewer neighbors are those of separate fits."""
    common = [str(mvtec), *backbone_options]
    swept = ["--sweep", f"{name}={values[0]},{values[1]}", "--output", str(tmp_path / "swept")]
    assert main(["benchmark", *common, "--methods", "patchcore", *swept]) == 0
    out = capsys.readouterr().out
    assert all(f"patchcore {name}={value}" in " ".join(out.split()) for value in values)
    for value in values:
        single, option = tmp_path / str(value), f"--{name.replace('_', '-')}"
        assert main(["fit", *common, option, str(value), "--output", str(single)]) == 0
        assert main(["evaluate", str(single)]) == 0
        for category in ("bolt", "nut"):
            run_dir = tmp_path / "swept" / f"{name}={value}" / "patchcore" / "parts" / category
            pair = run_dir, single / "patchcore" / "parts" / category
            swept_state, expected = (safetensors.numpy.load_file(d / "model.safetensors") for d in pair)
            assert swept_state["bank"].shape == expected["bank"].shape and swept_state["size"] == expected["size"]
            np.testing.assert_allclose(swept_state["bank"], expected["bank"], rtol=1e-4, atol=1e-5)
            assert swept_state["neighbors"] == expected["neighbors"]
            metrics = [files.read_json(d / "metrics.json")["metrics"] for d in pair]
            assert metrics[0] == pytest.approx(metrics[1], abs=1e-4)
            loaded = jaxad.load(run_dir)
            assert loaded.settings.hyperparameters[name] == float(value)


def test_help_shows_the_options_of_the_method(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as raised:
        main(["fit", "--help", "--method", "padim"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert raised.value.code == 0
    assert "--n-features {None}|INT|{all} Number of channels drawn at random" in text and "(default: 0.01)" in text
    assert "--holdout {None}|FLOAT" in text and "--coreset-sampling-ratio" not in text


def test_lists(capsys: pytest.CaptureFixture[str]):
    assert main(["list"]) == 0 and main(["weights", "list"]) == 0 and main([]) == 0
    text = capsys.readouterr().out
    assert [word in text for word in ("patchcore", "arXiv:2106.08265", "wide_resnet50_2", "benchmark")] == [True] * 4


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_help_page(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as raised:
        main(["fit", "demo", "--method", name, "--help"])
    assert raised.value.code == 0 and "--batch-size" in capsys.readouterr().out


def test_outputs_are_files_and_links_stay_links(flat_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "link.html").symlink_to("page.html")
    assert main(["report", str(flat_run), "--output", str(tmp_path / "link.html")]) == 0
    assert (tmp_path / "link.html").is_symlink() and "</html>" in (tmp_path / "page.html").read_text()
    os.mkfifo(tmp_path / "pipe")
    assert main(["report", str(flat_run), "--output", str(tmp_path / "pipe")]) == 2
    assert f"the output must be a file, but {tmp_path / 'pipe'} is something else" in capsys.readouterr().err
    assert (tmp_path / "pipe").is_fifo()
    model = flat_run / "model.json"
    before = model.read_bytes()
    for command in (["report", str(flat_run), "--output"], ["evaluate", str(flat_run), "--report"]):
        assert main([*command, str(model)]) == 2 and model.read_bytes() == before
        assert "replaces no file that is not an HTML page" in capsys.readouterr().err
        assert main([*command, str(model / "page.html")]) == 2 and f"{model} is none" in capsys.readouterr().err
