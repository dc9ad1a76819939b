"""Images a second of every method at batch 1 and 32, and how much of that the backbone takes; bench_latency.json.

    python experiments/bench_latency.py --data BOTTLE_FOLDER --weights resnet18.tv_in1k.safetensors

One program goes from images to scores and heat maps. Methods that train see a few images once, since scores cost the
same whatever was learned; those that remember images remember all of them. The share of the backbone is the time of
`embed` alone over that of the whole; the operations are the arithmetic of the whole (loops multiplied out; those whose
rounds data decide count one), and the peak is that of a product of large matrices. Programs of accelerators hide their
arithmetic in library calls: what a CPU's row of the same file counted, of the same data, stands for it.
`--smoke` is the small variant that the tests run.
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
from bench_scaling import Module
from command import origin, start
from jaxad.files import read_json, write_json
from jaxad.backbones import backbone, of_file
from jaxad.data import open_data
from jaxad.methods import METHODS
from jaxad.driver.program import Program

FEW = 8
"""Images that a method sees that trains."""
OWN: dict[str, tuple[str, ...]] = {
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
"""What differs from the defaults: weights may end at layer3."""


@dataclass
class Options:
    """Measure latency."""

    data: str = "demo"
    weights: Path | None = None
    """A ResNet's; none: random ones of a ResNet-18."""
    methods: tuple[str, ...] = ()
    """None: all. Rows of others, and of other devices, that bench_latency.json holds of the same sizes stay."""
    size: int = 256
    batches: list[int] = field(default_factory=lambda: [1, 32])
    repeats: int = 5
    results: Path = field(default_factory=lambda: Path(__file__).parent / "results")
    smoke: bool = False
    """Small images."""


def seconds(call: Callable[[], Any], repeats: int) -> list[float]:
    """Of several calls, after one that does not count."""
    jax.block_until_ready(call())
    took = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(call())
        took.append(time.perf_counter() - started)
    return took


def peak(repeats: int, n: int) -> float:
    """Operations a second of the fastest product of float32 matrices (on a GPU by its tensor cores, JAX's default)."""
    a = jnp.ones((n, n))
    multiply = Program(lambda a: a @ a)
    return 2 * n**3 / min(seconds(lambda: multiply(a), repeats))


def operations(compiled: Any, counted: dict[str, Any] | None, size: int) -> float | None:
    """Of a compiled program; on an accelerator, what a CPU's row counted for batches of this size, if there is one."""
    if jax.default_backend() == "cpu":
        return Module(compiled.as_text(), (1.0,) * 4).cost().flops
    return None if counted is None else counted["batches"][str(size)]["operations"]


def measure(name: str, chosen: str, options: Options, counted: dict[str, Any] | None) -> dict[str, Any]:
    """One method on a backbone, at every batch size; beside a CPU's row of it."""
    own = chosen in OWN.get(name, ())
    known = inspect.signature(METHODS[name]).parameters
    once = {k: v for k, v in {"epochs": 1, "train_batch_size": FEW // 2}.items() if k in known}
    detector = jaxad.Detector(
        name,
        backbone=chosen,
        weights=None if own else options.weights,
        image_size=options.size,
        holdout=0,
        **once,
        **SETTINGS.get(name, {}),
    )
    if own or options.weights is None:
        detector.frozen = backbone(chosen).init(jax.random.key(0))
    data = next(iter(open_data(options.data, preprocess=detector.preprocess).values())).train
    assert data is not None
    trains = any(stage.shuffle for stage in detector.method.stages)
    detector.fit(data.subset(range(FEW)) if trains or options.smoke else data)
    method, frozen, state = detector.method, detector.load_frozen(), detector.state
    embed = Program(method.embed)
    whole = Program(lambda state, frozen, image: method.score(state, frozen, method.embed(frozen, image)))
    row: dict[str, Any] = {"batches": {}}
    for size in options.batches:
        image = jnp.asarray(data.images([i % len(data) for i in range(size)]))
        took = float(np.median(seconds(lambda image=image: whole(state, frozen, image), options.repeats)))
        alone = float(np.median(seconds(lambda image=image: embed(frozen, image), options.repeats)))
        row["batches"][str(size)] = {
            "images_a_second": size / took,
            "backbone_share": min(1.0, alone / took),
            "operations": operations(whole.compile(state, frozen, image), counted, size),
        }
    return row


def main(options: Options) -> None:
    """Measures every method and writes the table's rows."""
    if options.smoke:
        options.size, options.batches, options.repeats = 64, [1, 2], 1
    record: dict[str, Any] = {
        "experiment": "bench_latency",
        "image_size": options.size,
        "batches": options.batches,
    }
    path, of_run = options.results / "bench_latency.json", origin()
    old = read_json(path) if path.exists() else {}
    rows = old["rows"] if record.items() <= old.items() else []
    cpu = jax.default_backend() == "cpu"
    most = peak(options.repeats, 256 if options.smoke else 4096 if cpu else 8192)
    resnet = "resnet18" if options.weights is None else of_file(options.weights)
    for name in options.methods or METHODS:
        for chosen in OWN.get(name, (resnet,)):
            of = {"method": name, "backbone": chosen, "device": of_run["device"]}
            of_cpu = of | {"device": "cpu"}
            counted = next((row for row in rows if of_cpu.items() <= row.items()), None)
            row = of | measure(name, chosen, options, counted) | {"peak_flops_a_second": most} | of_run
            rows = [other for other in rows if not of.items() <= other.items()] + [row]
            rows.sort(key=lambda row: (row["device"], row["method"], row["backbone"]))
            write_json(path, record | {"rows": rows})
            print(name, chosen, row["batches"], flush=True)
            jax.clear_caches()


if __name__ == "__main__":
    start(main, Options)
