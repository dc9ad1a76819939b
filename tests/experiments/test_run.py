"""Recipes: every one has a smoke variant that writes a whole result, and what is committed matches what runs."""

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments import run
from experiments.command import RESULTS, command_line, run_module, start
from experiments.opening import settings_of
from experiments.provenance import code_hash
from experiments.recipes import Recipe, all_recipes
from jaxad.driver.programs import abstract_state, embedded_spec
from jaxad.learning import abstract_frozen
from jaxad.report.tables import OF_EXPERIMENTS

METRICS = {"image_AUROC", "image_AP", "image_F1max"}
RECIPES = all_recipes()


def check_smoke_run(name: str, folder: Path) -> None:
    run.main(run.Options((name,), results=folder, smoke=True))
    result, recipe = json.loads((folder / f"{name}.json").read_text()), RECIPES[name]
    assert result["recipe"] == name and result["method"] == recipe.method and result["seeds"] == list(recipe.seeds)
    assert result["metrics"].keys() >= METRICS
    assert all(0 <= value["mean"] <= 1 for value in result["metrics"].values())
    assert result["published"] == recipe.published
    parts = {"compile", "fit", "score_per_image", "cpu_fit", "cpu_score_per_image"}
    assert set(result["seconds"]) == parts and min(result["seconds"].values()) > 0 and result["peak_bytes"] > 0
    assert result["code"] == code_hash(recipe.method, recipe.backbone)
    assert re.fullmatch(r"[0-9a-f]{40}\+?", result["commit"]) and set(result["load"]) == {"start", "end"}
    assert len(result["categories"]) == 4
    means = [category["metrics"]["image_AUROC"]["mean"] for category in result["categories"].values()]
    np.testing.assert_allclose(result["metrics"]["image_AUROC"]["mean"], np.mean(means))


SMOKE = ("patchcore_mtd", "simplenet_bottle")
"""A memory bank and a training whose smoke runs take a few seconds."""


@pytest.mark.parametrize("recipe", SMOKE)
def test_smoke_run_writes_a_whole_result(recipe: str, tmp_path: Path) -> None:
    check_smoke_run(recipe, tmp_path)


def smoke_variant(name: str) -> str:
    """What recipes with the same smoke run have in common."""
    recipe = RECIPES[name]
    hyperparameters = {k: v for k, v in recipe.hyperparameters.items() if k != "epochs"}
    return repr((recipe.method, recipe.smoke_backbone, sorted(hyperparameters.items())))


VARIANTS = {smoke_variant(name): name for name in (*sorted(RECIPES), *SMOKE)}
"""One recipe of every smoke run: many recipes differ in data, image size, epochs and seeds only."""


@pytest.mark.slow
@pytest.mark.timeout(1800)  # networks of patches take minutes
@pytest.mark.parametrize("recipe", sorted({*VARIANTS.values()} - {*SMOKE}))
def test_every_recipe_has_a_smoke_run(recipe: str, tmp_path: Path) -> None:
    check_smoke_run(recipe, tmp_path)


def test_unknown_recipe_is_refused_in_one_line(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "nonsense", "--smoke"])
    with pytest.raises(SystemExit) as exit:
        start(run.main, run.Options)
    message = capsys.readouterr().err
    assert exit.value.code == 2 and message.count("\n") == 1
    assert "patchcore_mtd" in message and "got nonsense" in message


def test_several_recipes_run_in_one_process_each(monkeypatch) -> None:
    commands = []
    monkeypatch.setattr(sys, "argv", ["run.py", "padim_bottle", "--smoke", "stfpm_mtd"])
    monkeypatch.setattr(run.subprocess, "run", lambda command, check: commands.append(command[1:]))
    run.main(run.Options(("padim_bottle", "stfpm_mtd"), smoke=True))
    assert commands == [["-m", "experiments.run", name, "--smoke"] for name in ("padim_bottle", "stfpm_mtd")]


def test_command_line_is_one_to_type(monkeypatch) -> None:
    main = sys.modules["__main__"]
    monkeypatch.setattr(sys, "argv", ["somewhere/run.py", "padim_mtd", "--data", "a folder"])
    monkeypatch.setattr(main, "__spec__", run.__spec__)
    assert command_line() == "python -m experiments.run padim_mtd --data 'a folder'"
    monkeypatch.setattr(main, "__spec__", None)
    assert command_line() == "python somewhere/run.py padim_mtd --data 'a folder'"


def test_committed_results_are_of_whole_recipes() -> None:
    """One that is older than its recipe has a mark in the tables."""
    for path in RESULTS.glob("*.json"):
        if not path.stem.startswith(OF_EXPERIMENTS):
            result = json.loads(path.read_text())
            assert result["recipe"] == path.stem and path.stem in RECIPES, path.name
            assert "--smoke" not in result["command"], path.name


@pytest.mark.slow
def test_recipes_without_a_result_can_be_traced() -> None:
    """They are for machines that were not available."""
    waiting = RECIPES.keys() - {path.stem for path in RESULTS.glob("*.json")}
    for name in waiting:
        settings = settings_of(RECIPES[name])
        size = settings.preprocess.output_size((900, 900))
        method, frozen = settings.build(size), abstract_frozen(settings)
        spec = embedded_spec(method.embed, frozen, 4, size)
        scores = jax.eval_shape(method.score, abstract_state(method, frozen, spec), frozen, spec)
        assert scores.image.shape == (4,) and (scores.pixel is None or scores.pixel.shape == (4, *size)), name


def test_every_weights_file_is_in_the_result(tmp_path: Path) -> None:
    files = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    for file in files:
        file.write_bytes(file.name.encode())
    digests = [hashlib.sha256(file.name.encode()).hexdigest() for file in files]
    ensemble = Recipe("uninformed_students", "demo", ("patch17", "patch33"))
    single = ensemble._replace(backbone="patch17")
    assert run.sha256_of_weights(ensemble, run.Options((), weights=tuple(files))) == digests
    assert run.sha256_of_weights(single, run.Options((), weights=(files[1],))) == digests[1]
    assert run.sha256_of_weights(single._replace(backbone=None), run.Options(())) is None
    with pytest.raises(ValueError, match="got 2 backbones and 1 files"):
        run.run("ensemble", ensemble, run.Options((), weights=(files[1],)))


@pytest.mark.slow
def test_killed_run_resumes(tmp_path: Path, monkeypatch) -> None:
    """Nothing is measured twice, and the result is that of a run without a break."""
    recipe = Recipe("patchcore", "demo", "pdn_small", smoke_backbone="pdn_small")
    evaluate, calls = run.evaluate, []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(run, "evaluate", interrupted)
    options = run.Options((), results=tmp_path / "resumed", checkpoints=tmp_path / "checkpoints", smoke=True)
    with pytest.raises(KeyboardInterrupt):
        run.run("killed", recipe, options)
    assert not options.results.exists()
    run.run("killed", recipe, options)
    assert len(calls) == 1 + 4  # one of the four categories twice
    run.run("killed", recipe, run.Options((), results=tmp_path / "unbroken", smoke=True))
    resumed, unbroken = (json.loads((tmp_path / part / "killed.json").read_text()) for part in ("resumed", "unbroken"))
    assert resumed["metrics"] == unbroken["metrics"] and resumed["categories"] == unbroken["categories"]
    assert resumed["seconds"].keys() == unbroken["seconds"].keys() and not list(options.checkpoints.iterdir())


def test_module_runs_in_a_new_process() -> None:
    arguments = ("--one", "padim score", "20", "--size", "64")
    point = run_module("experiments.bench.memory", *arguments, MALLOC_ARENA_MAX="1")
    assert point["images"] == 20 and point["peak_bytes"] >= point["before_scoring"] > point["model_bytes"] > 0
