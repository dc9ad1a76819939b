"""Images per second of every method at batch sizes 1 and 32, and the backbone's share; writes bench_latency.json.

    python -m experiments.bench.latency --data BOTTLE_FOLDER --weights resnet18.tv_in1k.safetensors

One program computes scores and heat maps from images. Methods that train see a few images once, since scoring costs the
same whatever was learned; memory banks see all images. The backbone's share is the time of `embed` over the time of the
whole program. Operations are the arithmetic of the whole program, loops multiplied out; a loop whose number of rounds
depends on data counts once. The peak is that of a product of large matrices. Programs of accelerators hide their
arithmetic in library calls, so that their rows take the operations of the CPU's row for the same data.
`--smoke` is the small variant for the tests.
"""

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxad
from experiments.bench.program_cost import Module
from experiments.command import RESULTS, machine, origin, start
from jaxad.backbones import backbone, of_file
from jaxad.data import open_data
from jaxad.driver.program import Program
from jaxad.files import read_json, write_json
from jaxad.learning import load_frozen
from jaxad.methods import METHODS
from jaxad.settings import Settings

TRAINING_IMAGES = 8
"""Training images of a method that trains."""
NETWORKS: dict[str, tuple[str, ...]] = {
    "efficientad": ("efficientad_small", "efficientad_medium"),
    "uninformed_students": ("patch33",),
}
"""Backbones of methods that take no ResNet, with random weights."""
SETTINGS: dict[str, dict[str, Any]] = {
    "cflow": {"layers": ("layer2", "layer3")},
    "csflow": {"layer": "layer3"},
    "differnet": {"layer": "layer3"},
    "efficientad": {"penalty": False},
    "mahalanobis_ad": {"layers": ("layer3",)},
    "nf": {"layers": ("layer3",)},
    "spade": {"image_layer": "layer3"},
    "uninformed_students": {"stride": 4},
}
"""Hyperparameters that differ from the defaults, since the weights may end at layer3."""


@dataclass
class Options:
    """Measure latency."""

    data: str = "demo"
    weights: Path | None = None
    """A ResNet's; none: random ones of a ResNet-18."""
    methods: tuple[str, ...] = ()
    """None: all. Rows of other methods and devices in bench_latency.json are kept if they have the same sizes."""
    size: int = 256
    batches: list[int] = field(default_factory=lambda: [1, 32])
    repeats: int = 5
    results: Path = RESULTS
    smoke: bool = False
    """Small images."""


def call_seconds(call: Callable[[], Any], repeats: int) -> list[float]:
    """The seconds of several calls, after a first one that does not count."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - started)
    return seconds


def peak(repeats: int, n: int) -> float:
    """Operations per second of the fastest product of n x n matrices (float32; a GPU uses its tensor cores)."""
    a = jnp.ones((n, n))
    multiply = Program(lambda a: a @ a)
    return 2 * n**3 / min(call_seconds(lambda: multiply(a), repeats))


def operations(compiled: Any, cpu_row: dict[str, Any] | None, size: int) -> float | None:
    """Floating point operations of a compiled program; on an accelerator, those of the CPU's row at this batch size."""
    if jax.default_backend() == "cpu":
        return Module(compiled.as_text(), (1.0,) * 4).cost().flops
    return None if cpu_row is None else cpu_row["batches"][str(size)]["operations"]


def measure(name: str, network: str, options: Options, cpu_row: dict[str, Any] | None) -> dict[str, Any]:
    """Measures a method on a backbone at every batch size; `cpu_row` is the row of a CPU, if there is one."""
    random_weights = options.weights is None or network in NETWORKS.get(name, ())
    known = inspect.signature(METHODS[name]).parameters
    once = {k: v for k, v in {"epochs": 1, "train_batch_size": TRAINING_IMAGES // 2}.items() if k in known}
    settings = Settings.of(
        name,
        backbone=network,
        weights=None if random_weights else options.weights,
        image_size=options.size,
        holdout=0,
        **once,
        **SETTINGS.get(name, {}),
    )
    frozen = backbone(network).init(jax.random.key(0)) if random_weights else load_frozen(settings)
    detector = jaxad.Detector.from_settings(settings, frozen=frozen)
    data = next(iter(open_data(options.data, preprocess=settings.preprocess).values())).train
    assert data is not None
    trains = any(stage.shuffle for stage in detector.method.stages)
    detector.fit(data.subset(range(TRAINING_IMAGES)) if trains or options.smoke else data)
    method, state = detector.method, detector.state
    embed = Program(method.embed)
    whole = Program(lambda state, frozen, image: method.score(state, frozen, method.embed(frozen, image)))
    row: dict[str, Any] = {"batches": {}}
    for size in options.batches:
        image = jnp.asarray(data.images([i % len(data) for i in range(size)]))
        seconds = float(np.median(call_seconds(lambda image=image: whole(state, frozen, image), options.repeats)))
        embedding = float(np.median(call_seconds(lambda image=image: embed(frozen, image), options.repeats)))
        row["batches"][str(size)] = {
            "images_a_second": size / seconds,
            "backbone_share": min(1.0, embedding / seconds),
            "operations": operations(whole.compile(state, frozen, image), cpu_row, size),
        }
    return row


def main(options: Options) -> None:
    """Measures every method and writes results/bench_latency.json."""
    if options.smoke:
        options.size, options.batches, options.repeats = 64, [1, 2], 1
    record: dict[str, Any] = {
        "experiment": "bench_latency",
        "image_size": options.size,
        "batches": options.batches,
    }
    path, device = options.results / "bench_latency.json", machine()["device"]
    old = read_json(path) if path.exists() else {}
    rows = old["rows"] if record.items() <= old.items() else []
    cpu = jax.default_backend() == "cpu"
    fastest = peak(options.repeats, 256 if options.smoke else 4096 if cpu else 8192)
    resnet = "resnet18" if options.weights is None else of_file(options.weights)
    for name in options.methods or METHODS:
        for network in NETWORKS.get(name, (resnet,)):
            identity = {"method": name, "backbone": network, "device": device}
            on_cpu = identity | {"device": "cpu"}
            cpu_row = next((row for row in rows if on_cpu.items() <= row.items()), None)
            row = identity | measure(name, network, options, cpu_row) | {"peak_flops_a_second": fastest} | origin()
            rows = [other for other in rows if not identity.items() <= other.items()] + [row]
            rows.sort(key=lambda row: (row["device"], row["method"], row["backbone"]))
            write_json(path, record | {"rows": rows})
            print(name, network, row["batches"], flush=True)
            jax.clear_caches()


if __name__ == "__main__":
    start(main, Options)
