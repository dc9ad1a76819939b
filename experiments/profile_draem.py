"""What the device does while the driver trains DRAEM: the share of the time it works, and what it waits for.

    python experiments/profile_draem.py

`jaxad.fit.fit` learns from the demo data's fabric, first to compile, then under JAX's profiler. Of the second half of
that time, by when all images have been decoded, it reports in which share the device was at work, on a kernel of a GPU
or an operation of a CPU, and its longest pause: with work for the host between steps it would wait for it. `--smoke` is
the small variant that the tests run.
"""

import gzip
import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxad
from jaxad.artifact import write_json
from jaxad.data import Preprocess, open_data
from jaxad.fit import fit
from jaxad.methods import draem


@dataclass
class Options:
    """Profile the training of DRAEM."""

    size: int = 256
    batch: int = 8
    width: int = 16
    """Channels of the first block of both networks."""
    epochs: int = 8
    results: Path = field(default_factory=lambda: Path(__file__).parent / "results")
    smoke: bool = False
    """Small images, few epochs."""


def traced(options: Options, folder: Path) -> Path:
    """Trains twice, the second time under the profiler; its file."""
    side = (options.size, options.size)
    method = draem(
        image_size=side,
        reconstructive_width=options.width,
        discriminative_width=options.width,
        epochs=options.epochs,
        train_batch_size=options.batch,
    )
    data = open_data("demo", preprocess=Preprocess(side))["fabric"].train
    assert data is not None
    data = data.subset(range(16)) if options.smoke else data
    fit(method, {}, data, jax.random.key(0))
    how = jax.profiler.ProfileOptions()
    how.python_tracer_level = 0
    with jax.profiler.trace(folder, profiler_options=how):
        fit(method, {}, data, jax.random.key(0))
    (found,) = folder.rglob("*.trace.json.gz")
    return found


def spans(trace: Path) -> np.ndarray:
    """Beginning and end, in seconds, of all that ran on the device."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    named = {(e["name"], e["pid"], e.get("tid")): e["args"].get("name", "") for e in events if e.get("ph") == "M"}

    def on_device(event: dict[str, Any]) -> bool:
        process = named.get(("process_name", event["pid"], None), "")
        thread = named.get(("thread_name", event["pid"], event["tid"]), "")
        return thread.startswith("Stream" if process.startswith("/device:") else "tf_XLA")

    found = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("ph") == "X" and e["dur"] and on_device(e)]
    return 1e-6 * np.array(sorted(found))


def pauses(at_work: np.ndarray, since: float) -> np.ndarray:
    """Seconds between the ends of what ran and the beginning of the next, later than `since`."""
    ends = np.maximum.accumulate(at_work[:, 1])
    return np.maximum(0, at_work[1:, 0] - ends[:-1])[at_work[1:, 0] > since]


def main(options: Options) -> None:
    """Trains, reads the profile and writes."""
    if options.smoke:
        options.size, options.batch, options.width, options.epochs = 32, 4, 2, 2
    with tempfile.TemporaryDirectory() as folder:
        at_work = spans(traced(options, Path(folder)))
    middle, end = (at_work[0, 0] + at_work[:, 1].max()) / 2, at_work[:, 1].max()
    waited = pauses(at_work, middle)
    record = {
        "experiment": "profile_draem",
        "size": options.size,
        "batch": options.batch,
        "width": options.width,
        "seconds": float(end - middle),
        "share_at_work": float(1 - waited.sum() / (end - middle)),
        "longest_pause_seconds": float(waited.max()),
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "versions": {"jaxad": jaxad.__version__, "jax": jax.__version__, "numpy": np.__version__},
        "command": " ".join(["python", *sys.argv]),
    }
    print(record)
    write_json(options.results / "profile_draem.json", record)


if __name__ == "__main__":
    from command import start

    start(main, Options)
