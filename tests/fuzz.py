"""Damages files by the thousand: each damaged file must be refused in one line, or change nothing.

`python -m tests.fuzz 10000` damages every kind of file so many times, and prints what became of it.
"""

import json
import random
import re
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

import jaxad
from jaxad.data import Preprocess, open_data
from jaxad.data.images import read
from jaxad.detector import Detector
from jaxad.driver.programs import abstract_state, embedded_spec
from jaxad.files import seal
from jaxad.learning import Model, load_frozen
from jaxad.metrics import conformal_threshold
from jaxad.report.examples import Examples, save_examples
from jaxad.report.html import write_report
from jaxad.report.runs import write_metrics, write_recipe
from jaxad.runs.scoring import score_files
from jaxad.settings import Settings

SIZE = (32, 32)
IMAGES = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), np.uint8)
SECONDS = 20
"""What takes longer counts as a hang."""
HOLE = "the hole"
ODD = [
    *("null", "true", "-1", "0", "1", "0.5", "1e308", "1e999", "1" + 400 * "0", 5000 * "9", "NaN", "-Infinity"),
    *('""', '"x"', '"3.5"', '"\\u0000"', '"\\u001b[31m"', '"\\ud800"', '"<script>"', '"../../x"', f'"{999 * "long"}"'),
    *("[]", "{}", "[1]", "[[1]]", '{"a": 1}', '[null, "a"]', 50 * "[" + 50 * "]", 20_000 * "[" + 20_000 * "]"),
]
"""JSON values of other types, ranges, lengths and depths."""
CELLS = [
    *("", "0", "1", "-1", "2", "1e999", "nan", "0x10", "good", "train", '"', '"a', "a,b", "\0", "\x1b[31m", "=1+1"),
    *("9" * 400, "x" * 200_000, "\n", "../../x", ";", "\t", "é", "'", "1_0"),
]
Damage = Callable[[random.Random, bytes], bytes]


class Figures(NamedTuple):
    """What became of damaged files: how often, and of the failures which seeds."""

    counts: Counter[str]
    failures: dict[str, list[str]]


def bytes_damaged(chance: random.Random, content: bytes) -> bytes:
    """Some bytes or bits are others, gone, doubled or new."""
    start, length = chance.randrange(len(content) + 1), chance.choice((1, 1, 2, 8, 100))
    before, part, after = content[:start], content[start : start + length], content[start + length :]
    flipped = bytes(byte ^ 1 << chance.randrange(8) for byte in part)
    noise = chance.randbytes(length)
    ways = (b"", part + part, flipped, flipped, noise, noise + part, bytes(len(part)))
    return chance.choice([before, after, content + noise, *(before + way + after for way in ways)])


def json_damaged(chance: random.Random, content: bytes) -> bytes:
    """A value or a name is another, gone, doubled or new."""
    document = json.loads(content)
    places: list[tuple[Any, Any]] = []
    pending = [document]
    while pending:
        owner = pending.pop()
        for key in owner if isinstance(owner, dict) else range(len(owner)):
            places.append((owner, key))
            if isinstance(owner[key], dict | list):
                pending.append(owner[key])
    owner, key = chance.choice(places)
    way, odd, doubled = (
        chance.choice(("gone", "near", "new", "renamed", "doubled", "odd", "odd")),
        chance.choice(ODD),
        "",
    )
    if way == "near" and isinstance(owner[key], float | int):
        odd = repr(owner[key] * 1.001)
    if way == "gone":
        del owner[key]
    elif way == "renamed" and isinstance(owner, dict):
        owner[chance.choice(("", "x", str(key).upper(), "\u001b[31m"))] = owner.pop(key)
    elif way == "doubled" and isinstance(owner, dict):
        doubled = f"{json.dumps(key)}: 1, "
        owner[key] = HOLE
    else:
        owner["more" if way == "new" and isinstance(owner, dict) else key] = HOLE
    text = json.dumps(document, indent=chance.choice((None, 3)))
    if doubled:
        text = text.replace(json.dumps(key), doubled + json.dumps(key), 1)
    return text.replace(json.dumps(HOLE), odd, 1).encode()


def table_damaged(chance: random.Random, content: bytes) -> bytes:
    """A cell is another, gone, new, or begins another line."""
    lines = [line.split(b",") for line in content.splitlines()]
    line, cell = chance.choice(lines), chance.choice(CELLS).encode()
    column = chance.randrange(len(line))
    part = chance.choice(([], [cell], [cell], [cell, line[column]]))
    if chance.random() < 0.1:
        lines.insert(chance.randrange(len(lines)), line[column:])
    line[column : column + 1] = part
    return b"\r\n".join(map(b",".join, lines))


def resealed(chance: random.Random, content: bytes) -> bytes:
    """As `json_damaged`, by somebody who corrects the checksum."""
    damaged = json_damaged(chance, content)
    try:
        value = json.loads(damaged)
        value.pop("checksum", None)
        return json.dumps(seal(value)).encode()
    except (ValueError, RecursionError):
        return damaged


def make_run(folder: Path, seed: int) -> Path:
    """A run as `jaxad fit` and `jaxad evaluate` leave it, of a state that is drawn at random."""
    chance = np.random.default_rng(seed)
    settings = Settings.of("padim", image_size=SIZE, layers=("layer2",), n_features=4, seed=seed)
    method, frozen = settings.build(SIZE), load_frozen(settings)
    shapes = abstract_state(method, frozen, embedded_spec(method.embed, frozen, 5, SIZE))
    state = jax.tree.map(lambda leaf: chance.uniform(0.5, 1, leaf.shape).astype(leaf.dtype), shapes)
    scores, labels = chance.normal(size=12).astype(np.float32), np.repeat([0, 1], 6)
    threshold = conformal_threshold(scores, 0.2)
    model = Model(SIZE, state, threshold, threshold._replace(value=2.5), 1.0, n_train=5)
    Detector.from_settings(settings, model, frozen).save(folder)
    recipe = settings.to_json() | {
        "dataset": "parts",
        "category": f"part {seed}",
        "seconds": {"fit": 1.0, "compile": None},
    }
    recipe |= {"peak_bytes": 10**9, "n_train": 5, "n_heldout": 12, "loss": [2.0, 1.0], "images_per_second": 9.5}
    write_recipe(
        folder, recipe | {"weights": {"path": "w.safetensors", "sha256": "0" * 64}, "versions": {"jaxad": "1"}}
    )
    with score_files(folder, threshold) as write:
        for i, (label, score) in enumerate(zip(labels.tolist(), scores.tolist(), strict=True)):
            write(f"{i}.png", label, "scratch" if label else "good", score)
    maps = chance.random((2, *SIZE), np.float32)
    save_examples(
        folder, Examples(IMAGES, ["0.png", "7.png"], labels[[0, 7]], scores[[0, 7]], maps > 0.9, maps, (0.0, 1.0))
    )
    rate = {"value": 0.5, "low": 0.2, "high": 0.8, "n": 6}
    at_threshold = {"image": None, "pixel": {"threshold": 2.5, "FPR": rate}}
    metrics = {"image_AUROC": 0.9, "pixel_AUROC": None}
    write_metrics(folder, {"metrics": metrics, "reasons": {"pixel_AUROC": "no masks"}, "at_threshold": at_threshold})
    return folder


def make_table(folder: Path) -> Path:
    """A CSV file of images."""
    folder.mkdir()
    for i in range(4):
        Image.fromarray(IMAGES[i % 2]).save(folder / f"{i}.png")
    lines = ["image_path,label,split,mask_path,category,group"]
    lines += [
        f"{i}.png,{'good' if i < 3 else 'scratch'},{'train' if i < 2 else 'test'},,bolt,lot {i}" for i in range(4)
    ]
    (folder / "data.csv").write_text("\n".join(lines) + "\n")
    return folder


def make_photographs(folder: Path) -> Path:
    """An image in each of the usual formats."""
    folder.mkdir()
    smooth = Image.fromarray(IMAGES[0]).resize((48, 40), Image.Resampling.BICUBIC)
    for name in PHOTOGRAPHS:
        options = {"compression": "tiff_lzw"} if name.endswith(".tif") else {}
        smooth.save(folder / name, **options)
    Image.fromarray(np.arange(1920, dtype=np.uint16).reshape(40, 48) * 30).save(folder / "deep.png")
    return folder


def load(folder: Path) -> Any:
    """What a model is."""
    detector = jaxad.load(folder)
    state = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(detector.state)]
    return detector.settings, detector.model._replace(state=state)


def score(folder: Path) -> Any:
    """What a model says of images."""
    return [None if part is None else np.asarray(part).tobytes() for part in jaxad.load(folder).predict(IMAGES)[1:]]


def report(folder: Path) -> str:
    """The page, without the time of writing."""
    page = write_report([folder], folder.with_suffix(".html")).read_text(encoding="utf-8")
    return re.sub("<dt>Written</dt><dd>.*?</dd>", "", page)


def read_table(folder: Path) -> None:
    """Other images are no error of the reader."""
    open_data(folder / "data.csv")


def reader(name: str) -> Callable[[Path], Any]:
    """Decodes a photograph."""
    return lambda folder: read(folder / name, str(folder / name), Preprocess(SIZE)).tobytes()


PHOTOGRAPHS = ("photo.png", "photo.jpg", "photo.tif", "photo.webp", "photo.bmp", "photo.gif")
MODEL = {"model.json": json_damaged, "threshold.json": json_damaged, "model.safetensors": bytes_damaged}
RUN = {"model.json": json_damaged, "threshold.json": json_damaged, "recipe.json": json_damaged}
RUN |= {"metrics.json": json_damaged, "scores.csv": table_damaged, "examples.npz": bytes_damaged}
KINDS: dict[str, tuple[Callable[[Path], Any], str, tuple[Damage, ...]]] = {
    **{f"load, {name}": (load, name, (bytes_damaged, damage)) for name, damage in MODEL.items()},
    **{f"report, {name}": (report, name, (bytes_damaged, damage)) for name, damage in RUN.items()},
    **{f"score, {name}": (score, name, (bytes_damaged, damage)) for name, damage in MODEL.items()},
    "load, model.json resealed": (load, "model.json", (resealed,)),
    "report, recipe.json resealed": (report, "recipe.json", (resealed,)),
    "report, metrics.json resealed": (report, "metrics.json", (resealed,)),
    "report, scores.csv alone": (report, "scores.csv", (bytes_damaged, table_damaged)),
    "report, examples.npz alone": (report, "examples.npz", (bytes_damaged,)),
    "open, data.csv": (read_table, "data.csv", (bytes_damaged, table_damaged)),
    **{f"read, {name}": (reader(name), name, (bytes_damaged,)) for name in (*PHOTOGRAPHS, "deep.png")},
}
"""What reads a file, the file, and how it is damaged."""
FREE = ("resealed", "alone", "data.csv", *PHOTOGRAPHS, "deep.png")
"""Kinds whose results may be others: nothing in the folder says what the file was."""


class Fuzz:
    """Two runs, a table and photographs, of which one file at a time is damaged and restored."""

    def __init__(self, folder: Path) -> None:
        self.run, self.other = (make_run(folder / f"run{seed}", seed) for seed in range(2))
        self.bare = folder / "bare"  # nothing has hashes of its results
        shutil.copytree(self.run, self.bare, ignore=shutil.ignore_patterns("metrics.json"))
        self.table, self.photographs = make_table(folder / "table"), make_photographs(folder / "photographs")

    def folder(self, kind: str) -> Path:
        """Where the file of that kind lies."""
        if kind.startswith("read"):
            return self.photographs
        return self.table if kind.endswith("data.csv") else self.bare if kind.endswith("alone") else self.run

    def damage(self, kind: str, count: int) -> Figures:
        """Damages a file so many times, and counts what becomes of it."""
        read, name, ways = KINDS[kind]
        path = self.folder(kind) / name
        content, expected, free = path.read_bytes(), read(path.parent), kind.endswith(FREE)
        figures = Figures(Counter(), {})
        for seed in range(name == "metrics.json", count):  # a run without is one that is not evaluated
            chance = random.Random(f"{kind} {seed}")
            damaged = None if seed == 0 else self._swapped(path, seed) or chance.choice(ways)(chance, content)
            if damaged == content:
                continue
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            outcome, detail = self._outcome(read, path, expected, free)
            path.unlink(missing_ok=True)
            path.write_bytes(content)
            figures.counts[outcome] += 1
            if outcome not in ("refused", "the same", *(("another",) if free else ())):
                figures.failures.setdefault(outcome, []).append(f"{kind} {seed}: {detail}")
        return figures

    def _swapped(self, path: Path, seed: int) -> bytes | None:
        """The same file of another model, or another file of the same one, for the first few seeds."""
        files = [self.other / path.name, *sorted(other for other in path.parent.iterdir() if other.is_file())]
        swapped = files[seed - 1] if seed <= len(files) else None
        return swapped.read_bytes() if swapped and swapped.is_file() else None

    @staticmethod
    def _outcome(read: Callable[[Path], Any], path: Path, expected: Any, free: bool) -> tuple[str, str]:
        began = time.monotonic()
        try:
            outcome, detail = "the same" if read(path.parent) == expected else "another", ""
        except (ValueError, OSError) as error:
            outcome, detail = "refused", str(error)
            if not (free and path.suffix in (".json", ".csv", ".npz")) and path.parent.name not in detail:
                outcome = "refused, but no file named"
        except Exception as error:
            outcome, detail = "traceback", repr(error)
        return ("hang" if time.monotonic() - began > SECONDS else outcome), detail


def main() -> None:
    """Prints a table."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as folder:
        fuzz, total = Fuzz(Path(folder)), Counter()
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for kind in KINDS if len(sys.argv) < 3 else sys.argv[2:]:
            began = time.process_time()
            figures = fuzz.damage(kind, count)
            total += figures.counts
            print(f"{kind}: {dict(figures.counts)}, {time.process_time() - began:.1f} CPU s", flush=True)
            for outcome, cases in figures.failures.items():
                print(*(f"  {outcome}: {case[:300]}" for case in cases[:5]), sep="\n", flush=True)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(
            f"{sum(total.values())} inputs: {dict(total)}; peak memory {peak / 1024:.0f} MiB, {start / 1024:.0f} before"
        )


if __name__ == "__main__":
    main()
