"""Nobody's results are overwritten: folders, owners, stages and locks."""

import itertools
import os
import shutil
from pathlib import Path

import pytest

from jaxad import files
from jaxad.cli import main
from jaxad.runs import directory

NAMES = [
    *(
        "M8/zinc",
        "M8_zinc",
        "M8:zinc",
        "M8\\zinc",
        "M8%2Fzinc",
        "M8%zinc",
        "M8 zinc",
        "M8 zinc ",
        "M8 zinc.",
        " M8 zinc",
    ),
    *("checkpoint", "Checkpoint", "%63heckpoint", "scores", "unified", "model.json", "metrics.json", "scores.csv"),
    *(".", "..", ".staging", "staging", "", "%", "_", "2024.05.01", "2024.05.02", "a\nb", "a*b", "Größe", "a" * 200),
]


def test_every_name_has_a_folder_of_its_own():
    segments = {name: directory.segment(name) for name in NAMES}
    assert len(set(segments.values())) == len(NAMES)
    for name, segment in segments.items():
        assert segment.casefold() not in directory.RESERVED and len(Path("a", segment).parts) == 2, name
        assert not segment.startswith(".") and segment == segment.strip(" .") and segment.isprintable(), name
    assert all(segments[name] == name for name in ("M8_zinc", "M8 zinc", "2024.05.01", "Größe"))
    with pytest.raises(ValueError, match=r"255 bytes at most .* got xxx"):
        directory.segment(256 * "x")


def outputs(folder: Path, text: str) -> None:
    """What a scoring with pictures leaves."""
    for name in ("scores.csv", "scores.jsonl", f"overlays/{text}.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_results_are_replaced_as_a_whole(tmp_path: Path):
    folder = tmp_path / "new" / "scores"
    with files.staging(folder, directory.SCORES) as stage:
        outputs(stage, "old")
        (stage / "maps").mkdir()
        (stage / "maps" / "old.tiff").touch()
    (folder / "notes.txt").write_text("mine")
    with files.staging(folder, directory.SCORES) as stage:
        outputs(stage, "new")
        assert contents(folder)["scores.csv"] == "old"
    assert contents(folder) == {
        **dict.fromkeys(("scores.csv", "scores.jsonl", "overlays/new.png"), "new"),
        "notes.txt": "mine",
    }


@pytest.mark.parametrize("step", range(6))
def test_a_replacement_that_fails_changes_nothing(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    outputs(tmp_path, "old")
    before, moves = contents(tmp_path), itertools.count()

    def failing(move):
        def run(*args) -> None:
            if next(moves) == step:
                raise OSError("No space left on device")
            move(*args)

        return run

    monkeypatch.setattr(os, "rename", failing(os.rename))
    monkeypatch.setattr(os, "replace", failing(os.replace))
    with pytest.raises(OSError, match="No space"), files.staging(tmp_path, directory.SCORES) as stage:
        outputs(stage, "new")
    assert contents(tmp_path) == before and not list(tmp_path.glob(".*"))


def test_planted_links_neither_block_nor_redirect(tmp_path: Path):
    folder, elsewhere = tmp_path / "scores", tmp_path / "elsewhere"
    outputs(elsewhere, "theirs")
    folder.mkdir()
    for name in (*files.STAGES, "overlays"):
        (folder / name).symlink_to(elsewhere)
    (folder / "scores.csv").symlink_to(elsewhere / "scores.csv")
    (folder / "scores.jsonl").symlink_to("nowhere")
    with files.staging(folder, directory.SCORES) as stage:
        outputs(stage, "ours")
    assert set(contents(elsewhere).values()) == {"theirs"} and set(contents(folder).values()) == {"ours"}
    assert not any(path.is_symlink() for path in folder.rglob("*"))


def test_only_the_owner_replaces_results(tmp_path: Path):
    run, photos = tmp_path / "run", tmp_path / "photos"
    images = {"source": str(photos), "category": "photos"}
    run.mkdir()
    photos.mkdir()

    def score(text: str, output: Path = run / "scores" / "photos", overwrite: bool = False, **others: str) -> None:
        with directory.scoring(output, run, directory.version(run), images | others, overwrite) as stage:
            outputs(stage, text)

    score("first")
    score("second")
    (tmp_path / "link").symlink_to(photos)
    score("third", source=str(tmp_path / "link"))
    for others in ({"source": str(tmp_path)}, {"category": "nuts"}):
        with pytest.raises(ValueError, match=r"results of another .* with --overwrite, or .* --output"):
            score("lost", **others)
    shutil.move(run, tmp_path / "moved")
    run = tmp_path / "moved"
    score("fourth", run / "scores" / "photos")
    outputs(tmp_path / "theirs", "theirs")
    with pytest.raises(ValueError, match="holds results of unknown origin"):
        score("lost", tmp_path / "theirs")
    score("fifth", tmp_path / "theirs", overwrite=True)
    assert set(contents(tmp_path / "theirs" / "overlays").values()) == {"fifth"}
    stale = directory.scoring(run / "scores" / "photos", run, (1, 2), images, False)
    with pytest.raises(ValueError, match="was replaced while it scored"), stale as stage:
        outputs(stage, "stale")
    assert contents(run / "scores" / "photos" / "overlays") == {"fourth.png": "fourth"}


def test_two_do_not_score_into_one_folder(tmp_path: Path):
    options = (tmp_path, None, {"source": "a", "category": "a"}, False)
    with directory.scoring(tmp_path / "out", *options) as stage:
        outputs(stage, "first")
        second = directory.scoring(tmp_path / "out", *options)
        with pytest.raises(ValueError, match=r"another process is scoring into .*/out: wait for it"), second:
            pass
    assert set(contents(tmp_path / "out" / "overlays").values()) == {"first"}


def test_a_new_model_forgets_what_came_of_the_old_one(tmp_path: Path):
    run = tmp_path / "run"
    for name in ("metrics.json", "bolt/metrics.json", "bolt/recipe.json", "other/model.json", "other/recipe.json"):
        files.write_atomically(run / name, "{}")
    for folder in (run / "scores" / "monday", tmp_path / "elsewhere"):
        outputs(folder, "old")
    (run / "scores" / "tuesday").symlink_to(tmp_path / "elsewhere")
    files.write_atomically(run / "scores" / "monday" / "notes.txt", "mine")
    directory.forget_results(run)
    assert contents(run) == {"other/model.json": "{}", "other/recipe.json": "{}", "scores/monday/notes.txt": "mine"}
    assert len(contents(tmp_path / "elsewhere")) == 3 and not (run / "bolt").exists()


def test_find_knows_a_checkpoint_by_what_it_holds(tmp_path: Path):
    for run in ("checkpoint/padim/parts/bolt", "checkpoint/padim/parts/checkpoint/model0"):
        files.write_atomically(tmp_path / run / "model.json", "{}")
    files.write_atomically(tmp_path / "checkpoint/padim/parts/checkpoint/fingerprint", "0")
    assert directory.find([tmp_path], "model.json") == [tmp_path / "checkpoint/padim/parts/bolt"]


def test_a_checkpoint_of_other_images_is_kept(tmp_path: Path):
    checkpoint = tmp_path / "checkpoint"
    directory.resume(checkpoint, "settings", "monday")
    (checkpoint / "state" / "classes_0" / "0").mkdir(parents=True)
    directory.resume(checkpoint, "settings", "monday")
    with pytest.raises(ValueError, match="holds results of another source, monday"):
        directory.resume(checkpoint, "settings of others", "tuesday")
    assert directory.has_state(checkpoint)
    directory.resume(checkpoint, "other settings", "monday")
    assert not directory.has_state(checkpoint)
    shutil.rmtree(checkpoint)
    (tmp_path / "elsewhere").mkdir()
    checkpoint.symlink_to(tmp_path / "elsewhere")
    directory.resume(checkpoint, "settings", "monday")
    assert checkpoint.is_dir() and not checkpoint.is_symlink() and not list((tmp_path / "elsewhere").iterdir())


def test_two_categories_in_one_folder_are_refused(
    mvtec: Path, backbone_options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """As on a file system that takes upper and lower case for the same; here by a link."""
    folder = tmp_path / "patchcore" / "parts"
    (folder / "bolt").mkdir(parents=True)
    (folder / "nut").symlink_to("bolt")
    assert main(["fit", str(mvtec), *backbone_options, "--output", str(tmp_path)]) == 2
    assert f"two of bolt, nut have the same one in {folder}" in capsys.readouterr().err
    assert not list((folder / "bolt").iterdir())
