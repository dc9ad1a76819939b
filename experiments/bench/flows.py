"""How fast flows train: on cached features, against a plain loop, against FrEIA, and with all classes at once.

    python -m experiments.bench.flows --data BOTTLE_FOLDER --weights resnet18.tv_in1k.safetensors --torch-python PYTHON

- plain loop: `embed` and `update` in one compiled step, which decodes and embeds its images every time, against the
  steps of `jaxad.fit` in the second half of its epochs, when features come from the cache. A flow that costs more than
  the backbone cannot gain much; the seconds of decoding and the backbone show how much it can.
- FrEIA: steps of the same blocks with the same batch in torch, on as many threads, in turns with jaxad's.
- classes: four classes in one program, against one fit after another; both in the second half of the epochs.

All times are medians of steps of one run, without compile time. `--smoke` is the small variant for the tests.
"""

import functools
import itertools
import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.command import RESULTS, origin, start
from experiments.opening import batch_of, initial_state, last_shuffled
from jaxad import backbones
from jaxad.base import Method
from jaxad.data import Dataset, Preprocess, open_data
from jaxad.driver.execution import Execution
from jaxad.driver.fit import fit, fit_classes
from jaxad.driver.program import Program, compile_seconds
from jaxad.driver.programs import embedded_spec
from jaxad.driver.schedule import chunk_steps
from jaxad.files import write_json
from jaxad.methods import METHODS

KEY = jax.random.key(0)
LAYERS = ("layer2", "layer3")
FLOWS: dict[str, dict[str, Any]] = {
    "nf": {"layers": ("layer1", "layer2", "layer3")},
    "differnet": {"layer": "layer3", "rotations": 4, "train_rotations": 4, "hidden": 512},
    "cflow": {"layers": ("layer3",), "coupling_blocks": 4},
    "csflow": {"layer": "layer3", "hidden": 64},
    "fastflow": {"layers": ("layer3",), "conv3x3_only": True},
}
"""Hyperparameters that the options do not set."""


@dataclass
class Options:
    """Measure the training of flows."""

    data: str = "demo"
    weights: Path | None = None
    torch_python: Path | None = None
    """A Python interpreter with torch and FrEIA; None: that part is left out."""
    image_size: int = 256
    images: int = 48
    batch_size: int = 16
    methods: tuple[str, ...] = tuple(FLOWS)
    """Measured against a plain loop; DifferNet and NF also on all classes."""
    peers: tuple[str, ...] = ("fastflow", "cflow")
    """Measured against FrEIA."""
    results: Path = RESULTS
    smoke: bool = False
    """Few small images."""


def flow_method(name: str, backbone: str, options: Options, **hyperparameters: Any) -> Method:
    """The method of a flow, for the size of images and batches in the options."""
    size = {} if name == "nf" else {"image_size": (options.image_size, options.image_size)}
    fixed = {"backbone": backbone, "train_batch_size": options.batch_size, **size, **FLOWS[name]}
    return METHODS[name](**fixed, **hyperparameters)


def step_seconds(step: Callable[[], Any], n: int) -> list[float]:
    """The seconds of n steps, after a first one that does not count."""
    jax.block_until_ready(step())
    seconds = []
    for _ in range(n):
        started = time.perf_counter()
        jax.block_until_ready(step())
        seconds.append(time.perf_counter() - started)
    return seconds


def cached_steps(run: Callable[[int, Any], Any]) -> list[tuple[float, int]]:
    """Seconds and images of the chunks of steps in the second half of a fit; `run` takes its epochs and progress."""
    calls: list[tuple[float, int, int]] = []

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "train":
            calls.append((time.perf_counter() - compile_seconds(), done, total))

    run(2 * chunk_steps(), progress)
    return [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(calls) if a[1] >= a[2] / 2]


def against_plain_loop(name: str, backbone: str, frozen: Any, train: Dataset, options: Options) -> dict[str, Any]:
    """A flow's steps on cached features, against those of a loop that runs the backbone in each step."""
    method, size = flow_method(name, backbone, options), options.batch_size

    def run(epochs: int, progress: Any) -> None:
        longer = flow_method(name, backbone, options, epochs=epochs)
        fit(longer, frozen, train, KEY, Execution(progress=progress))

    cached = [seconds * size / images for seconds, images in cached_steps(run)]
    stage = last_shuffled(method)
    state = initial_state(method, frozen, embedded_spec(method.embed, frozen, size, train.image_size), stage)
    order = np.random.default_rng(0)
    embed = Program(lambda images: method.embed(frozen, images))
    update = Program(lambda state, images: stage.update(KEY, state, None, batch_of(method.embed(frozen, images)))[0])

    def images() -> np.ndarray:
        return train.images(order.choice(len(train), size, len(train) < size))

    steps = 1 if options.smoke else 5
    plain = step_seconds(lambda: update(state, images()), steps)
    embedding = step_seconds(lambda: embed(images()), steps)
    medians = {k: float(np.median(v)) for k, v in dict(cached=cached, plain_loop=plain, backbone=embedding).items()}
    return {"seconds_a_step": medians, "plain_loop_over_cached": medians["plain_loop"] / medians["cached"]}


def against_freia(name: str, shape: tuple[int, int, int], batch_size: int, options: Options) -> dict[str, Any]:
    """Steps of a flow on feature maps of a shape (h w c), in turns with those of FrEIA.

    FastFlow's batches hold images. CFLOW-AD's hold positions, and a step of jaxad takes all positions of an image.
    """
    h, w, c = shape
    layer: dict[str, Any] = {"layers": ("layer3",), "image_size": (16 * h, 16 * w), "backbone": "resnet18.tv_in1k"}
    if name == "fastflow":
        method, images, fibers = METHODS[name](**layer, conv3x3_only=True), batch_size, 1
    else:
        method, images, fibers = METHODS[name](**layer, fiber_batch_size=batch_size), 1, h * w // batch_size
    x = {"layer3": jax.random.normal(KEY, (images, h, w, c))}
    stage = last_shuffled(method)
    state = initial_state(method, None, jax.eval_shape(lambda: x), stage)
    update = Program(lambda state, x: stage.update(KEY, state, None, batch_of(x))[0])
    steps, threads = (1, 1) if options.smoke else (10, os.cpu_count() or 1)
    ours, theirs, version = [], [], ""
    for _ in range(1 if options.smoke else 3):
        ours += [seconds / fibers for seconds in step_seconds(lambda: update(state, x), steps)]
        if options.torch_python:
            settings = dict(method=name, shape=(c, h, w), batch_size=batch_size, steps=steps + 1, threads=threads)
            command = [str(options.torch_python), str(Path(__file__).with_name("freia_step.py")), json.dumps(settings)]
            output = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            theirs, version = theirs + output["seconds"][1:], output["torch"]
    record: dict[str, Any] = {"shape": shape, "batch_size": batch_size, "seconds_a_step": float(np.median(ours))}
    if theirs:
        record |= {"freia_seconds_a_step": float(np.median(theirs)), "torch": version}
        record["freia_over_jaxad"] = record["freia_seconds_a_step"] / record["seconds_a_step"]
    return record


def classes_at_once(name: str, backbone: str, frozen: Any, options: Options) -> dict[str, Any]:
    """A flow on the four demo classes in one program, against one class after another."""
    splits = open_data("demo", preprocess=Preprocess((options.image_size, options.image_size))).values()
    classes = [split.train.subset(slice(None, options.images // 4)) for split in splits if split.train is not None]

    def one_program(epochs: int, progress: Any) -> None:
        method = flow_method(name, backbone, options, epochs=epochs)
        fit_classes(method, frozen, classes, KEY, Execution(progress=progress))

    def one_class(data: Dataset, epochs: int, progress: Any) -> None:
        fit(flow_method(name, backbone, options, epochs=epochs), frozen, data, KEY, Execution(progress=progress))

    def epoch_seconds(run: Callable[[int, Any], Any]) -> float:
        return sum(seconds for seconds, _ in cached_steps(run)) / chunk_steps()

    seconds = {
        "one_program": epoch_seconds(one_program),
        "in_turn": sum(epoch_seconds(functools.partial(one_class, data)) for data in classes),
    }
    return {
        "classes": len(classes),
        "seconds_an_epoch": seconds,
        "in_turn_over_one_program": seconds["in_turn"] / seconds["one_program"],
    }


def main(options: Options) -> None:
    """Measures everything and writes results/bench_flows.json."""
    backbone = "resnet18" if options.weights is None else backbones.of_file(options.weights)
    frozen: Any
    if options.smoke:
        options.image_size, options.images, options.batch_size = 64, 8, 2
        frozen = backbones.backbone(backbone).init(KEY)
    else:
        frozen = backbones.load(backbone, options.weights)
    preprocess = Preprocess((options.image_size, options.image_size))
    train = next(iter(open_data(options.data, preprocess=preprocess).values())).train
    assert train is not None
    train = train.subset(slice(None, options.images))
    rows: dict[str, dict[str, Any]] = {}
    for name in options.methods:
        rows[name] = against_plain_loop(name, backbone, frozen, train, options)
        print(name, rows[name], flush=True)
    side, channels = (2, 16) if options.smoke else (16, 256)
    peers = {}
    for name in options.peers:
        size = 2 if options.smoke else 16 if name == "fastflow" else 256
        peers[name] = against_freia(name, (side, side, channels), size, options)
        print(name, peers[name], flush=True)
    cheap = [name for name in ("differnet", "nf") if name in options.methods]
    several = {name: classes_at_once(name, backbone, frozen, options) for name in cheap}
    print(several, flush=True)
    record = {
        "benchmark": "bench_flows",
        "backbone": backbone,
        "image_size": options.image_size,
        "batch_size": options.batch_size,
        "flows": rows,
        "freia": peers,
        "classes_at_once": several,
        **origin(),
    }
    write_json(options.results / "bench_flows.json", record)


if __name__ == "__main__":
    start(main, Options)
