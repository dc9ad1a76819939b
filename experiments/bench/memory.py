"""Peak memory against the number of images: PaDiM and the scorers stay flat, PatchCore is bounded by its patches.

    python experiments/bench_memory.py

Every point is a process of its own that fits or scores rendered demo images (embedded backbone, 128 px), so its peak is
the operating system's own figure; it has one heap for all threads (`MALLOC_ARENA_MAX=1`), since glibc's heap a thread
grows by chance. PatchCore holds all patches while it collects: its growth is given as a multiple of their size.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

import jaxad
from command import origin, start
from jaxad.files import write_json
from jaxad.data import Dataset, Preprocess, demo
from jaxad.detector import peak_bytes


@dataclass
class Options:
    """Measure peak memory."""

    images: tuple[int, ...] = (256, 1024, 4096)
    bank_images: tuple[int, ...] = (128, 256, 512)
    """Of the fit whose memory grows with them."""
    size: int = 128
    results: Path = field(default_factory=lambda: Path(__file__).parent / "results")
    one: Annotated[tuple[str, int] | None, tyro.conf.arg(help="internal: a case and a number of images")] = None


CASES = ("padim fit", "padim score", "patchcore score", "patchcore fit")


def measure(what: str, n: int, size: int) -> dict[str, Any]:
    """Fits on n images, or fits on 16 and scores n; the peak of this process."""
    name, _, part = what.partition(" ")
    rendered = (record for record in demo.records(train=n, good=0, per_defect=0) if record.category == "fabric")
    many = Dataset("demo", "fabric", "train", tuple(rendered), Preprocess((size, size)), 0, False)
    options: dict[str, Any] = {"n_features": 100} if name == "padim" else {}
    detector = jaxad.Detector(name, image_size=size, holdout=0, **options)
    detector.fit(many if part == "fit" else many.subset(range(16)))
    before = peak_bytes()
    if part == "score":
        for _ in detector.score(many):
            pass
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(detector.state))
    return {"images": n, "peak_bytes": peak_bytes(), "before_scoring": before, "model_bytes": state}


def main(options: Options) -> None:
    """Measures every case in a process of its own and writes results/bench_memory.json."""
    if options.one:
        print(json.dumps(measure(*options.one, options.size)))
        return
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    points: dict[str, list[dict[str, Any]]] = {}
    for what in CASES:
        for n in options.bank_images if what == "patchcore fit" else options.images:
            command = [sys.executable, __file__, "--one", what, str(n), "--size", str(options.size)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            points.setdefault(what, []).append(json.loads(done.stdout.splitlines()[-1]))
            print(what, points[what][-1], flush=True)
    grid = -(-options.size // 8)
    patches = grid * grid * 384 * 4
    growth = {
        what: (rows[-1]["peak_bytes"] - rows[0]["peak_bytes"]) / (rows[-1]["images"] - rows[0]["images"])
        for what, rows in points.items()
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
