"""The estimated peak of a fit against the measured one.

    python -m experiments.bench.estimate

Each case runs in a new process, which fits rendered demo images (embedded backbone, CPU). The process renders the
images, reads the weights and compiles all programs; then it returns free memory to the system and takes its resident
memory as the base. The measured peak is the highest resident memory until the fit is done (thresholds included), less
the base, plus the weights, which the base includes and the estimate counts. All threads share one heap
(`MALLOC_ARENA_MAX=1`), since glibc's heaps per thread grow at random.
"""

import ctypes
import gc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

import jaxad
from experiments.command import RESULTS, origin, run_module, start
from jaxad import learning
from jaxad.data import Dataset, Preprocess, demo, open_data
from jaxad.driver.execution import Execution
from jaxad.files import write_json

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
"""Method, hyperparameters, height and width of the images, number of images."""
RENDERED = 64
"""Images that are rendered; further ones are shifted copies."""


@dataclass
class Options:
    """Compare estimated with measured memory."""

    cases: tuple[str, ...] = tuple(CASES)
    results: Path = RESULTS
    one: Annotated[str | None, tyro.conf.arg(help="internal: the case to measure in this process")] = None


def images(n: int, size: int) -> Dataset:
    """A data set of n normal images in memory."""
    rendered = [demo.render("fabric", i, size=size)[0] for i in range(min(n, RENDERED))]
    shifted = np.stack([np.roll(rendered[i % RENDERED], 3 * (i // RENDERED), 1) for i in range(n)])
    [split] = open_data(shifted, preprocess=Preprocess((size, size))).values()
    return split.train


def resident(field: str) -> int:
    """A field of this process's status in bytes: VmRSS, its resident memory, or VmHWM, the peak of that."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(case: str) -> dict[str, Any]:
    """Fits a case and compares the measured peak of this process with the estimate."""
    method, hyperparameters, size, n = CASES[case]
    data = images(n, size)
    detector = jaxad.Detector(method, image_size=size, holdout=16.1 / n, **hyperparameters)
    plan = learning.plan([detector.settings], [data], frozen=detector.load_frozen())
    jaxad.Detector(method, image_size=size, **hyperparameters).fit(data.subset(range(4)))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    base = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    peaks: dict[str, int] = {}

    def progress(phase: str, done: int, total: int) -> None:
        peaks[phase] = resident("VmHWM") - base + plan.loaded

    model = detector.fit(data, execution=Execution(progress=progress)).model
    assert model is not None
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
        "seconds": model.seconds,
    }


def main(options: Options) -> None:
    """Measures every case in a new process and writes results/bench_estimate.json."""
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    environment = {"MALLOC_ARENA_MAX": "1", "JAX_PLATFORMS": "cpu"}
    cases: dict[str, Any] = {}
    for case in options.cases:
        cases[case] = run_module("experiments.bench.estimate", "--one", case, **environment)
        megabytes = {k: round(cases[case][k] / 1e6) for k in ("estimated", "measured")}
        print(case, megabytes, f"{cases[case]['ratio']:.2f}", flush=True)
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
