"""Images a second of every method at batch 1 and 32, and how much of that the backbone takes; bench_latency.json.

    python experiments/bench_latency.py --data BOTTLE_FOLDER --weights resnet18.tv_in1k.safetensors

One program goes from images to scores and heat maps. Methods that train see a few images once, since scores cost the
same whatever was learned; those that remember images remember all of them. The share of the backbone is the time of
`embed` alone over that of the whole, and the share of the peak the arithmetic of the whole a second (loops multiplied
out; those whose rounds data decide count one) over that of a product of large matrices. `--smoke` is the small variant
that the tests run.
"""

import inspect
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent))

from bench_scaling import Module

import jaxad
from jaxad.artifact import read_json, write_json
from jaxad.backbones import backbone, of_file
from jaxad.data import open_data
from jaxad.methods import METHODS
from jaxad.program import Program

FEW = 8
"""Images that a method sees that trains."""
OWN = {"efficientad": "pdn_small", "uninformed_students": "patch33"}
"""Backbones of methods that take no ResNet; random weights of the second."""
SETTINGS: dict[str, dict[str, Any]] = {"efficientad": {"penalty": False}, "uninformed_students": {"stride": 4}}
PYRAMID = ("layer1", "layer2", "layer3")
"""The stages of the weights at hand."""


@dataclass
class Options:
    """Measure latency."""

    data: str = "demo"
    weights: Path | None = None
    """A ResNet's; none: random ones of a ResNet-18."""
    methods: tuple[str, ...] = ()
    """None: all. Rows of others that bench_latency.json holds of the same device and size stay."""
    size: int = 256
    batches: tuple[int, ...] = (1, 32)
    repeats: int = 5
    results: Path = field(default_factory=lambda: Path(__file__).parent / "results")
    smoke: bool = False
    """Small images."""


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """The median of several calls, after one that does not count."""
    jax.block_until_ready(call())
    took = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(call())
        took.append(time.perf_counter() - started)
    return float(np.median(took))


def peak(repeats: int, n: int = 4096) -> float:
    """Operations a second of a product of float32 matrices."""
    a = jnp.ones((n, n))
    multiply = Program(lambda a: a @ a)
    return 2 * n**3 / seconds(lambda: multiply(a), repeats)


def layers_of(name: str) -> dict[str, Any]:
    """What the weights at hand have no deeper stages for."""
    known = inspect.signature(METHODS[name]).parameters
    if name == "differnet" or name == "csflow":
        return {"layer": PYRAMID[-1]}
    return {"layers": PYRAMID[-1:]} if name in ("mahalanobis_ad", "nf") and "layers" in known else {}


def measure(name: str, options: Options, most: float) -> dict[str, Any]:
    """One method at every batch size."""
    own = OWN.get(name)
    chosen = own or ("resnet18" if options.weights is None else of_file(options.weights))
    known = inspect.signature(METHODS[name]).parameters
    once = {k: v for k, v in {"epochs": 1, "train_batch_size": FEW // 2}.items() if k in known}
    detector = jaxad.Detector(
        name,
        backbone=chosen,
        weights=None if own else options.weights,
        image_size=options.size,
        holdout=0,
        **once,
        **(layers_of(name) if own is None else {}),
        **SETTINGS.get(name, {}),
    )
    if chosen != "pdn_small" and (own or options.weights is None):
        detector.frozen = backbone(chosen).init(jax.random.key(0))
    data = next(iter(open_data(options.data, preprocess=detector.preprocess).values())).train
    assert data is not None
    trains = any(stage.shuffle for stage in detector.method.stages)
    detector.fit(data.subset(range(FEW)) if trains or options.smoke else data)
    method, frozen, state = detector.method, detector.load_frozen(), detector.state
    embed = Program(method.embed)
    whole = Program(lambda state, frozen, image: method.score(state, frozen, method.embed(frozen, image)))
    row: dict[str, Any] = {"backbone": chosen, "batches": {}}
    for size in options.batches:
        image = jnp.asarray(data.images([i % len(data) for i in range(size)]))
        took = seconds(lambda image=image: whole(state, frozen, image), options.repeats)
        alone = seconds(lambda image=image: embed(frozen, image), options.repeats)
        operations = Module(whole.compile(state, frozen, image).as_text(), (1.0,) * 4).cost().flops
        row["batches"][str(size)] = {
            "images_a_second": size / took,
            "backbone_share": min(1.0, alone / took),
            "peak_share": operations / took / most,
        }
    return row


def main(options: Options) -> None:
    """Measures every method and writes the table's rows."""
    if options.smoke:
        options.size, options.batches, options.repeats = 64, (1, 2), 1
    record: dict[str, Any] = {
        "experiment": "bench_latency",
        "device": jax.devices()[0].device_kind,
        "image_size": options.size,
        "versions": {"jaxad": jaxad.__version__, "jax": jax.__version__, "numpy": np.__version__},
    }
    path = options.results / "bench_latency.json"
    old = read_json(path) if path.exists() else {}
    rows = old["methods"] if record.items() <= old.items() else {}
    most = peak(options.repeats, 256 if options.smoke else 4096)
    for name in options.methods or METHODS:
        rows[name] = measure(name, options, most) | {"command": " ".join(["python", *sys.argv])}
        print(name, rows[name]["batches"], flush=True)
        rows[name]["peak_flops_a_second"] = most
        write_json(path, record | {"methods": dict(sorted(rows.items()))})
        jax.clear_caches()


if __name__ == "__main__":
    main(tyro.cli(Options))
