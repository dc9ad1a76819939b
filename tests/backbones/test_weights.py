"""Weight files: importing, finding, reading, and all errors."""

import hashlib

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxad import backbones
from jaxad.backbones import resnet, store

from .make_golden import synthetic
from .shapes import shapes_of


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JAXAD_OFFLINE", raising=False)
    return tmp_path / "cache"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def partial(architecture="resnet18", deepest="layer1", dtype=np.float32):
    """A random checkpoint up to that stage."""
    shapes = {}
    for module, leaves in shapes_of(architecture).items():
        if module == "conv1" or module.split(".")[0] <= deepest:
            shapes |= resnet.source(module).shapes(leaves["kernel"])
    return {key: synthetic(key, shape).astype(dtype) for key, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_import_checks_and_copies_and_load_finds_it(cache, tmp_path, dtype):
    file = tmp_path / "mine.safetensors"
    classifier = {"fc.weight": np.zeros((2, 512), dtype), "bn1.num_batches_tracked": np.array(7)}
    save_file(partial(dtype=dtype) | classifier, file)
    path = backbones.import_file(file, "resnet18")
    assert path == cache / "resnet18.tv_in1k.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert backbones.source("resnet18") == {"path": str(path), "sha256": digest}
    assert names(cache) == ["resnet18.tv_in1k.safetensors", "resnet18.tv_in1k.sha256"]
    with pytest.raises(ValueError, match=r"resnet18.tv_in1k.safetensors has changed since it was fetched or imported"):
        (cache / "resnet18.tv_in1k.sha256").write_text(f"{'0' * 64}  resnet18.tv_in1k.safetensors\n")
        backbones.source("resnet18")
    with pytest.raises(ValueError, match="has changed since"):
        backbones.fetch("resnet18")
    frozen = backbones.load("resnet18")
    assert {module.split(".")[0] for module in frozen["params"]} == {"conv1", "layer1"}
    gain, shift, mean, variance = (
        synthetic(f"bn1.{leaf}", (64,)).astype(dtype).astype(np.float64)
        for leaf in ("weight", "bias", "running_mean", "running_var")
    )
    kernel = synthetic("conv1.weight", (64, 3, 7, 7)).astype(dtype).astype(np.float64)
    scale = gain / np.sqrt(variance + 1e-5)
    np.testing.assert_allclose(frozen["params"]["conv1"]["bias"], shift - mean * scale, rtol=1e-5, atol=1e-6)
    expected = np.einsum("oihw,o->hwio", kernel, scale)
    np.testing.assert_allclose(frozen["params"]["conv1"]["kernel"], expected, rtol=1e-5, atol=1e-6)


def test_import_takes_the_variant_from_the_stem(cache, tmp_path):
    file = tmp_path / "resnet50.caffe_in1k.safetensors"
    save_file(partial("resnet50"), file)
    assert backbones.import_file(file).name == file.name
    assert backbones.import_file(file, "resnet50").name == file.name
    with pytest.raises(FileNotFoundError, match=r"no weights file .*nowhere: give a safetensors file"):
        backbones.import_file(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"mine.safetensors is not named after a backbone: give the backbone's name"):
        backbones.import_file(file.rename(tmp_path / "mine.safetensors"))


def test_load_prefers_the_file_then_the_cache_then_the_package(cache, tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr(store, "__file__", str(package / "store.py"))
    places = [package, cache, tmp_path]
    cache.mkdir()
    for value, place in enumerate(places):
        save_file(
            partial() | {"bn1.bias": np.full(64, value + 100, np.float32)}, place / "resnet18.tv_in1k.safetensors"
        )
    for value, file in ((102, tmp_path / "resnet18.tv_in1k.safetensors"), (101, None)):
        assert backbones.load("resnet18", file)["params"]["conv1"]["bias"].mean() == pytest.approx(value, abs=1)
    (cache / "resnet18.tv_in1k.safetensors").unlink()
    assert backbones.load("resnet18")["params"]["conv1"]["bias"].mean() == pytest.approx(100, abs=1)
    row = next(row for row in backbones.available() if row.name == "resnet18.tv_in1k")
    assert (row.state, row.plain) == ("embedded", "resnet18")


def test_available_lists_every_set_once(cache):
    rows = backbones.available()
    assert len({row.name for row in rows}) == len(rows)
    plain = {row.plain: row for row in rows if row.plain}
    assert plain["resnet50"].name == "resnet50.tv_in1k"
    assert plain["resnet50"].state == "not fetched"
    assert plain["resnet50"].path is None
    cache.mkdir()
    (cache / "resnet50.tv_in1k.safetensors").touch()
    row = next(row for row in backbones.available() if row.name == "resnet50.tv_in1k")
    assert (row.state, row.path) == ("cached", cache / "resnet50.tv_in1k.safetensors")


def test_the_embedded_network_reads_its_half_precision_file(tmp_path):
    params = jax.tree.map(np.asarray, backbones.backbone("pdn_small").init(jax.random.key(0))["params"])
    flat = {f"{m}.{leaf}": v.astype(np.float16) for m, leaves in params.items() for leaf, v in leaves.items()}
    save_file(flat, tmp_path / "pdn_small.safetensors")
    frozen = backbones.load("pdn_small", tmp_path / "pdn_small.safetensors")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), frozen["params"], params)
    save_file(flat | {"head.bias": np.ones(3, np.float16)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"needs the tensor head.bias of shape \(384,\), got \(3,\)"):
        backbones.load("pdn_small", tmp_path / "other.safetensors")
    for value, words in ((np.full(384, np.nan, np.float16), "finite numbers"), (np.ones(384, np.int8), "got int8")):
        save_file(flat | {"head.bias": value}, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=f"other.safetensors does not fit: pdn_small needs .*{words}"):
            backbones.import_file(tmp_path / "other.safetensors", "pdn_small")


def test_resolve_takes_the_variant_from_the_file():
    assert backbones.resolve("resnet50", "folder/resnet50.caffe_in1k.safetensors") == "resnet50.caffe_in1k"
    assert backbones.resolve("resnet18", "mine.safetensors") == "resnet18"
    for file in ("folder/resnet18.tv_in1k.safetensors", "mine.safetensors"):
        with pytest.raises(
            ValueError, match=r"does not say which resnet50 it holds: give resnet50.tv_in1k or resnet50.c"
        ):
            backbones.resolve("resnet50", file)
    assert backbones.resolve("resnet50", None) == "resnet50"
    assert backbones.resolve("resnet50.caffe_in1k", "resnet50.tv_in1k.safetensors") == "resnet50.caffe_in1k"
    with pytest.raises(ValueError, match="no backbone is called"):
        backbones.resolve("resnet", None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer1.1.conv2.weight": None}, r"needs the tensor layer1.1.conv2.weight of shape .*, which is missing"),
        (
            {"layer1.0.bn2.running_var": None},
            r"needs the tensor layer1.0.bn2.running_var of shape \(64,\), which is mis",
        ),
        ({"conv1.weight": np.ones((64, 1, 7, 7))}, r"of shape \(64, 3, 7, 7\), got \(64, 1, 7, 7\)"),
        ({"layer1.2.conv1.weight": np.ones((64, 64, 3, 3))}, "has no tensor layer1.2.conv1.weight"),
        ({"bn1.running_var": np.full(64, np.nan)}, "needs finite numbers, got others in conv1"),
        ({"conv1.weight": np.ones((64, 3, 7, 7), np.int32)}, "needs the tensor conv1.weight in float16, .*, got int32"),
        ({"bn1.weight": np.ones(64, bool)}, "needs the tensor bn1.weight in float16, bfloat16, .*, got bool"),
    ],
)
def test_weights_of_another_architecture_are_refused(cache, tmp_path, change, message):
    tensors = {key: value for key, value in (partial() | change).items() if value is not None}
    file = tmp_path / "other.safetensors"
    save_file(tensors, file)
    for read in (backbones.load, lambda name, path: backbones.import_file(path, name)):
        with pytest.raises(ValueError, match=f"{file.name} does not fit: resnet18.* {message}"):
            read("resnet18", file)
    assert names(cache) == []


def test_an_unrelated_file_names_the_first_tensor_it_lacks(tmp_path):
    save_file({"something": np.ones(3, np.float32)}, tmp_path / "file.safetensors")
    for name, first in (("resnet18", "conv1.weight"), ("efficientnet_b0", "conv_stem.weight"), ("pdn_small", "")):
        with pytest.raises(ValueError, match=f"needs the tensor {first}.*missing"):
            backbones.load(name, tmp_path / "file.safetensors")


def test_files_that_are_no_safetensors_are_refused(tmp_path):
    for name, message in (("w.safetensors", "must be safetensors"), ("w.pth", r"convert it where torch is installed")):
        (tmp_path / name).write_bytes(b"no weights at all")
        with pytest.raises(ValueError, match=message) as caught:
            backbones.load("resnet18", tmp_path / name)
        assert "\n" not in str(caught.value)


def test_missing_files_say_what_to_do(cache, tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights file"):
        backbones.load("resnet18", tmp_path / "nowhere.safetensors")
    with pytest.raises(
        FileNotFoundError, match=r"run `jaxad weights fetch resnet50`, or give a file \(--weights PATH\)"
    ):
        backbones.source("resnet50")
    with pytest.raises(FileNotFoundError, match=r"machine: give a file"):
        backbones.load("resnet50.caffe_in1k")


def test_a_file_of_another_variant_is_refused(tmp_path):
    file = tmp_path / "resnet50.caffe_in1k.safetensors"
    save_file(partial("resnet50"), file)
    with pytest.raises(ValueError, match=r"holds the variant resnet50.caffe_in1k: ask for that backbone instead"):
        backbones.load("resnet50", file)
    frozen = backbones.load(backbones.resolve("resnet50", file), file)
    np.testing.assert_allclose(frozen["mean"], (123.68, 116.779, 103.939))


def test_levels_are_divided_whatever_the_weights_were_trained_with():
    """Caffe's levels were not divided: the first kernel is multiplied instead, so its outputs stay the same."""
    caffe, plain = (backbones.backbone(name).fold(partial("resnet50")) for name in ("resnet50.caffe_in1k", "resnet50"))
    np.testing.assert_array_equal(caffe["std"], plain["std"])
    kernel, expected = (frozen["params"]["conv1"]["kernel"] for frozen in (caffe, plain))
    np.testing.assert_allclose(kernel / caffe["std"][:, None], expected, rtol=1e-6)
