"""How fast flows are trained: on cached features, beside a plain loop, beside FrEIA, and all classes at once.

    python experiments/bench_flows.py --data BOTTLE_FOLDER --weights resnet18.tv_in1k.safetensors --torch-python PYTHON

- plain loop: the same `embed` and `update` in one compiled step, which decodes and embeds its images in every step;
  beside the steps that `jaxad.fit` takes in the second half of its epochs, when features come from the cache. A flow
  that costs more than the backbone cannot gain much; the seconds of decoding and the backbone alone say how much it
  could.
- FrEIA: steps of the same blocks with the same batch in torch, on as many threads, in turns with jaxad's.
- classes: four classes in one program, beside one fit after the other; both in the second half of the epochs.

All times are medians of steps of this one run, compile time apart. `--smoke` is the small variant that the tests run.
"""

import functools
import itertools
import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from command import origin, start
from jaxad import backbones
from jaxad.files import write_json
from jaxad.base import Batch, Method, PyTree
from jaxad.data import Dataset, Preprocess, open_data
from jaxad.driver.fit import chunk, fit, fit_classes
from jaxad.methods import METHODS
from jaxad.driver.program import Program, compile_seconds

KEY = jax.random.key(0)
LAYERS = ("layer2", "layer3")
FLOWS: dict[str, dict[str, Any]] = {
    "nf": {"layers": ("layer1", "layer2", "layer3")},
    "differnet": {"layer": "layer3", "rotations": 4, "train_rotations": 4, "hidden": 512},
    "cflow": {"layers": ("layer3",), "coupling_blocks": 4},
    "csflow": {"layer": "layer3", "hidden": 64},
    "fastflow": {"layers": ("layer3",), "conv3x3_only": True},
}
"""Hyper-parameters beside those of the run."""


@dataclass
class Options:
    """Measure the training of flows."""

    data: str = "demo"
    weights: Path | None = None
    torch_python: Path | None = None
    """An interpreter with torch and FrEIA; none: that part is left out."""
    image_size: int = 256
    images: int = 48
    batch_size: int = 16
    methods: tuple[str, ...] = tuple(FLOWS)
    """Beside a plain loop; DifferNet and NF also on all classes."""
    peers: tuple[str, ...] = ("fastflow", "cflow")
    """Beside FrEIA."""
    results: Path = field(default_factory=lambda: Path(__file__).parent / "results")
    smoke: bool = False
    """Few small images."""


def make(name: str, backbone: str, options: Options, **more: Any) -> Method:
    """A flow."""
    size = {} if name == "nf" else {"image_size": (options.image_size, options.image_size)}
    return METHODS[name](backbone=backbone, train_batch_size=options.batch_size, **size, **FLOWS[name], **more)


def batch_of(x: PyTree, n: int) -> Batch:
    """A batch without padding."""
    return Batch(x, jnp.ones(n, bool), jnp.zeros(n, jnp.int32), None, jnp.arange(n, dtype=jnp.int32), jnp.float32(0.5))


def timed(step: Callable[[], Any], n: int) -> list[float]:
    """The seconds of n steps, after one."""
    jax.block_until_ready(step())
    seconds = []
    for _ in range(n):
        started = time.perf_counter()
        jax.block_until_ready(step())
        seconds.append(time.perf_counter() - started)
    return seconds


def cached_steps(run: Callable[[int, Any], Any]) -> list[tuple[float, int]]:
    """Seconds and images of the chunks of steps in the second half of a fit; `run` takes its epochs and progress."""
    moments: list[tuple[float, int, int]] = []

    def progress(what: str, done: int, total: int) -> None:
        if what == "train":
            moments.append((time.perf_counter() - compile_seconds(), done, total))

    run(2 * chunk(), progress)
    return [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(moments) if a[1] >= a[2] / 2]


def beside_a_plain_loop(name: str, backbone: str, frozen: Any, train: Dataset, options: Options) -> dict[str, Any]:
    """A flow's steps on cached features, and those of a loop that runs the backbone in each."""
    method, size = make(name, backbone, options), options.batch_size

    def run(epochs: int, progress: Any) -> None:
        fit(make(name, backbone, options, epochs=epochs), frozen, train, KEY, progress=progress)

    cached = [seconds * size / images for seconds, images in cached_steps(run)]
    spec = jax.eval_shape(method.embed, frozen, jax.ShapeDtypeStruct((size, *train.image_size, 3), jnp.uint8))
    state, stage = method.init(KEY, frozen, spec), next(s for s in method.stages if s.shuffle)
    for before in method.stages[: method.stages.index(stage)]:
        state = before.finalize(KEY, state, frozen)
    order = np.random.default_rng(0)
    embed = Program(lambda images: method.embed(frozen, images))
    update = Program(
        lambda state, images: stage.update(KEY, state, None, batch_of(method.embed(frozen, images), size))[0]
    )

    def images() -> np.ndarray:
        return train.images(order.choice(len(train), size, len(train) < size))

    steps = 1 if options.smoke else 5
    plain = timed(lambda: update(state, images()), steps)
    alone = timed(lambda: embed(images()), steps)
    middle = {k: float(np.median(v)) for k, v in dict(cached=cached, plain_loop=plain, backbone=alone).items()}
    return {"seconds_a_step": middle, "plain_loop_over_cached": middle["plain_loop"] / middle["cached"]}


def beside_freia(name: str, shape: tuple[int, int, int], batch_size: int, options: Options) -> dict[str, Any]:
    """Steps of a flow on feature maps of that shape (h w c), in turns with those of FrEIA.

    A batch of FastFlow is of images; of CFLOW-AD it is of positions, and jaxad's step takes those of one image.
    """
    h, w, c = shape
    layer = {"layers": ("layer3",), "image_size": (16 * h, 16 * w), "backbone": "resnet18.tv_in1k"}
    if name == "fastflow":
        method, images, fibers = METHODS[name](**layer, conv3x3_only=True), batch_size, 1
    else:
        method, images, fibers = METHODS[name](**layer, fiber_batch_size=batch_size), 1, h * w // batch_size
    x = {"layer3": jax.random.normal(KEY, (images, h, w, c))}
    state = method.init(KEY, None, jax.eval_shape(lambda: x))
    update = Program(lambda state, x: method.stages[0].update(KEY, state, None, batch_of(x, images))[0])
    steps, threads = (1, 1) if options.smoke else (10, os.cpu_count() or 1)
    ours, theirs, version = [], [], ""
    for _ in range(1 if options.smoke else 3):
        ours += [seconds / fibers for seconds in timed(lambda: update(state, x), steps)]
        if options.torch_python:
            given = dict(method=name, shape=(c, h, w), batch_size=batch_size, steps=steps + 1, threads=threads)
            command = [str(options.torch_python), str(Path(__file__).with_name("freia_step.py")), json.dumps(given)]
            told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            theirs, version = theirs + told["seconds"][1:], told["torch"]
    record: dict[str, Any] = {"shape": shape, "batch_size": batch_size, "seconds_a_step": float(np.median(ours))}
    if theirs:
        record |= {"freia_seconds_a_step": float(np.median(theirs)), "torch": version}
        record["freia_over_jaxad"] = record["freia_seconds_a_step"] / record["seconds_a_step"]
    return record


def classes_at_once(name: str, backbone: str, frozen: Any, options: Options) -> dict[str, Any]:
    """A flow on the four demo classes in one program, and one after the other."""
    opened = open_data("demo", preprocess=Preprocess((options.image_size, options.image_size))).values()
    few = [split.train.subset(slice(None, options.images // 4)) for split in opened if split.train is not None]

    def together(epochs: int, progress: Any) -> None:
        fit_classes(make(name, backbone, options, epochs=epochs), frozen, few, KEY, progress=progress)

    def alone(data: Dataset, epochs: int, progress: Any) -> None:
        fit(make(name, backbone, options, epochs=epochs), frozen, data, KEY, progress=progress)

    def an_epoch(run: Callable[[int, Any], Any]) -> float:
        return sum(seconds for seconds, _ in cached_steps(run)) / chunk()

    seconds = {
        "one_program": an_epoch(together),
        "in_turn": sum(an_epoch(functools.partial(alone, data)) for data in few),
    }
    return {
        "classes": len(few),
        "seconds_an_epoch": seconds,
        "in_turn_over_one_program": seconds["in_turn"] / seconds["one_program"],
    }


def main(options: Options) -> None:
    """Measures everything."""
    backbone = "resnet18" if options.weights is None else backbones.of_file(options.weights)
    frozen: Any
    if options.smoke:
        options.image_size, options.images, options.batch_size = 64, 8, 2
        frozen = backbones.backbone(backbone).init(KEY)
    else:
        frozen = backbones.load(backbone, options.weights)
    train = next(
        iter(open_data(options.data, preprocess=Preprocess((options.image_size, options.image_size))).values())
    ).train
    assert train is not None
    train = train.subset(slice(None, options.images))
    rows: dict[str, dict[str, Any]] = {}
    for name in options.methods:
        rows[name] = beside_a_plain_loop(name, backbone, frozen, train, options)
        print(name, rows[name], flush=True)
    side, channels = (2, 16) if options.smoke else (16, 256)
    peers = {}
    for name in options.peers:
        size = 2 if options.smoke else 16 if name == "fastflow" else 256
        peers[name] = beside_freia(name, (side, side, channels), size, options)
        print(name, peers[name], flush=True)
    cheap = [name for name in ("differnet", "nf") if name in options.methods]
    together = {name: classes_at_once(name, backbone, frozen, options) for name in cheap}
    print(together, flush=True)
    record = {
        "benchmark": "bench_flows",
        "backbone": backbone,
        "image_size": options.image_size,
        "batch_size": options.batch_size,
        "flows": rows,
        "freia": peers,
        "classes_at_once": together,
        **origin(),
    }
    write_json(options.results / "bench_flows.json", record)


if __name__ == "__main__":
    start(main, Options)
