"""What the device does while `jaxad.fit.fit` trains DRAEM: the share of the time it works, and its longest pause.

    python experiments/profile_draem.py

The demo data's fabric is learned twice, first to compile and to decode the images, then under JAX's profiler. A GPU is
at work while a kernel runs, not while something is copied; a CPU while a compiled program does. If the host had work to
do between chunks of steps, the device would pause for it. What profile_draem.json holds of other devices stays.
`--smoke` is the small variant that the tests run.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from command import origin, start
from jaxad.files import read_json, write_json
from jaxad.data import Preprocess, open_data
from jaxad.driver.embedding import EmbeddingCache
from jaxad.driver.fit import fit
from jaxad.methods import draem


@dataclass
class Options:
    """Profile the training of DRAEM."""

    size: int = 256
    batch: int = 8
    width: int = 16
    """Channels of the first block of both networks."""
    epochs: int = 4
    results: Path = field(default_factory=lambda: Path(__file__).parent / "results")
    smoke: bool = False
    """Small images, few epochs."""


def traced(options: Options, folder: Path) -> Any:
    """Trains twice, the second time under the profiler; its profile."""
    side, cache = (options.size, options.size), EmbeddingCache()
    frozen: dict[str, Any] = {}
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
    how = jax.profiler.ProfileOptions()
    how.python_tracer_level = 0
    fit(method, frozen, data, jax.random.key(0), cache=cache)
    with jax.profiler.trace(folder, profiler_options=how):
        fit(method, frozen, data, jax.random.key(0), cache=cache)
    (found,) = folder.rglob("*.xplane.pb")
    return jax.profiler.ProfileData.from_file(str(found))


def spans(profile: Any, cpu: bool) -> Iterator[tuple[float, float]]:
    """Beginning and end, in seconds, of all that ran on the device."""
    for plane in profile.planes:
        if not plane.name.startswith("/host:CPU" if cpu else "/device:"):
            continue
        for line in plane.lines:
            if line.name.startswith("tf_XLA" if cpu else "Stream"):
                ran = (event for event in line.events if not event.name.startswith("Memcpy"))
                yield from ((1e-9 * event.start_ns, 1e-9 * event.end_ns) for event in ran)


def pauses(at_work: np.ndarray) -> np.ndarray:
    """Seconds between the end of all that had begun and the beginning of the next."""
    at_work = at_work[at_work[:, 0].argsort()]
    return np.maximum(0, at_work[1:, 0] - np.maximum.accumulate(at_work[:-1, 1]))


def main(options: Options) -> None:
    """Trains, reads the profile and writes."""
    if options.smoke:
        options.size, options.batch, options.width, options.epochs = 32, 4, 2, 2
    with tempfile.TemporaryDirectory() as folder:
        at_work = np.array([*spans(traced(options, Path(folder)), jax.default_backend() == "cpu")])
    seconds, waited = float(np.ptp(at_work)), pauses(at_work)
    row = {
        "size": options.size,
        "batch": options.batch,
        "width": options.width,
        "epochs": options.epochs,
        "seconds": seconds,
        "share_at_work": 1 - float(waited.sum()) / seconds,
        "longest_pause_seconds": float(waited.max()),
        **origin(),
    }
    print(row)
    path = options.results / "profile_draem.json"
    devices = read_json(path)["devices"] if path.exists() else {}
    write_json(path, {"experiment": "profile_draem", "devices": devices | {row["device"]: row}})


if __name__ == "__main__":
    start(main, Options)
