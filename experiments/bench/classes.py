"""Several classes in one program against a loop over them: the same numbers, the time, and where it goes.

    python -m experiments.bench.classes --data demo MTD_FOLDER PILLQC_FOLDER

The contenders fit and score the same classes (embedded backbone, 128 px) in turns: all classes in one program, a few of
them in each step of one program (`--classes-per-step`), or one class after another. Compile time is reported apart from
run time: one program compiles once, the loop once for each number of images. One program pads small classes to the
largest. `padded_share` is the share of rows that are padding, and `as_if_even` the ratio of run times without it, an
estimate for classes of equal size.

Phases follow the driver's progress: collecting (decoding, embedding and updating), finishing and scoring. A second
measurement with all images embedded in advance leaves updating and scoring. Decoding and embedding are also timed
separately. `--smoke` is the small variant for the tests.
"""

import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.command import RESULTS, origin, start
from jaxad import backbones
from jaxad.base import Frozen, Method, Scores
from jaxad.data import Dataset, Preprocess, open_data
from jaxad.driver.embedding import EmbeddingCache, embed_program
from jaxad.driver.execution import Execution
from jaxad.driver.fit import fit, fit_classes
from jaxad.driver.memory import peak_bytes
from jaxad.driver.mesh import Layout
from jaxad.driver.program import compile_seconds
from jaxad.driver.programs import abstract_state, embedded_spec
from jaxad.driver.scoring import score_all, score_classes
from jaxad.files import write_json
from jaxad.methods import METHODS
from jaxad.metrics import auroc

BACKBONE = "pdn_small"
KEY = jax.random.key(0)


@dataclass
class Options:
    """Fit and score several classes at once and one after another."""

    data: tuple[str, ...] = ("demo",)
    """Data sets, all of whose categories are classes: folders, or whatever `jaxad fit` takes."""
    methods: tuple[str, ...] = ("patchcore", "padim", "mahalanobis_ad")
    size: int = 128
    batch_size: int = 16
    classes_per_step: tuple[int, ...] = (2,)
    most_images: int | None = None
    """Most images of a split of a class, evenly chosen; None: all."""
    most_bytes: float = 6e9
    """A method whose states of all classes are larger than this, in bytes, is left out."""
    runs: int = 3
    results: Path = RESULTS
    notes: str = ""
    """Remarks about this run, kept in its result."""
    smoke: bool = False
    """A few small demo images."""


class Classes(NamedTuple):
    """A method and the data of all classes."""

    method: Method
    frozen: Frozen
    train: list[Dataset]
    test: list[Dataset]
    execution: Execution


class Clock:
    """A `Progress` that adds up the seconds of a fit's phases, without compile time."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._phase, self._since = "start", self._now()

    def __call__(self, phase: str, done: int, total: int) -> None:
        """As `jaxad.driver.execution.Progress`."""
        self.enter("collect" if total else "finish")

    def enter(self, phase: str) -> None:
        """Ends the current phase and starts another."""
        now = self._now()
        self.seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def _now(self) -> float:
        return time.perf_counter() - compile_seconds()


class Run(NamedTuple):
    """One run of a contender: scores of each class, seconds by phase, and seconds of compilation."""

    scores: list[Scores]
    seconds: dict[str, float]
    compile: float


def at_once(classes: Classes, classes_per_step: int | None = None) -> Run:
    """All classes in one program, `classes_per_step` at a time."""
    method, frozen, train, test, execution = classes
    execution = execution._replace(classes_per_step=classes_per_step)
    clock, compiled = Clock(), compile_seconds()
    state = fit_classes(method, frozen, train, KEY, execution._replace(progress=clock)).state
    clock.enter("score")
    parts: list[list[Scores]] = [[] for _ in test]
    for c, _, scores in score_classes(method, state, frozen, test, execution):
        parts[c].append(scores)
    clock.enter("end")
    joined = [jax.tree.map(lambda *leaves: np.concatenate(leaves), *part) for part in parts]
    return Run(joined, clock.seconds, compile_seconds() - compiled)


def in_turn(classes: Classes) -> Run:
    """One class after another."""
    method, frozen, train, test, execution = classes
    clock, compiled, scores = Clock(), compile_seconds(), []
    for data, new in zip(train, test, strict=True):
        clock.enter("start")
        state = fit(method, frozen, data, KEY, execution._replace(progress=clock)).state
        clock.enter("score")
        scores.append(score_all(method, state, frozen, new, execution))
    clock.enter("end")
    return Run(scores, clock.seconds, compile_seconds() - compiled)


def open_classes(options: Options) -> tuple[list[Dataset], list[Dataset]]:
    """Training and test images of every class."""
    size = 64 if options.smoke else options.size
    train, test = [], []
    for source in options.data:
        for split in open_data(source, preprocess=Preprocess((size, size))).values():
            if split.test is None:
                raise ValueError(f"every class needs a test split, got none in {source}")
            most = 10 - 2 * len(train) if options.smoke else options.most_images
            for part, into in ((split.train, train), (split.test, test)):
                into.append(part.subset(slice(None, None, 1 if most is None else math.ceil(len(part) / most))))
    return train, test


def measure(name: str, train: list[Dataset], test: list[Dataset], options: Options) -> dict[str, Any]:
    """Measures all contenders with one method, in turns, then again with embedded images."""
    size = {} if name == "mahalanobis_ad" else {"image_size": train[0].image_size}
    method, frozen = METHODS[name](backbone=BACKBONE, **size), backbones.load(BACKBONE)
    spec = embedded_spec(method.embed, frozen, max(map(len, train)), train[0].image_size)
    state = abstract_state(method, frozen, spec, 0)
    needed = len(train) * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    if needed > options.most_bytes:
        return {"state_bytes": needed, "left_out": f"more than {options.most_bytes:.3g} bytes"}
    contenders: dict[str, Callable[[Classes], Run]] = {"one program": at_once, "loop": in_turn}
    for n in options.classes_per_step:
        contenders[f"one program, {n} classes a step"] = lambda classes, n=n: at_once(classes, n)
    execution = Execution(batch_size=options.batch_size)
    classes = Classes(method, frozen, train, test, execution)
    cold = take_turns(contenders, classes, 1 if options.smoke else options.runs)
    embedded = classes._replace(execution=execution._replace(cache=EmbeddingCache()))
    in_turn(embedded)
    warm = take_turns(contenders, embedded, 1)
    loop = cold["loop"][0]
    record = {"state_bytes": needed, "contenders": {}}
    for contender, runs in cold.items():
        totals = [sum(run.seconds.values()) for run in runs]
        middle = runs[int(np.argsort(totals)[len(totals) // 2])]
        phases = {k: middle.seconds[k] for k in ("start", "collect", "finish", "score")}
        cached = {k: warm[contender][0].seconds[k] for k in ("collect", "finish", "score")}
        record["contenders"][contender] = {
            "first_compile": runs[0].compile,
            "later_compile": [run.compile for run in runs[1:]],
            "runs": totals,
            "median": float(np.median(totals)),
            "phases": phases,
            "phases_of_embedded_images": {"update" if k == "collect" else k: v for k, v in cached.items()},
            "over_loop": difference(runs[0].scores, loop.scores),
            "image_AUROC": {
                data.category: auroc(scores.image, data.labels)
                for data, scores in zip(test, runs[0].scores, strict=True)
            },
        }
    median = {k: v["median"] for k, v in record["contenders"].items()}
    compiled = {k: v["first_compile"] for k, v in record["contenders"].items()}
    record["ratio"] = {k: median["loop"] / v for k, v in median.items()}
    record["ratio_with_compilation"] = {
        k: (median["loop"] + compiled["loop"]) / (v + compiled[k]) for k, v in median.items()
    }
    record["as_if_even"] = median["loop"] / (median["one program"] * (1 - padded(train)))
    record["separate_parts"] = separate_parts(classes)
    record["bounded_by"] = {
        contender: bound(entry["phases_of_embedded_images"], record["separate_parts"], contender != "loop")
        for contender, entry in record["contenders"].items()
    }
    record["peak_bytes"] = peak_bytes()
    return record


def take_turns(contenders: dict[str, Callable[[Classes], Run]], classes: Classes, runs: int) -> dict[str, list[Run]]:
    """Runs every contender several times, in turns; only the first run of each keeps its scores."""
    results: dict[str, list[Run]] = {name: [] for name in contenders}
    for turn in range(runs):
        for name, call in contenders.items():
            run = call(classes)
            results[name].append(run._replace(scores=[]) if turn else run)
            print(name, {k: round(v, 2) for k, v in run.seconds.items()}, file=sys.stderr, flush=True)
    return results


def difference(scores: list[Scores], expected: list[Scores]) -> dict[str, float]:
    """The largest difference of the scores of a class, as a share of its largest score; for images and pixels."""
    largest: dict[str, float] = {}
    for pair in zip(scores, expected, strict=True):
        for kind, a, b in zip(Scores._fields, *pair, strict=True):
            if a is not None and b is not None:
                relative = np.abs(np.subtract(a, b)).max() / np.abs(b).max()
                largest[kind] = max(largest.get(kind, 0.0), float(relative))
    return largest


def padded(datasets: Sequence[Dataset]) -> float:
    """The share of the rows of one program that are padding."""
    n = [len(data) for data in datasets]
    return 1 - sum(n) / (max(n) * len(n))


def separate_parts(classes: Classes) -> dict[str, float]:
    """Seconds for decoding all images, and for embedding them as either contender does, padding included."""
    method, frozen, train, test, execution = classes
    b, started = execution.batch_size, time.perf_counter()
    for data in (*train, *test):
        for first in range(0, len(data), b):
            data.images(range(first, min(first + b, len(data))))
    seconds = {"decode": time.perf_counter() - started}
    batch = np.resize(train[0].images(range(min(b, len(train[0])))), (b, *train[0].image_size, 3))
    steps = [[math.ceil(len(data) / b) for data in part] for part in (train, test)]
    ways = {
        "embed in the loop": (1, sum(map(sum, steps))),
        "embed in one program": (len(train), sum(map(max, steps))),
    }
    program = embed_program(method.embed, Layout(), None)
    for way, (count, times) in ways.items():
        images = np.stack([batch[None]] * count)
        jax.block_until_ready(program(frozen, jnp.asarray(images)))
        started = time.perf_counter()
        for _ in range(3):
            jax.block_until_ready(program(frozen, jnp.asarray(images)))
        seconds[way] = (time.perf_counter() - started) / 3 * times
    return seconds


def bound(phases: dict[str, float], separate: dict[str, float], one_program: bool) -> dict[str, Any]:
    """The part that takes longest, and the share of each part."""
    embed = separate["embed in one program" if one_program else "embed in the loop"]
    parts = {"decode": separate["decode"], "embed": embed} | phases
    total = sum(parts.values())
    return {"part": max(parts, key=parts.__getitem__), "shares": {k: v / total for k, v in parts.items()}}


def main(options: Options) -> None:
    """Measures every method and writes results/bench_classes.json."""
    train, test = open_classes(options)
    methods = {}
    for name in options.methods:
        print(name, file=sys.stderr)
        methods[name] = measure(name, train, test, options)
    record = {
        "recipe": "bench_classes",
        "backbone": BACKBONE,
        "data": [Path(source).name for source in options.data],
        "image_size": train[0].image_size,
        "batch_size": options.batch_size,
        "classes": {
            data.category: {"train": len(data), "test": len(new)} for data, new in zip(train, test, strict=True)
        },
        "most_images": options.most_images,
        "padded_share": {"train": padded(train), "test": padded(test)},
        "methods": methods,
        **origin(),
        "notes": options.notes,
    }
    write_json(options.results / "bench_classes.json", record)
    for name, measured in methods.items():
        if "left_out" in measured:
            print(f"{name}: left out, {measured['state_bytes']:.3g} bytes")
            continue
        ratios = ", ".join(f"{k} {v:.2f}" for k, v in measured["ratio"].items() if k != "loop")
        differences = {k: v["over_loop"] for k, v in measured["contenders"].items()}
        print(f"{name}: loop over {ratios}; bounded by {measured['bounded_by']['one program']['part']}; {differences}")


if __name__ == "__main__":
    start(main, Options)
