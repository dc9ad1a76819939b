"""What it is worth that anomalies are drawn within the step: DRAEM's training, beside the same with numpy and Pillow.

    python experiments/bench_synthesis.py

The images are rendered ones. On the host, one process makes every image's anomaly (`plain_textured` of
bench_generators.py, without the rotations of the device's side) while the step before runs, and the step is the same
without its generators; it is not sent the clean images and masks, which would cost the host more. "host_seconds_a_step"
is what Python needs to send a step off: with nothing to do on the host between steps it is a fraction of the step. The
compiled step is searched for callbacks and feeds. Medians and middle halves of this one run, in which both and the step
without anomalies take turns, compile time apart. What bench_synthesis.json holds of other devices stays. `--smoke` is
the small variant that the tests run.
"""

import importlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import bench_generators
import loops
from command import origin, start
from jaxad.files import read_json, write_json
from jaxad.base import PyTree
from jaxad.data.demo import render
from jaxad.methods import draem

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
    """Of every turn."""
    turns: int = 6
    results: Path = field(default_factory=lambda: Path(__file__).parent / "results")
    smoke: bool = False
    """Small images, few steps."""


def trained(
    options: Options, update: Any, state: PyTree, batch_of: Callable[[], np.ndarray]
) -> Iterator[tuple[float, float]]:
    """Seconds of every step, and those after which Python had it sent off; `batch_of` makes the images of a step."""
    images = batch_of()
    for i in range(options.steps):
        started = time.perf_counter()
        batch = loops.batch_of(images, range(options.batch))
        state, _ = update(jax.random.key(i), state, {}, batch)
        sent = time.perf_counter() - started
        images = batch_of()
        jax.block_until_ready(state)
        yield time.perf_counter() - started, sent


def main(options: Options) -> None:
    """Measures both ways and writes."""
    if options.smoke:
        options.size, options.batch, options.width, options.steps, options.turns = 32, 2, 2, 1, 2
    side = (options.size, options.size)
    normal, other = (
        np.stack([render("fabric", k + i, size=options.size)[0] for i in range(options.batch)]) for k in (0, 100)
    )
    random, key = np.random.default_rng(0), jax.random.key(0)
    widths: dict[str, Any] = dict(reconstructive_width=options.width, discriminative_width=options.width)
    method = draem(image_size=side, **widths)
    state = jax.jit(lambda key: method.init(key, {}, None))(key)
    batch = loops.batch_of(normal, range(options.batch))
    compiled: Any = jax.jit(method.stages[0].update).lower(key, state, {}, batch).compile()

    def on_host() -> np.ndarray:
        made = [bench_generators.plain_textured(random, *pair)[0] for pair in zip(normal, other, strict=True)]
        return np.stack(made)

    module, mask = importlib.import_module("jaxad.methods.draem"), jnp.zeros(side, bool).at[: side[0] // 2].set(True)
    without = {
        "textured": lambda key, image, source: (image, mask),
        "source": lambda key, size, textures, changes: None,
        "rotate": lambda image, degrees: image,
    }
    with mock.patch.multiple(module, **without):
        step: Any = jax.jit(draem(image_size=side, **widths).stages[0].update).lower(key, state, {}, batch).compile()
    sides: dict[str, tuple[Any, Callable[[], np.ndarray]]] = {
        "within_step": (compiled, lambda: normal),
        "by_host": (step, on_host),
        "without": (step, lambda: normal),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(options.turns):
        for name, (update, batch_of) in sides.items():
            found[name] += trained(options, update, state, batch_of)
    started = time.perf_counter()
    on_host()
    synthesis = time.perf_counter() - started
    row: dict[str, Any] = {"size": options.size, "batch": options.batch, "width": options.width}
    for name, pairs in found.items():
        seconds, sent = np.array(pairs).T
        row[name] = {
            "images_a_second": options.batch / float(np.median(seconds)),
            "seconds_a_step": float(np.median(seconds)),
            "quartiles": np.quantile(seconds, [0.25, 0.75]).tolist(),
            "host_seconds_a_step": float(np.median(sent)) + (synthesis if name == "by_host" else 0),
        }
    row["within_step"]["host_operations"] = len(HOST.findall(compiled.as_text()))
    row |= {"ratio": row["by_host"]["seconds_a_step"] / row["within_step"]["seconds_a_step"], **origin()}
    print(row)
    path = options.results / "bench_synthesis.json"
    devices = read_json(path)["devices"] if path.exists() else {}
    write_json(path, {"experiment": "bench_synthesis", "devices": devices | {row["device"]: row}})


if __name__ == "__main__":
    start(main, Options)
