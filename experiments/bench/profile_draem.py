"""Profile of DRAEM's training by `jaxad.fit`: the share of time in which the device works, and its longest pause.

    python -m experiments.bench.profile_draem

DRAEM learns the demo data's fabric twice, first to compile and to decode the images, then under JAX's profiler. A GPU
works while a kernel runs, not during a copy; a CPU works while a compiled program runs. If the host had work to do
between chunks of steps, the device would pause for it. Entries of other devices in profile_draem.json are kept.
`--smoke` is the small variant for the tests.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.command import RESULTS, origin, start
from jaxad.data import Preprocess, open_data
from jaxad.driver.embedding import EmbeddingCache
from jaxad.driver.execution import Execution
from jaxad.driver.fit import fit
from jaxad.files import read_json, write_json
from jaxad.methods.draem import draem


@dataclass
class Options:
    """Profile the training of DRAEM."""

    size: int = 256
    batch: int = 8
    width: int = 16
    """Channels of the first block of both networks."""
    epochs: int = 4
    results: Path = RESULTS
    smoke: bool = False
    """Small images, few epochs."""


def traced(options: Options, folder: Path) -> Any:
    """Trains twice, the second time under the profiler, and returns the profile."""
    size, execution, key = (options.size, options.size), Execution(cache=EmbeddingCache()), jax.random.key(0)
    method = draem(
        image_size=size,
        reconstructive_width=options.width,
        discriminative_width=options.width,
        epochs=options.epochs,
        train_batch_size=options.batch,
    )
    data = open_data("demo", preprocess=Preprocess(size))["fabric"].train
    assert data is not None
    data = data.subset(range(16)) if options.smoke else data
    profiling = jax.profiler.ProfileOptions()
    profiling.python_tracer_level = 0
    fit(method, {}, data, key, execution)
    with jax.profiler.trace(folder, profiler_options=profiling):
        fit(method, {}, data, key, execution)
    (file,) = folder.rglob("*.xplane.pb")
    return jax.profiler.ProfileData.from_file(str(file))


def spans(profile: Any, cpu: bool) -> Iterator[tuple[float, float]]:
    """Start and end, in seconds, of everything that ran on the device."""
    for plane in profile.planes:
        if not plane.name.startswith("/host:CPU" if cpu else "/device:"):
            continue
        for line in plane.lines:
            if line.name.startswith("tf_XLA" if cpu else "Stream"):
                events = (event for event in line.events if not event.name.startswith("Memcpy"))
                yield from ((1e-9 * event.start_ns, 1e-9 * event.end_ns) for event in events)


def pauses(busy: np.ndarray) -> np.ndarray:
    """Seconds before each event in which no earlier one runs; `busy` holds starts and ends in seconds, n 2."""
    busy = busy[busy[:, 0].argsort()]
    return np.maximum(0, busy[1:, 0] - np.maximum.accumulate(busy[:-1, 1]))


def main(options: Options) -> None:
    """Trains, reads the profile and writes."""
    if options.smoke:
        options.size, options.batch, options.width, options.epochs = 32, 4, 2, 2
    with tempfile.TemporaryDirectory() as folder:
        busy = np.array([*spans(traced(options, Path(folder)), jax.default_backend() == "cpu")])
    seconds, idle = float(np.ptp(busy)), pauses(busy)
    row = {
        "size": options.size,
        "batch": options.batch,
        "width": options.width,
        "epochs": options.epochs,
        "seconds": seconds,
        "share_at_work": 1 - float(idle.sum()) / seconds,
        "longest_pause_seconds": float(idle.max()),
        **origin(),
    }
    print(row)
    path = options.results / "profile_draem.json"
    devices = read_json(path)["devices"] if path.exists() else {}
    write_json(path, {"experiment": "profile_draem", "devices": devices | {row["device"]: row}})


if __name__ == "__main__":
    start(main, Options)
