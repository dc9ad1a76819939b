"""The documents cannot rot: the example runs, links, names, commands and options exist, the table is current."""

import functools
import importlib.util
import json
import pkgutil
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import update_readme
from experiments.provenance import DECISIVE, code_hash
from jaxad import cli
from jaxad.backbones import backbone
from jaxad.base import Batch
from jaxad.data import Arrays, Preprocess, open_data
from jaxad.driver.execution import Execution
from jaxad.driver.fit import fit
from jaxad.driver.scoring import score_all
from jaxad.report.tables import STALE
from jaxad.settings import EMBEDDED

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "data").glob("*.md"))]
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def module_at(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)


def quoted(document: Path) -> list[str]:
    """What stands in backticks, outside of blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL))


def test_readme_is_short():
    text = README.read_text()
    assert len(text.splitlines()) <= 120


def test_readme_example_runs(tmp_path, monkeypatch):
    if not (ROOT / "jaxad" / "backbones" / f"{EMBEDDED}.safetensors").is_file():
        pytest.skip(f"the weights of {EMBEDDED} are not in the package: run experiments.distill.backbone")
    counts = {"photos/good": 5, "photos/new": 2}
    for product in ("bolt", "nut"):
        counts |= {f"products/{product}/{part}": 2 for part in ("train/good", "test/good", "test/scratch")}
    rng = np.random.default_rng(0)
    for folder, count in counts.items():
        (tmp_path / folder).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (32, 40, 3), np.uint8)).save(tmp_path / folder / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    [example] = blocks(README, "python")
    names = {}
    exec(compile(example, str(README), "exec"), names)
    assert [Path(path).name for path in names["result"].paths] == ["0.png", "1.png"]
    for field in ("pred_score", "pred_label", "anomaly_map", "pred_mask"):
        assert f".{field}" in example and len(getattr(names["result"], field)) == 2
    assert names["scores"].image.shape == (2, 4) and names["scores"].pixel.shape == (2, 4, 224, 224)
    assert np.isfinite(names["scores"].image).all()


def test_results_table_is_current():
    update_readme.main(update_readme.Options(check=True))


def test_update_readme(tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    readme.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    options = update_readme.Options((readme,), results)
    update_readme.main(options)
    missing = update_readme.NO_RESULT.format("run")
    assert readme.read_text() == f"before\n<!-- results -->\n{missing}<!-- /results -->\nafter\n"
    result = {"recipe": "padim_mtd", "dataset": "mtd", "metrics": {"image_AUROC": {"mean": 0.9375, "std": 0.0}}}
    (results / "padim_mtd.json").write_text(json.dumps(result))
    (results / "ensemble.json").write_text(
        json.dumps(result | {"recipe": "ensemble", "backbone": ["patch17", "patch33"]})
    )
    with pytest.raises(ValueError, match="out of date"):
        update_readme.main(update_readme.Options((readme,), results, check=True))
    update_readme.main(options)
    update_readme.main(update_readme.Options((readme,), results, check=True))
    text = readme.read_text()
    assert re.search(r"^\| `padim_mtd`† \|.* 0\.93[78] \|", text, re.MULTILINE)
    assert re.search(r"^\| `ensemble`† \| patch17, patch33 \|.* 0\.93[78] \|", text, re.MULTILINE)
    assert text.startswith("before\n") and text.endswith("\n<!-- /results -->\nafter\n")
    readme.write_text("<!-- results pillqc -->\n<!-- /results -->\n")
    update_readme.main(options)
    assert readme.read_text() == f"<!-- results pillqc -->\n{missing}<!-- /results -->\n"
    for text in ("no markers\n", "<!-- results -->\n<!-- /results -->\n" * 2):
        readme.write_text(text)
        with pytest.raises(ValueError, match="each pair once"):
            update_readme.main(options)


def test_stale_results_have_a_mark(tmp_path, capsys):
    recipe, path = update_readme.RECIPES["padim_mtd"], tmp_path / "padim_mtd.json"
    result = {"recipe": "padim_mtd", "metrics": {"image_AUROC": {"mean": 0.5, "std": 0.0}}}
    result |= {field: getattr(recipe, field) for field in DECISIVE}
    result |= {"code": code_hash(recipe.method, recipe.backbone), "seconds": {"cpu_fit": 41.7}, "device": "cpu"}
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results -->\n<!-- /results -->\n<!-- results best_mtd -->\n<!-- /results -->\n")
    options = update_readme.Options((readme,), tmp_path)
    for changed, is_stale in ({}, False), ({"code": "0" * 16}, True), ({"seeds": [7]}, True):
        path.write_text(json.dumps(result | changed, default=dict))
        update_readme.main(options)
        text, listed = readme.read_text(), capsys.readouterr().out
        assert text.count("`padim_mtd`† |") == text.count(f"\n\n{STALE}") == 2 * is_stale
        assert "| 42 |\n" in text and (listed == "1 results are older than their code: padim_mtd\n") == is_stale


def test_tables_of_experiments(tmp_path):
    names = ("nf_ood", "bench_flows", "epochs_fastflow_bottle", "select_glass_mtd_feature_scale")
    text = "and\n".join(f"<!-- results {name} -->\n<!-- /results -->\n" for name in names)
    empty = update_readme.updated(text, tmp_path)
    modules = ("studies.nf_ood", "bench.flows", "studies.epoch_curve", "studies.select_rate")
    assert all(f"experiments.{module}`" in empty for module in modules)
    flows = {
        "pixels": {"bits_per_dimension": 4.25, "auroc": {"tiles": 0.125, "digits": 0.5}},
        "vectors": {"bits_per_dimension": None, "auroc": {"SVHN": 0.875}},
    }
    (tmp_path / "nf_ood.json").write_text(json.dumps({"experiment": "nf_ood", "flows": flows}))
    seconds = {"cached": 0.25, "plain_loop": 1.0, "backbone": 0.75}
    bench = {
        "flows": {"nf": {"seconds_a_step": seconds, "plain_loop_over_cached": 4.0}},
        "freia": {},
        "classes_at_once": {"nf": {"in_turn_over_one_program": 1.5}},
    }
    (tmp_path / "bench_flows.json").write_text(json.dumps(bench))
    values = [0.1, 0.2, 0.3, 0.25, 0.5]
    curves = {"jaxad": {"pixel_AUROC": values, "stopped": 0.5}, "FrEIA": {"pixel_AUROC": values[:2], "stopped": 0.2}}
    (tmp_path / "epochs_fastflow_bottle.json").write_text(json.dumps({"curves": curves}))
    losses = {"varied": "feature_scale", "held_out_loss": {"0.5": values, "2": values[::-1]}}
    (tmp_path / "select_glass_mtd_feature_scale.json").write_text(json.dumps(losses))
    lines = update_readme.updated(text, tmp_path).splitlines()
    assert "| `feature_scale` | epoch 1 | epoch 3 | epoch 5 |" in lines and "| 2 | 0.500 | 0.300 | 0.100 |" in lines
    assert "| jaxad | 0.250 | 0.500 | 0.500 |" in lines and "| FrEIA | – | 0.200 | 0.200 |" in lines
    assert "| pixels | 4.250 | 0.125 | 0.500 | – |" in lines
    assert "| vectors | – | – | – | 0.875 |" in lines
    assert "| `nf` | 250 | 750 | 4.0 | – | 1.5 |" in lines


@each_document
def test_links_lead_somewhere(document):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text())
    local = [target for target in targets if not target.startswith(("http:", "https:"))]
    assert [target for target in local if not (document.parent / target).exists()] == []


@each_document
def test_files_named_exist(document):
    paths = [text for text in quoted(document) if re.fullmatch(r"(jaxad|experiments|tests|docs)/[\w/.]+", text)]
    assert [path for path in paths if not (ROOT / path).exists()] == []


@each_document
def test_python_names_exist(document):
    names = {match[0] for text in quoted(document) if (match := re.match(r"jaxad(\.\w+)+", text))}
    for name in names:
        pkgutil.resolve_name(name)  # raises AttributeError or ModuleNotFoundError


def test_variables_named_exist():
    source = "\n".join(path.read_text() for path in (ROOT / "jaxad").rglob("*.py"))
    named = set(re.findall(r"JAXAD_[A-Z_]+", README.read_text()))
    assert named and {name for name in named if f'"{name}"' not in source} == set()


def test_make_targets_named_exist():
    named = re.findall(r"^make (\w+)", "\n".join(blocks(README, "sh")), re.MULTILINE)
    assert set(named) >= {"demo", "test"}
    for target in named:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_commands_and_options_named_exist(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    @functools.cache
    def help_of(*command: str) -> str:
        with pytest.raises(SystemExit, match="0"):
            cli.main([*command, "--help"])
        return capsys.readouterr().out

    def options(text: str) -> set[str]:
        return set(re.findall(r"--[a-z][a-z-]*", text))

    shown = [line for block in blocks(README, "sh") for line in block.splitlines()]
    written = [text for document in DOCUMENTS for text in quoted(document)]
    used = {line.partition("#")[0].strip() for line in shown + written if line.startswith("jaxad ")}
    assert {line.split()[1] for line in used} == set(cli.COMMANDS), "one is missing, or is no command"
    for line in used:
        command, *rest = line.split()[1:]
        method = re.findall(r"--method \w+", line)
        text = help_of(command, *(method[0].split() if method else ()))
        assert options(line) <= options(text), line
        assert command != "weights" or re.search(rf"\b{rest[0]}\b", text), line
    mentioned = {option for text in quoted(README) if text.startswith("--") for option in options(text)}
    assert mentioned <= set.union(*(options(help_of(command)) for command in cli.COMMANDS))


SKELETONS = {name: module_at(ROOT / "docs" / f"skeleton_{name}.py") for name in ("method", "trained")}
SKELETON_OPTIONS = {
    "method": dict(backbone="pdn_small"),
    "trained": dict(backbone="pdn_small", hidden=8, epochs=3, train_batch_size=4),
}


@pytest.fixture(scope="module")
def skeleton():
    return SKELETONS["method"]


@pytest.mark.parametrize("kind", SKELETONS)
def test_skeletons_have_the_headings_of_a_method(kind):
    headings = re.findall(r"^([A-Z]\w+):", SKELETONS[kind].__doc__, re.MULTILINE)
    assert headings == ["Skeleton", "Stored", "Family", "Paper", "Reference", "Differences", "Results"]


@pytest.mark.parametrize("kind", SKELETONS)
def test_skeletons_find_a_defect(kind):
    rng = np.random.default_rng(0)
    images = rng.integers(100, 130, (10, 32, 48, 3), np.uint8)
    images[9, 8:24, 16:32] = rng.integers(0, 256, (16, 16, 3))
    [split] = open_data(Arrays(images), preprocess=Preprocess(None)).values()
    method = SKELETONS[kind].skeleton(image_size=(32, 48), **SKELETON_OPTIONS[kind])
    frozen, execution = backbone("pdn_small").init(jax.random.key(0)), Execution(batch_size=4)
    state = fit(method, frozen, split.train.subset(range(8)), jax.random.key(0), execution).state
    scores = score_all(method, state, frozen, split.train.subset([8, 9]), execution)
    assert scores.image[1] > scores.image[0] and scores.pixel.shape == (2, 32, 48)
    assert scores.pixel[1, 8:24, 16:32].mean() > scores.pixel[1].mean()


def test_skeleton_fits_and_scores(skeleton):
    method = skeleton.skeleton(backbone="pdn_small", image_size=(32, 48))
    frozen = backbone("pdn_small").init(jax.random.key(0))
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 48, 3), np.uint8)
    [split] = open_data(Arrays(images), preprocess=Preprocess(None)).values()
    execution = Execution(batch_size=4)  # the second batch is half padding
    state = fit(method, frozen, split.train, jax.random.key(0), execution).state
    maps = method.embed(frozen, jnp.asarray(images))
    grid = maps["layer2"].shape[:3]
    assert maps["layer3"].shape[:3] == grid  # so the oracle needs no upsampling
    patches = np.concatenate([maps["layer2"], maps["layer3"]], -1).astype(np.float64)
    np.testing.assert_allclose(state.mean, patches.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)

    sharp = skeleton.skeleton(backbone="pdn_small", image_size=grid[1:], sigma=0.0)  # no upsampling, no smoothing
    expected = np.linalg.norm(patches - patches.mean((0, 1, 2)), axis=-1)
    np.testing.assert_allclose(score_all(sharp, state, frozen, split.train).pixel, expected, rtol=1e-3)

    scores = score_all(method, state, frozen, split.train, execution)
    assert scores.pixel.shape == (6, 32, 48)
    np.testing.assert_array_equal(scores.image, scores.pixel.max((1, 2)))


def test_skeleton_ignores_padding(skeleton):
    method = skeleton.skeleton(backbone="pdn_small", layers=("layer1",), image_size=(32, 32))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 4, 4, 5)), jnp.float32)
    valid = jnp.array([True, True, False])
    zeros = jnp.zeros(3, jnp.int32)
    spec = {"layer1": jax.ShapeDtypeStruct((3, 4, 4, 5), jnp.float32)}
    key, [stage] = jax.random.key(0), method.stages
    means = []
    for padding in (0.0, jnp.nan):
        batch = Batch({"layer1": x.at[2].set(padding)}, valid, zeros, None, zeros)
        state, _ = stage.update(key, stage.init(key, None, None, spec), None, batch)
        means.append(stage.finalize(key, state, None).mean)
    np.testing.assert_array_equal(*means)
    np.testing.assert_allclose(means[0], np.asarray(x[:2]).mean((0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize("kind", SKELETONS)
def test_skeletons_refuse_bad_hyperparameters(kind):
    with pytest.raises(ValueError, match="sigma must be 0 or more, got -1"):
        SKELETONS[kind].skeleton(sigma=-1.0)
