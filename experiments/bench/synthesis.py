"""What drawing anomalies within the step is worth: DRAEM's training, against the same with numpy and Pillow.

    python -m experiments.bench.synthesis

The images are rendered. On the host, one process makes the anomaly of every image (`textured` of plain_generators.py,
without the rotations that the device makes) while the device computes the previous step, which is the same program
without generators. The host sends neither the clean images nor the masks, which would cost it even more.
"host_seconds_a_step" is the time that Python needs to submit a step; if the host has nothing to do between steps, it is
a fraction of the step. The compiled step is searched for callbacks and feeds. Times are medians and quartiles of one
run, in which both ways and the step without anomalies take turns, without compile time. Entries of other devices in
bench_synthesis.json are kept. `--smoke` is the small variant for the tests.
"""

import importlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import plain_generators
from experiments.command import RESULTS, origin, start
from experiments.opening import batch_of
from jaxad.base import PyTree
from jaxad.data.demo import render
from jaxad.files import read_json, write_json
from jaxad.methods.draem import draem

HOST = re.compile(r"callback|infeed|outfeed|\bsend\(|\brecv\(")
"""Operations of a compiled program that wait for the host."""


@dataclass
class Options:
    """Compare training with anomalies drawn on the device and on the host."""

    size: int = 256
    batch: int = 8
    width: int = 16
    """Channels of the first block of both networks."""
    steps: int = 4
    """Steps in every turn."""
    turns: int = 6
    results: Path = RESULTS
    smoke: bool = False
    """Small images, few steps."""


def step_seconds(
    options: Options, update: Any, state: PyTree, next_images: Callable[[], np.ndarray]
) -> Iterator[tuple[float, float]]:
    """The seconds of every step, and those until Python has submitted it."""
    images = next_images()
    for i in range(options.steps):
        started = time.perf_counter()
        state, _ = update(jax.random.key(i), state, {}, batch_of(jnp.asarray(images)))
        submitted = time.perf_counter() - started
        images = next_images()
        jax.block_until_ready(state)
        yield time.perf_counter() - started, submitted


def main(options: Options) -> None:
    """Measures both ways and writes results/bench_synthesis.json."""
    if options.smoke:
        options.size, options.batch, options.width, options.steps, options.turns = 32, 2, 2, 1, 2
    size = (options.size, options.size)
    normal, other = (
        np.stack([render("fabric", k + i, size=options.size)[0] for i in range(options.batch)]) for k in (0, 100)
    )
    random, key = np.random.default_rng(0), jax.random.key(0)
    widths: dict[str, Any] = dict(reconstructive_width=options.width, discriminative_width=options.width)
    stage = draem(image_size=size, **widths).stages[0]
    state = jax.jit(lambda key: stage.init(key, None, {}, None))(key)
    batch = batch_of(jnp.asarray(normal))
    within_step: Any = jax.jit(stage.update).lower(key, state, {}, batch).compile()

    def textured_on_host() -> np.ndarray:
        return np.stack([plain_generators.textured(random, *pair)[0] for pair in zip(normal, other, strict=True)])

    module, mask = importlib.import_module("jaxad.methods.draem"), jnp.zeros(size, bool).at[: size[0] // 2].set(True)
    no_generators = {
        "add_texture": lambda key, image, source: (image, mask),
        "source": lambda key, size, textures, changes: None,
        "rotate": lambda image, degrees: image,
    }
    with mock.patch.multiple(module, **no_generators):
        update = draem(image_size=size, **widths).stages[0].update
        without: Any = jax.jit(update).lower(key, state, {}, batch).compile()
    ways: dict[str, tuple[Any, Callable[[], np.ndarray]]] = {
        "within_step": (within_step, lambda: normal),
        "by_host": (without, textured_on_host),
        "without": (without, lambda: normal),
    }
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(options.turns):
        for name, way in ways.items():
            update, next_images = way
            measured[name] += step_seconds(options, update, state, next_images)
    started = time.perf_counter()
    textured_on_host()
    host_seconds = time.perf_counter() - started
    row: dict[str, Any] = {"size": options.size, "batch": options.batch, "width": options.width}
    for name, pairs in measured.items():
        seconds, submitted = np.array(pairs).T
        row[name] = {
            "images_a_second": options.batch / float(np.median(seconds)),
            "seconds_a_step": float(np.median(seconds)),
            "quartiles": np.quantile(seconds, [0.25, 0.75]).tolist(),
            "host_seconds_a_step": float(np.median(submitted)) + (host_seconds if name == "by_host" else 0),
        }
    row["within_step"]["host_operations"] = len(HOST.findall(within_step.as_text()))
    row |= {"ratio": row["by_host"]["seconds_a_step"] / row["within_step"]["seconds_a_step"], **origin()}
    print(row)
    path = options.results / "bench_synthesis.json"
    devices = read_json(path)["devices"] if path.exists() else {}
    write_json(path, {"experiment": "bench_synthesis", "devices": devices | {row["device"]: row}})


if __name__ == "__main__":
    start(main, Options)
