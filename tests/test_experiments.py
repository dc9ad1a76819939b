"""Every recipe has a smoke variant that runs in seconds and writes the result file that the README's table reads."""

import hashlib
import importlib.util
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxad
from jaxad.backbones import backbone, load
from jaxad.driver.fit import abstract_state
from jaxad.methods import METHODS
from jaxad.report.tables import APART

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
METRICS = {"image_AUROC", "image_AP", "image_F1max"}


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"experiments_{name}", EXPERIMENTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    return script("run")


@pytest.fixture
def _standard_promotion() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("name", ["patchcore_mtd", "padim_bottle", "spade_mtd", "mahalanobis_ad_mtd_npca"])
def test_a_smoke_run_writes_a_whole_result(runner: ModuleType, name: str, tmp_path: Path) -> None:
    runner.main(runner.Options((name,), results=tmp_path, smoke=True))
    result = json.loads((tmp_path / f"{name}.json").read_text())
    recipe = runner.all_recipes()[name]
    assert result["recipe"] == name and result["method"] == recipe.method and result["seeds"] == list(recipe.seeds)
    assert result["metrics"].keys() >= METRICS
    assert all(0 <= value["mean"] <= 1 for value in result["metrics"].values())
    assert result["published"] == recipe.published
    assert set(result["seconds"]) == {"compile", "fit", "score_per_image"} and result["peak_bytes"] > 0
    assert len(result["categories"]) == 4
    means = [category["metrics"]["image_AUROC"]["mean"] for category in result["categories"].values()]
    np.testing.assert_allclose(result["metrics"]["image_AUROC"]["mean"], np.mean(means))


def test_an_unknown_recipe_names_those_there_are_in_one_line(runner: ModuleType, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "nonsense", "--smoke"])
    with pytest.raises(SystemExit) as done:
        script("command").start(runner.main, runner.Options)
    said = capsys.readouterr().err
    assert done.value.code == 2 and said.count("\n") == 1 and "patchcore_mtd" in said and "got nonsense" in said


def test_learning_rates_are_compared_on_images_that_were_not_learned(tmp_path: Path) -> None:
    select = script("select_rate")
    options = select.Options("nf_demo", (1e-12, 1e-5), epochs=3, learn=24, hold_out=8, results=tmp_path, smoke=True)
    select.main(options)
    result = json.loads((tmp_path / "select_nf_demo.json").read_text())
    assert result["images"] == {"learned": 24, "held_out": 8}
    nothing, something = result["held_out_loss"].values()
    assert len(something) == 3 and something[-1] < something[0] < nothing[0]
    np.testing.assert_allclose(nothing, nothing[0], rtol=1e-4)


def test_other_hyperparameters_are_compared_too(tmp_path: Path) -> None:
    select = script("select_rate")
    given = dict(vary="clamp", epochs=1, learn=8, hold_out=8, results=tmp_path, smoke=True)
    select.main(select.Options("nf_demo", (1, 2), **given))
    result = json.loads((tmp_path / "select_nf_demo_clamp.json").read_text())
    assert result["varied"] == "clamp"
    one, two = result["held_out_loss"].values()
    assert list(result["held_out_loss"]) == ["1", "2"] and one != two


def test_a_recipe_with_photographs_is_opened_with_them(tmp_path: Path) -> None:
    opened = script("loops").opened
    for i in range(2):
        Image.new("RGB", (512, 512), (100 * i, 0, 0)).save(tmp_path / f"{i}.png")
    _, frozen, _ = opened("efficientad_demo", 1, "demo", None, False, tmp_path)
    assert frozen["auxiliary"].shape == (2, 256, 256, 3)
    with pytest.raises(ValueError, match="auxiliary"):
        opened("efficientad_demo", 1, "demo", None, False)


@pytest.mark.usefixtures("_standard_promotion")
def test_the_curve_of_test_images_by_epoch(tmp_path: Path) -> None:
    curve = script("epoch_curve")
    path = tmp_path / "epochs_fastflow_demo.json"
    for epochs in (1, 2):
        curve.main(curve.Options("fastflow_demo", epochs, results=tmp_path, smoke=True))
        found = json.loads(path.read_text())
        assert len(found["curves"]["jaxad"]["pixel_AUROC"]) == epochs
        found["curves"]["FrEIA"] = {"pixel_AUROC": [0.5]}
        path.write_text(json.dumps(found))
    assert set(json.loads(path.read_text())["curves"]) == {"jaxad", "FrEIA"}
    risen = [0.1, 0.3, 0.2, 0.1, 0.2, 0.9]
    assert (curve.stopped(risen, 3), curve.stopped(risen, 5), curve.stopped(risen[:1], 3)) == (0.3, 0.9, 0.1)
    with pytest.raises(ValueError, match="8 3x3 couplings, got fastflow_demo"):
        curve.main(curve.Options("fastflow_demo", torch_python=Path("python"), results=tmp_path, smoke=True))
    with pytest.raises(ValueError, match="learning rate, got patchcore_demo"):
        curve.main(curve.Options("patchcore_demo", results=tmp_path, smoke=True))


def test_every_committed_result_is_of_a_recipe_that_still_says_the_same(runner: ModuleType) -> None:
    known = runner.all_recipes()
    for path in (EXPERIMENTS / "results").glob("*.json"):
        if path.stem.startswith(APART):
            continue
        result, recipe = json.loads(path.read_text()), known[path.stem]
        assert result["hyperparameters"] == json.loads(json.dumps(dict(recipe.hyperparameters))), path.name
        assert result["backbone"] == json.loads(json.dumps(recipe.backbone)), path.name
        assert result["seeds"] == list(recipe.seeds), path.name
        assert (result["published"], result["image_size"]) == (dict(recipe.published), recipe.image_size), path.name
        assert "--smoke" not in result["command"], path.name


def test_recipes_that_have_not_run_can_be_traced(runner: ModuleType) -> None:
    """Those for machines that were not at hand."""
    done = {path.stem for path in (EXPERIMENTS / "results").glob("*.json")}
    waiting = {name: recipe for name, recipe in runner.all_recipes().items() if name not in done}
    for name, recipe in waiting.items():
        preprocess = dict(image_size=recipe.image_size, center_crop=recipe.center_crop)
        detector = jaxad.Detector(recipe.method, backbone=recipe.backbone, **preprocess, **recipe.hyperparameters)
        method, size = detector.method, detector.preprocess.output_size((900, 900))
        frozen = detector.frozen_shapes()
        spec = jax.eval_shape(method.embed, frozen, jax.ShapeDtypeStruct((4, *size, 3), jnp.uint8))
        scores = jax.eval_shape(method.score, abstract_state(method, frozen, spec), frozen, spec)
        assert scores.image.shape == (4,) and (scores.pixel is None or scores.pixel.shape == (4, *size)), name


def test_every_weights_file_of_a_recipe_is_in_its_record(runner: ModuleType, tmp_path: Path) -> None:
    files = [tmp_path / "one.safetensors", tmp_path / "other.safetensors"]
    for file in files:
        file.write_bytes(file.name.encode())
    digests = [hashlib.sha256(file.name.encode()).hexdigest() for file in files]
    several = runner.recipes.Recipe("uninformed_students", "demo", ("patch17", "patch33"))
    one = several._replace(backbone="patch17")
    assert runner.sha256_of_weights(several, runner.Options((), weights=tuple(files))) == digests
    assert runner.sha256_of_weights(one, runner.Options((), weights=(files[1],))) == digests[1]
    assert runner.sha256_of_weights(one._replace(backbone=None), runner.Options(())) is None
    with pytest.raises(ValueError, match="got 2 backbones and 1 files"):
        runner.run("both", several, runner.Options((), weights=(files[1],)))


def test_a_recipe_that_was_killed_goes_on(runner: ModuleType, tmp_path: Path, monkeypatch) -> None:
    """What was measured is not measured again, and the result is that of one go."""
    recipe = runner.recipes.Recipe("patchcore", "demo", "pdn_small", smoke_backbone="pdn_small")
    evaluate, calls = runner.evaluate, []

    def cut_off(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*given)

    monkeypatch.setattr(runner, "evaluate", cut_off)
    options = runner.Options((), results=tmp_path / "kept", checkpoints=tmp_path / "checkpoints", smoke=True)
    with pytest.raises(KeyboardInterrupt):
        runner.run("some", recipe, options)
    assert not options.results.exists()
    runner.run("some", recipe, options)
    assert len(calls) == 1 + 4  # one of the four categories twice
    runner.run("some", recipe, runner.Options((), results=tmp_path / "whole", smoke=True))
    kept, whole = (json.loads((tmp_path / part / "some.json").read_text()) for part in ("kept", "whole"))
    assert kept["metrics"] == whole["metrics"] and kept["categories"] == whole["categories"]
    assert kept["seconds"].keys() == whole["seconds"].keys() and not list(options.checkpoints.iterdir())


@pytest.mark.usefixtures("_standard_promotion")  # optax's AdamW counts steps in integers
def test_distillation_lowers_the_loss_resumes_and_writes_loadable_weights(tmp_path: Path) -> None:
    distill = script("distill_backbone")
    random = np.random.default_rng(0)
    (tmp_path / "photographs").mkdir()
    for i in range(4):
        pixels = random.integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(pixels).resize((80, 80)).save(tmp_path / "photographs" / f"{i}.png")
    recipe = distill.Recipe(
        tmp_path / "photographs",
        teacher="resnet50",
        out=tmp_path / "pdn_small.safetensors",
        results=tmp_path / "distill_backbone.json",
        workdir=tmp_path / "work",
        crops=32,
        size=64,
        batch_size=8,
        epochs=3,
    )
    distill.main(recipe)
    result = json.loads(recipe.results.read_text())
    assert result["loss_curve"]["train"][-1] < result["loss_curve"]["train"][0]
    assert result["resumed_from_epoch"] == 0 and result["file_bytes"] <= 6 << 20
    from jaxad import backbones

    frozen = backbones.load("pdn_small", recipe.out)
    image = random.integers(0, 256, (1, 64, 64, 3), np.uint8)
    described = jax.jit(backbones.features("pdn_small", ("layer3",)))(frozen, image)["layer3"]
    assert described.shape == (1, 8, 8, 384) and bool(np.isfinite(described).all())
    distill.main(recipe)
    assert json.loads(recipe.results.read_text())["resumed_from_epoch"] == 3


def test_the_benchmark_beside_peers_agrees_with_them(tmp_path: Path) -> None:
    bench = script("bench_peers")
    bench.main(bench.Options(backbone="resnet18", weights=random_resnet18(tmp_path), results=tmp_path, smoke=True))
    result = json.loads((tmp_path / "bench_peers.json").read_text())
    assert result["knn"]["same_neighbors"] == 1.0
    radius = result["coreset"]["radius"]
    np.testing.assert_allclose(radius["jaxad"], radius["plain jitted greedy"], rtol=1e-4)
    assert {"jaxad", "FAISS flat", "scikit-learn"} < result["knn"]["contenders"].keys()


def test_the_benchmark_of_a_whole_coreset(tmp_path: Path) -> None:
    bench = script("bench_coreset")
    bench.main(bench.Options(results=tmp_path, smoke=True))
    result = json.loads((tmp_path / "bench_coreset.json").read_text())
    assert result["patches"] == 6 * 64 and result["coreset"] == 38 and result["radius"] > 0


def test_the_memory_of_one_point_is_that_of_its_process() -> None:
    command = [sys.executable, EXPERIMENTS / "bench_memory.py", "--one", "padim score", "20", "--size", "64"]
    point = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    assert point["images"] == 20 and point["peak_bytes"] >= point["before_scoring"] > point["model_bytes"] > 0


def random_resnet18(folder: Path) -> Path:
    """A ResNet-18 of random weights under torchvision's names, batch norm an identity."""
    from safetensors.numpy import save_file

    from jaxad.backbones import backbone

    tensors = {}
    for name, leaf in backbone("resnet18").init(jax.random.key(0))["params"].items():
        norm = name[:-1] + "1" if name.endswith("downsample.0") else name.replace("conv", "bn")
        width = leaf["bias"].shape
        tensors[f"{name}.weight"] = np.ascontiguousarray(np.asarray(leaf["kernel"]).transpose(3, 2, 0, 1))
        ones, zeros = np.ones(width, np.float32), np.zeros(width, np.float32)
        stats = {"weight": ones, "bias": zeros, "running_mean": zeros, "running_var": ones}
        tensors |= {f"{norm}.{key}": value for key, value in stats.items()}
    path = folder / "resnet18.safetensors"
    save_file(tensors, path)
    return path


def test_classes_at_once_give_the_numbers_of_the_loop(tmp_path: Path) -> None:
    bench = script("bench_classes")
    bench.main(bench.Options(methods=("patchcore", "padim"), results=tmp_path, smoke=True))
    result = json.loads((tmp_path / "bench_classes.json").read_text())
    assert len(result["classes"]) == 4 and 0 < result["padded_share"]["train"] < 1
    for measured in result["methods"].values():
        assert measured["contenders"].keys() == measured["ratio"].keys() > {"one program", "loop"}
        loop = measured["contenders"]["loop"]
        for contender in measured["contenders"].values():
            assert contender["over_loop"]["image"] <= 1e-5
            assert contender["over_loop"]["pixel"] <= 1e-5
            assert contender["image_AUROC"] == loop["image_AUROC"]
            assert set(contender["phases"]) == {"start", "collect", "finish", "score"}


def test_devices_share_the_work(tmp_path: Path) -> None:
    bench = script("bench_scaling")
    bench.main(bench.Options(results=tmp_path, smoke=True))
    programs = json.loads((tmp_path / "bench_scaling.json").read_text())["programs"]
    for axes in programs.values():
        for axis in ("data", "class"):
            assert axes[axis].keys() == {"embed", "update", "finalize", "score", "fit", "scoring"}
            assert all(axes[axis][whole]["growth"]["flops"]["2"] < 1.1 for whole in ("fit", "scoring"))
        assert "told_by_a_device" in axes["data"]["embed"]


def test_loops_count_as_often_as_they_go_round() -> None:
    bench = script("bench_scaling")

    def rounds(n: int, x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, n, lambda i, y: jax.lax.while_loop(lambda z: z.sum() < 1, lambda z: z @ x, y), x)

    cost = {}
    for n in (3, 6):
        compiled = jax.jit(rounds, static_argnums=0).lower(n, jax.ShapeDtypeStruct((64, 64), np.float32)).compile()
        cost[n] = bench.Module(compiled.as_text(), (5.0,)).cost().flops
    product = 2 * 64**3
    assert cost[6] - cost[3] == pytest.approx(3 * 5 * product, rel=0.05)
    assert cost[3] == pytest.approx(3 * 5 * product, rel=0.05)


def test_a_stream_is_covered_within_its_bounds(tmp_path: Path) -> None:
    script("bench_scaling").main(script("bench_scaling").Options(results=tmp_path, smoke=True))
    bench = script("bench_stream")
    bench.main(bench.Options(results=tmp_path, smoke=True))
    result = json.loads((tmp_path / "bench_stream.json").read_text())
    assert set(result["methods"]) == {"padim", "patchcore"}
    for measured in result["methods"].values():
        assert measured["images"] == 96 and len(measured["points"]) == 6
        assert set(measured["seconds_per_image"]) == {"decode", "embed", "update", "finish"}
    covering = result["methods"]["patchcore"]["covering"]
    assert covering["true_on_the_sample"] <= covering["proven_of_the_stream"] * 1.001
    sample = covering["sample"]
    assert sample["true"] <= sample["proven"] * 1.001 and sample["proven_over_at_once"] <= sample["a_priori"]
    assert {row["devices"] for row in result["table"]} == set(bench.DEVICES) and len(result["assumptions"]) > 3


@pytest.mark.usefixtures("_standard_promotion")
def test_the_benchmark_of_flows(tmp_path: Path) -> None:
    bench = script("bench_flows")
    bench.main(bench.Options(methods=("nf",), peers=("cflow",), results=tmp_path, smoke=True))
    result = json.loads((tmp_path / "bench_flows.json").read_text())
    assert set(result["flows"]["nf"]["seconds_a_step"]) == {"cached", "plain_loop", "backbone"}
    assert result["flows"]["nf"]["plain_loop_over_cached"] > 0 and result["freia"]["cflow"]["seconds_a_step"] > 0
    assert result["classes_at_once"]["nf"]["classes"] == 4


@pytest.mark.usefixtures("_standard_promotion")
def test_the_experiment_on_foreign_images(tmp_path: Path) -> None:
    experiment = script("nf_ood")
    names = ("RealNVP, cycle mask", "RealNVP on embeddings", "RealNVP on ADBench's embeddings")
    for part in (names[:1], names[1:]):
        experiment.main(experiment.Options(flows=part, train=64, test=8, hidden=2, results=tmp_path, smoke=True))
    flows = json.loads((tmp_path / "nf_ood.json").read_text())["flows"]
    assert tuple(flows) == names
    assert flows[names[0]]["bits_per_dimension"] > 7 and flows[names[1]]["bits_per_dimension"] is None
    assert set(flows[names[0]]["auroc"]) == {"one color", "digits", "tiles", "textures"}
    assert set(flows[names[2]]["auroc"]) == {"SVHN", "other classes of CIFAR-10"}
    for kind in ("good", "crack", "dent"):
        (tmp_path / "bolt" / "test" / kind).mkdir(parents=True)
    options = dict(train=16, test=8, hidden=2, results=tmp_path, smoke=True)
    experiment.main(experiment.Options(flows=names[:1], aligned=tmp_path / "bolt", **options))
    aligned = json.loads((tmp_path / "nf_ood_bolt.json").read_text())
    assert aligned["foreign_images"] == {
        **dict.fromkeys(("one color", "digits", "tiles", "textures", "background", "CIFAR-10"), 8),
        "defects": 16,
    }
    assert set(aligned["flows"][names[0]]["auroc"]) == set(aligned["foreign_images"])
    assert "flow, trained on bolt" in script("update_readme").foreign_images(aligned)
    with pytest.raises(ValueError, match="bolt has no images"):
        experiment.resized(experiment.Options(), tmp_path / "bolt", 8)
    with pytest.raises(ValueError, match="flows must be of"):
        experiment.main(experiment.Options(flows=names[2:], aligned=tmp_path / "bolt", **options))
    assert all(0 <= value <= 1 for flow in flows.values() for value in flow["auroc"].values())


def test_the_benchmark_and_the_sheet_of_generators(tmp_path: Path) -> None:
    bench = script("bench_generators")
    names = ("Perlin mask", "confetti", "feature ascent (GLASS)")
    x, noise = np.random.default_rng(0).standard_normal((2, 1, 3, 4, 384), np.float32)
    start = x + 0.015 * noise
    moved = bench.plain_climb(x, start)
    np.testing.assert_allclose(bench.climb(*map(jnp.asarray, (x, start))), moved, rtol=0, atol=1e-5)
    assert np.linalg.norm(moved - start, axis=-1).min() > 0.01
    bench.main(bench.Options(generators=names, results=tmp_path, smoke=True))
    path = tmp_path / "bench_generators.json"
    record = json.loads(path.read_text())
    rows = record["devices"]["cpu"]
    assert "| confetti | cpu | " in script("update_readme").speed_of_generators(record)
    record["devices"] |= {"another": rows}
    path.write_text(json.dumps(record))
    bench.main(bench.Options(generators=names[:1], results=tmp_path, smoke=True))
    kept = json.loads(path.read_text())["devices"]
    assert tuple(kept["cpu"]) == names and kept["another"] == rows and kept["cpu"][names[2]] == rows[names[2]]
    assert tuple(rows) == names and all(row["ratio"] > 0 and row["compile_seconds"] > 0 for row in rows.values())
    bench.main(bench.Options(generators=names[:2], sheet=tmp_path / "sheet.png", smoke=True))
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert min(sheet.size) > 200
    with pytest.raises(ValueError, match=r"generators must be of CutPaste.*got glitter"):
        bench.main(bench.Options(generators=("glitter",), smoke=True))


@pytest.mark.usefixtures("_standard_promotion")
def test_the_ablation_of_generators(tmp_path: Path) -> None:
    ablate = script("ablate_generators")
    names = ("confetti", "feature noise", "feature ascent")
    ablate.main(ablate.Options(generators=names, results=tmp_path, smoke=True))
    result = json.loads((tmp_path / "ablate_generators_demo.json").read_text())
    assert tuple(result["generators"]) == names
    for categories in result["generators"].values():
        assert len(categories) == 4
        for kinds in categories.values():
            assert "all" in kinds and "good" not in kinds and len(kinds) > 1
            assert all(0 <= entry[metric] <= 1 for entry in kinds.values() for metric in entry)
    table = script("update_readme").transfer(result)
    assert "| learned from | all | crack | dent |" in table and "| feature noise | " in table
    with pytest.raises(ValueError, match=r"generators must be of CutPaste, .*; got fog"):
        ablate.main(ablate.Options(generators=("fog",), results=tmp_path, smoke=True))


@pytest.mark.usefixtures("_standard_promotion")
def test_the_benchmark_of_synthesis(tmp_path: Path) -> None:
    bench = script("bench_synthesis")
    path = tmp_path / "bench_synthesis.json"
    path.write_text(json.dumps({"devices": {"another": {}}}))
    bench.main(bench.Options(results=tmp_path, smoke=True))
    devices = json.loads(path.read_text())["devices"]
    result = devices.pop("cpu")
    assert devices.keys() == {"another"} and result["within_step"]["host_operations"] == 0 and result["ratio"] > 0
    assert result["by_host"]["host_seconds_a_step"] > result["without"]["host_seconds_a_step"] > 0
    for name in ("within_step", "by_host", "without"):
        low, high = result[name]["quartiles"]
        assert 0 < low <= result[name]["seconds_a_step"] <= high
    assert "| by the host | cpu | 32 | 2 | 2 |" in script("update_readme").place_of_synthesis(
        {"devices": {"cpu": result}}
    )


def test_the_profile_of_training(tmp_path: Path) -> None:
    profile, path = script("profile_draem"), tmp_path / "profile_draem.json"
    path.write_text(json.dumps({"devices": {"another": {}}}))
    profile.main(profile.Options(results=tmp_path, smoke=True))
    record = json.loads(path.read_text())
    assert record["devices"].keys() == {"another", "cpu"}
    result = record["devices"].pop("cpu")
    assert 0 < result["share_at_work"] <= 1 and 0 <= result["longest_pause_seconds"] < result["seconds"]
    assert "| cpu | 32 | 2 | 4 | " in script("update_readme").work_and_pauses({"devices": {"cpu": result}})
    at_work = np.array([[3.0, 4.0], [0.0, 2.0], [1.0, 1.5], [4.5, 5.0]])
    np.testing.assert_allclose(profile.pauses(at_work), [0.0, 1.0, 0.5])


def test_a_gpu_is_at_work_while_a_kernel_runs() -> None:
    def line(name: str, *events: tuple[int, int, int]) -> str:
        ran = (f"events {{ metadata_id: {i} offset_ps: {t}000 duration_ps: {d}000 }}" for i, t, d in events)
        return f"lines {{ name: '{name}' timestamp_ns: 5 {' '.join(ran)} }}"

    kinds = " ".join(
        f"event_metadata {{ key: {i} value {{ id: {i} name: '{name}' }} }}"
        for i, name in ((1, "fusion"), (2, "MemcpyH2D"))
    )
    lines = [line("Stream #13(Compute,MemcpyH2D)", (1, 10, 20), (2, 40, 50)), line("XLA Modules", (1, 0, 100))]
    text = f"planes {{ name: '/device:GPU:0' {' '.join(lines)} {kinds} }}"
    text += f" planes {{ name: '/host:CPU' {line('tf_XLAEigen', (1, 0, 100))} {kinds} }}"
    found = [*script("profile_draem").spans(jax.profiler.ProfileData.from_text_proto(text), cpu=False)]
    np.testing.assert_allclose(found, [(15e-9, 35e-9)])


@pytest.mark.usefixtures("_standard_promotion")
def test_the_benchmark_of_latency(tmp_path: Path) -> None:
    bench = script("bench_latency")
    bench.OWN["efficientad"] = ("tiny_pdn",)  # of tests.cases
    for methods in (("padim",), ("efficientad",)):
        bench.main(bench.Options(methods=methods, results=tmp_path, smoke=True))
    record = json.loads((tmp_path / "bench_latency.json").read_text())
    networks = [(row["method"], row["backbone"]) for row in record["rows"]]
    assert networks == [("efficientad", "tiny_pdn"), ("padim", "resnet18")]
    for row in record["rows"]:
        assert set(row["batches"]) == {"1", "2"}
        for found in row["batches"].values():
            assert found["images_a_second"] > 0 and 0 < found["backbone_share"] <= 1 and found["operations"] > 0
    table = script("update_readme").latency(record)
    assert "| `padim` | resnet18 | cpu | " in table
    fastest = max(row["peak_flops_a_second"] for row in record["rows"])
    share = found["operations"] / 2 * found["images_a_second"] / fastest
    assert table.splitlines()[-1].endswith(f" | {share:.0%} |")
    found["operations"] = None
    assert script("update_readme").latency(record).splitlines()[-1].endswith(" | – |")


def test_the_arithmetic_of_an_accelerator_is_that_of_the_cpus_row(monkeypatch) -> None:
    bench = script("bench_latency")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert bench.operations(None, {"batches": {"32": {"operations": 7.0}}}, 32) == 7.0
    assert bench.operations(None, None, 32) is None


def test_latency_is_measured_on_stages_that_the_weights_at_hand_have() -> None:
    """Those of a ResNet up to layer3."""
    bench = script("bench_latency")
    frozen = backbone("resnet18").init(jax.random.key(0))
    held = {k: v for k, v in frozen["params"].items() if not k.startswith("layer4")}
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), np.uint8)
    for name in set(METHODS).difference(bench.OWN):
        if "backbone" not in inspect.signature(METHODS[name]).parameters:
            continue
        jax.eval_shape(
            METHODS[name](backbone="resnet18", **bench.SETTINGS.get(name, {})).embed, frozen | {"params": held}, image
        )


@pytest.mark.usefixtures("_standard_promotion")
def test_the_loss_of_a_teacher_of_patches_adds_three_terms() -> None:
    distill, random = script("distill_teacher"), np.random.default_rng(0)
    own, decoded, target = (random.normal(0, 0.5, (12, width)).astype(np.float32) for width in (6, 8, 8))
    own[:, 0] = 1.0  # a channel that is constant correlates with none
    near = own + random.normal(0, 0.3, own.shape).astype(np.float32)
    valid = np.arange(12) < 10
    terms = distill.terms(*map(jnp.asarray, (own, near, decoded, target)))
    a, n, d, t = (leaf.astype(np.float64) for leaf in (own, near, decoded, target))
    distilled = np.linalg.norm(d - t, axis=1) ** 2
    nearest = [min(np.linalg.norm(a[i] - a[i - 1]), np.linalg.norm(n[i] - a[i - 1])) ** 2 for i in range(12)]
    metric = np.maximum(0, 1 + np.linalg.norm(a - n, axis=1) ** 2 - nearest)
    assert 0 < np.count_nonzero(metric[valid]) < 10
    correlation = np.corrcoef(a[:, 1:].T)
    compact = sum(correlation[i, j] ** 2 for i in range(5) for j in range(5) if i != j) / 6
    for found, expected in zip(terms, (distilled, metric, compact), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    loss = (distilled + metric)[valid].mean() + compact
    np.testing.assert_allclose(distill.total(*terms, jnp.asarray(valid)), loss, rtol=1e-5)


def test_a_distilled_teacher_of_patches_can_be_loaded(tmp_path: Path) -> None:
    distill, out = script("distill_teacher"), tmp_path / "patch9.safetensors"
    options = distill.Options(
        patch=9, epochs=1, batch_size=4, out=out, results=tmp_path, workdir=tmp_path / "work", smoke=True
    )
    distill.main(options)
    result = json.loads((tmp_path / "distill_patch9.json").read_text())
    assert result["patches"] == 40 and np.isfinite(result["variance_explained"])
    maps = backbone("patch9").apply(load("patch9", out), jnp.zeros((1, 24, 24, 3)), ("stride8",))
    assert maps["stride8"].shape == (1, 3, 3, 128) and np.isfinite(maps["stride8"]).all()
    with pytest.raises(ValueError, match="has no images: give a folder"):
        (tmp_path / "empty").mkdir()
        distill.crops(distill.Options(images=tmp_path / "empty"))
