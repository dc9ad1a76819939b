"""Peak memory by the number of images: that of PaDiM and of scoring stays flat, PatchCore's grows with its patches.

    python -m experiments.bench.memory

Each point is measured in a new process, which fits or scores rendered demo images (embedded backbone, 128 px); its peak
is what the operating system reports. All threads share one heap (`MALLOC_ARENA_MAX=1`), since glibc's heaps per thread
grow at random. PatchCore holds all patches while it collects them: its growth is given as a multiple of their size.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

import jaxad
from experiments.command import RESULTS, origin, run_module, start
from jaxad.data import Dataset, Preprocess, demo
from jaxad.driver.memory import peak_bytes
from jaxad.files import write_json


@dataclass
class Options:
    """Measure peak memory."""

    images: tuple[int, ...] = (256, 1024, 4096)
    bank_images: tuple[int, ...] = (128, 256, 512)
    """Numbers of images for PatchCore's fit, whose memory grows with them."""
    size: int = 128
    results: Path = RESULTS
    one: Annotated[tuple[str, int] | None, tyro.conf.arg(help="internal: a case and a number of images")] = None


CASES = ("padim fit", "padim score", "patchcore score", "patchcore fit")


def measure(case: str, n: int, size: int) -> dict[str, Any]:
    """Fits on n images, or fits on 16 and scores n; returns the peak memory of this process in bytes."""
    name, _, part = case.partition(" ")
    rendered = (record for record in demo.records(train=n, good=0, per_defect=0) if record.category == "fabric")
    images = Dataset("demo", "fabric", "train", tuple(rendered), Preprocess((size, size)), 0, False)
    options: dict[str, Any] = {"n_features": 100} if name == "padim" else {}
    detector = jaxad.Detector(name, image_size=size, holdout=0, **options)
    detector.fit(images if part == "fit" else images.subset(range(16)))
    before = peak_bytes()
    if part == "score":
        for _ in detector.score(images):
            pass
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(detector.state))
    return {"images": n, "peak_bytes": peak_bytes(), "before_scoring": before, "model_bytes": state}


def main(options: Options) -> None:
    """Measures every case in new processes and writes results/bench_memory.json."""
    if options.one:
        print(json.dumps(measure(*options.one, options.size)))
        return
    points: dict[str, list[dict[str, Any]]] = {}
    for case in CASES:
        for n in options.bank_images if case == "patchcore fit" else options.images:
            arguments = ("--one", case, str(n), "--size", str(options.size))
            point = run_module("experiments.bench.memory", *arguments, MALLOC_ARENA_MAX="1")
            points.setdefault(case, []).append(point)
            print(case, point, flush=True)
    grid = -(-options.size // 8)
    patches = grid * grid * 384 * 4
    growth = {
        case: (rows[-1]["peak_bytes"] - rows[0]["peak_bytes"]) / (rows[-1]["images"] - rows[0]["images"])
        for case, rows in points.items()
    }
    record = {
        "recipe": "bench_memory",
        "backbone": "pdn_small",
        "image_size": options.size,
        "points": points,
        "bytes_per_further_image": growth,
        "patchcore_patch_bytes_per_image": patches,
        "patchcore_fit_over_patches": growth["patchcore fit"] / patches,
        **origin(),
    }
    write_json(options.results / "bench_memory.json", record)


if __name__ == "__main__":
    start(main, Options)
