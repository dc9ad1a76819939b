"""Benchmarks: the smoke variants write what the tables read, and contenders agree."""

import inspect
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from experiments import update_readme
from experiments.bench import (
    anomalib_peers,
    classes,
    coreset,
    flows,
    generators,
    latency,
    peers,
    plain_generators,
    profile_draem,
    scaling,
    stream,
    synthesis,
)
from experiments.bench.program_cost import Module
from jaxad.backbones import backbone
from jaxad.methods import METHODS


def random_resnet18(folder: Path) -> Path:
    """Random weights of a ResNet-18 under torchvision's names; its batch norms are identities."""
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


@pytest.mark.slow
def test_peers_find_the_same_neighbors_and_radius(tmp_path: Path) -> None:
    weights = random_resnet18(tmp_path)
    peers.main(peers.Options(backbone="resnet18", weights=weights, results=tmp_path, smoke=True))
    result = json.loads((tmp_path / "bench_peers.json").read_text())
    assert result["knn"]["same_neighbors"] == 1.0
    radius = result["coreset"]["radius"]
    np.testing.assert_allclose(radius["jaxad"], radius["plain jitted greedy"], rtol=1e-4)
    assert {"jaxad", "FAISS flat", "scikit-learn"} < result["knn"]["contenders"].keys()


@pytest.mark.slow
def test_jaxad_beside_anomalib(tmp_path: Path) -> None:
    options = anomalib_peers.Options("demo", methods=("padim", "stfpm"), results=tmp_path, smoke=True)
    anomalib_peers.main(options)
    path = tmp_path / "anomalib_demo.json"
    before = json.loads(path.read_text())
    anomalib_peers.main(options)  # keeps what is there
    assert json.loads(path.read_text()) == before and set(before["methods"]) == {"padim", "stfpm"}
    for row in before["methods"].values():
        row["anomalib"] = row["jaxad"]
    assert "| `stfpm` | 1 |" in update_readme.beside_anomalib(before)


@pytest.mark.slow
def test_coreset_of_a_whole_data_set(tmp_path: Path) -> None:
    coreset.main(coreset.Options(results=tmp_path, smoke=True))
    result = json.loads((tmp_path / "bench_coreset.json").read_text())
    assert result["patches"] == 6 * 64 and result["coreset"] == 38 and result["radius"] > 0


@pytest.mark.slow
def test_classes_in_one_program_give_the_numbers_of_the_loop(tmp_path: Path) -> None:
    classes.main(classes.Options(methods=("patchcore", "padim"), results=tmp_path, smoke=True))
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


@pytest.mark.slow
def test_devices_share_the_work_and_a_stream_is_covered_within_its_bounds(tmp_path: Path) -> None:
    scaling.main(scaling.Options(results=tmp_path, smoke=True))
    programs = json.loads((tmp_path / "bench_scaling.json").read_text())["programs"]
    for axes in programs.values():
        for axis in ("data", "class"):
            assert axes[axis].keys() == {"embed", "update", "finalize", "score", "fit", "scoring"}
            assert all(axes[axis][run]["growth"]["flops"]["2"] < 1.1 for run in ("fit", "scoring"))
        assert "communication" in axes["data"]["embed"]
    stream.main(stream.Options(results=tmp_path, smoke=True))
    result = json.loads((tmp_path / "bench_stream.json").read_text())
    assert set(result["methods"]) == {"padim", "patchcore"}
    for measured in result["methods"].values():
        assert measured["images"] == 96 and len(measured["points"]) == 6
        assert set(measured["seconds_per_image"]) == {"decode", "embed", "update", "finish"}
    covering = result["methods"]["patchcore"]["covering"]
    assert covering["true_on_the_sample"] <= covering["proven_of_the_stream"] * 1.001
    sample = covering["sample"]
    assert sample["true"] <= sample["proven"] * 1.001 and sample["proven_over_at_once"] <= sample["a_priori"]
    assert {row["devices"] for row in result["table"]} == set(stream.DEVICES) and len(result["assumptions"]) > 3


def test_bodies_of_loops_count_once_per_round() -> None:
    def rounds(n: int, x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, n, lambda i, y: jax.lax.while_loop(lambda z: z.sum() < 1, lambda z: z @ x, y), x)

    cost = {}
    for n in (3, 6):
        compiled = jax.jit(rounds, static_argnums=0).lower(n, jax.ShapeDtypeStruct((64, 64), np.float32)).compile()
        cost[n] = Module(compiled.as_text(), (5.0,)).cost().flops
    product = 2 * 64**3
    assert cost[6] - cost[3] == pytest.approx(3 * 5 * product, rel=0.05)
    assert cost[3] == pytest.approx(3 * 5 * product, rel=0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_speed_of_flows(tmp_path: Path) -> None:
    flows.main(flows.Options(methods=("nf",), peers=("cflow",), results=tmp_path, smoke=True))
    result = json.loads((tmp_path / "bench_flows.json").read_text())
    assert set(result["flows"]["nf"]["seconds_a_step"]) == {"cached", "plain_loop", "backbone"}
    assert result["flows"]["nf"]["plain_loop_over_cached"] > 0 and result["freia"]["cflow"]["seconds_a_step"] > 0
    assert result["classes_at_once"]["nf"]["classes"] == 4


def test_ascent_in_numpy_is_that_of_jaxad() -> None:
    x, noise = np.random.default_rng(0).standard_normal((2, 1, 3, 4, 384), np.float32)
    start = x + 0.015 * noise
    moved = plain_generators.climb(x, start)
    np.testing.assert_allclose(generators.climb(*map(jnp.asarray, (x, start))), moved, rtol=0, atol=1e-5)
    assert np.linalg.norm(moved - start, axis=-1).min() > 0.01


@pytest.mark.slow
def test_speed_of_generators(tmp_path: Path) -> None:
    names = ("Perlin mask", "confetti", "feature ascent (GLASS)")
    generators.main(generators.Options(generators=names, results=tmp_path, smoke=True))
    path = tmp_path / "bench_generators.json"
    record = json.loads(path.read_text())
    rows = record["devices"]["cpu"]
    assert tuple(rows) == names and all(row["ratio"] > 0 and row["compile_seconds"] > 0 for row in rows.values())
    assert "| confetti | cpu | " in update_readme.speed_of_generators(record)
    record["devices"] |= {"another": rows}
    path.write_text(json.dumps(record))
    generators.main(generators.Options(generators=names[:1], results=tmp_path, smoke=True))
    kept = json.loads(path.read_text())["devices"]
    assert tuple(kept["cpu"]) == names and kept["another"] == rows and kept["cpu"][names[2]] == rows[names[2]]


def test_sheet_of_generators(tmp_path: Path) -> None:
    names = ("Perlin mask", "confetti")
    generators.main(generators.Options(generators=names, sheet=tmp_path / "sheet.png", smoke=True))
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert min(sheet.size) > 200
    with pytest.raises(ValueError, match=r"generators must be of CutPaste.*got glitter"):
        generators.main(generators.Options(generators=("glitter",), smoke=True))


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_place_of_synthesis(tmp_path: Path) -> None:
    path = tmp_path / "bench_synthesis.json"
    path.write_text(json.dumps({"devices": {"another": {}}}))
    synthesis.main(synthesis.Options(results=tmp_path, smoke=True))
    devices = json.loads(path.read_text())["devices"]
    result = devices.pop("cpu")
    assert devices.keys() == {"another"} and result["within_step"]["host_operations"] == 0 and result["ratio"] > 0
    assert result["by_host"]["host_seconds_a_step"] > result["without"]["host_seconds_a_step"] > 0
    for name in ("within_step", "by_host", "without"):
        low, high = result[name]["quartiles"]
        assert 0 < low <= result[name]["seconds_a_step"] <= high
    assert "| by the host | cpu | 32 | 2 | 2 |" in update_readme.place_of_synthesis({"devices": {"cpu": result}})


@pytest.mark.slow
def test_profile_of_training(tmp_path: Path) -> None:
    path = tmp_path / "profile_draem.json"
    path.write_text(json.dumps({"devices": {"another": {}}}))
    profile_draem.main(profile_draem.Options(results=tmp_path, smoke=True))
    record = json.loads(path.read_text())
    assert record["devices"].keys() == {"another", "cpu"}
    result = record["devices"].pop("cpu")
    assert 0 < result["share_at_work"] <= 1 and 0 <= result["longest_pause_seconds"] < result["seconds"]
    assert "| cpu | 32 | 2 | 4 | " in update_readme.work_and_pauses({"devices": {"cpu": result}})
    busy = np.array([[3.0, 4.0], [0.0, 2.0], [1.0, 1.5], [4.5, 5.0]])
    np.testing.assert_allclose(profile_draem.pauses(busy), [0.0, 1.0, 0.5])


def test_gpu_works_while_a_kernel_runs() -> None:
    def line(name: str, *events: tuple[int, int, int]) -> str:
        spans = (f"events {{ metadata_id: {i} offset_ps: {t}000 duration_ps: {d}000 }}" for i, t, d in events)
        return f"lines {{ name: '{name}' timestamp_ns: 5 {' '.join(spans)} }}"

    kinds = " ".join(
        f"event_metadata {{ key: {i} value {{ id: {i} name: '{name}' }} }}"
        for i, name in ((1, "fusion"), (2, "MemcpyH2D"))
    )
    lines = [line("Stream #13(Compute,MemcpyH2D)", (1, 10, 20), (2, 40, 50)), line("XLA Modules", (1, 0, 100))]
    text = f"planes {{ name: '/device:GPU:0' {' '.join(lines)} {kinds} }}"
    text += f" planes {{ name: '/host:CPU' {line('tf_XLAEigen', (1, 0, 100))} {kinds} }}"
    spans = [*profile_draem.spans(jax.profiler.ProfileData.from_text_proto(text), cpu=False)]
    np.testing.assert_allclose(spans, [(15e-9, 35e-9)])


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_latency(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(latency.NETWORKS, "efficientad", ("efficientad_small",))
    for methods in (("padim",), ("efficientad",)):
        latency.main(latency.Options(methods=methods, results=tmp_path, smoke=True))
    record = json.loads((tmp_path / "bench_latency.json").read_text())
    networks = [(row["method"], row["backbone"]) for row in record["rows"]]
    assert networks == [("efficientad", "efficientad_small"), ("padim", "resnet18")]
    for row in record["rows"]:
        assert set(row["batches"]) == {"1", "2"}
        for measured in row["batches"].values():
            assert measured["images_a_second"] > 0 and 0 < measured["backbone_share"] <= 1
            assert measured["operations"] > 0
    table = update_readme.latency(record)
    assert "| `padim` | resnet18 | cpu | " in table
    fastest = max(row["peak_flops_a_second"] for row in record["rows"])
    share = measured["operations"] / 2 * measured["images_a_second"] / fastest
    assert table.splitlines()[-1].endswith(f" | {share:.0%} |")
    measured["operations"] = None
    assert update_readme.latency(record).splitlines()[-1].endswith(" | – |")


def test_operations_on_an_accelerator_are_those_of_the_cpus_row(monkeypatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert latency.operations(None, {"batches": {"32": {"operations": 7.0}}}, 32) == 7.0
    assert latency.operations(None, None, 32) is None


@pytest.mark.slow
def test_latency_needs_no_stage_after_layer3() -> None:
    """Weights files of a ResNet may end there."""
    frozen = backbone("resnet18").init(jax.random.key(0))
    params = {k: v for k, v in frozen["params"].items() if not k.startswith("layer4")}
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), np.uint8)
    for name in set(METHODS).difference(latency.NETWORKS):
        if "backbone" not in inspect.signature(METHODS[name]).parameters:
            continue
        method = METHODS[name](backbone="resnet18", **latency.SETTINGS.get(name, {}))
        jax.eval_shape(method.embed, frozen | {"params": params}, image)
