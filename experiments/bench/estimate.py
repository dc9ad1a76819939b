"""The estimated peak of a fit against the measured one.

    python experiments/bench_estimate.py

Every case is a process of its own that fits rendered demo images (embedded backbone, CPU). It renders the images, reads
the weights and compiles all programs; then it hands free memory back to the system and notes its resident memory, the
base. Measured is the highest resident memory until the fit is done (thresholds included), less the base, plus the
weights, which the estimate counts and the base has. The process has one heap for all threads (`MALLOC_ARENA_MAX=1`),
since glibc's heap a thread grows by chance.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

import jaxad
from command import origin, start
from jaxad.files import write_json
from jaxad.data import Dataset, Preprocess, demo, open_data
from jaxad.detector import plan_together

CASES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "patchcore small": ("patchcore", dict(coreset_sampling_ratio=0.01), 128, 600),
    "patchcore large": ("patchcore", dict(coreset_sampling_ratio=0.01), 128, 1500),
    "patchcore stream": ("patchcore", dict(coreset_size=20_000), 128, 600),
    "padim small": ("padim", dict(n_features=100), 224, 60),
    "padim large": ("padim", dict(n_features=200), 224, 60),
    "spade small": ("spade", dict(num_neighbors=5), 128, 200),
    "spade large": ("spade", dict(num_neighbors=5), 128, 600),
    "mahalanobis_ad small": ("mahalanobis_ad", {}, 256, 200),
    "mahalanobis_ad large": ("mahalanobis_ad", {}, 512, 100),
}
"""Method, hyper-parameters, side of the images and their number."""
RENDERED = 64
"""Different images; where more are wanted they are shifted."""


@dataclass
class Options:
    """Compare estimated with measured memory."""

    cases: tuple[str, ...] = tuple(CASES)
    results: Path = field(default_factory=lambda: Path(__file__).parent / "results")
    one: Annotated[str | None, tyro.conf.arg(help="internal: the case to measure in this process")] = None


def images(n: int, size: int) -> Dataset:
    """Normal images in memory."""
    rendered = [demo.render("fabric", i, size=size)[0] for i in range(min(n, RENDERED))]
    shifted = np.stack([np.roll(rendered[i % RENDERED], 3 * (i // RENDERED), 1) for i in range(n)])
    [split] = open_data(shifted, preprocess=Preprocess((size, size))).values()
    return split.train


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(case: str) -> dict[str, Any]:
    """Fits; the estimated and the measured peak of this process."""
    method, hyperparameters, size, n = CASES[case]
    data = images(n, size)
    detector = jaxad.Detector(method, image_size=size, holdout=16.1 / n, **hyperparameters)
    plan = plan_together([detector], [data])
    jaxad.Detector(method, image_size=size, **hyperparameters).fit(data.subset(range(4)))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    base = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    peaks: dict[str, int] = {}

    def progress(what: str, done: int, total: int) -> None:
        peaks[what] = resident("VmHWM") - base + plan.loaded

    detector.fit(data, progress=progress)
    measured = resident("VmHWM") - base + plan.loaded
    estimated = plan.total(plan.peak)
    return {
        "images": n,
        "image_size": size,
        "hyperparameters": hyperparameters,
        "estimated": estimated,
        "measured": measured,
        "ratio": estimated / measured,
        "stage": plan.peak.name,
        "stages": {need.name: plan.total(need) for need in plan.needs},
        "highest_until": peaks,
        "base": base,
        "model": plan.model,
        "seconds": detector.seconds,
    }


def main(options: Options) -> None:
    """Measures every case in a process of its own and writes results/bench_estimate.json."""
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "JAX_PLATFORMS": "cpu"}
    cases: dict[str, Any] = {}
    for case in options.cases:
        command = [sys.executable, __file__, "--one", case]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        cases[case] = json.loads(done.stdout.splitlines()[-1])
        shown = {k: round(v / 1e6) for k, v in cases[case].items() if k in ("estimated", "measured")}
        print(case, shown, f"{cases[case]['ratio']:.2f}", flush=True)
    record = {
        "recipe": "bench_estimate",
        "backbone": "pdn_small",
        "cases": cases,
        "worst_ratio": max((case["ratio"] for case in cases.values()), key=lambda ratio: abs(np.log(ratio))),
        **origin(),
    }
    write_json(options.results / "bench_estimate.json", record)


if __name__ == "__main__":
    start(main, Options)
