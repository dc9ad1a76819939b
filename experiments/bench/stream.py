"""A fit of 100,000 images in flat memory: PaDiM, and PatchCore with a coreset that is merged on the way.

    python -m experiments.bench.stream

Every image is rendered from its index when it is read (demo fabric, embedded backbone); no two are the same, and none
is kept. Each method runs in a new process, whose threads share one heap (`MALLOC_ARENA_MAX=1`); its resident memory is
read after every few thousand images. A sample that is spread over the stream then shows what decoding, embedding and
updating cost per image, and how well PatchCore's centers cover the patches: the true covering radius, the bound that
the bank carries, the radius of one greedy selection among all patches of the sample, and the bound that is proven in
advance.

The table for more devices and images follows from these rates and from bench_scaling.json by the formulas in
`extrapolate`; `--table-only` computes it again from earlier measurements. `--smoke` is the small variant for the tests.
"""

import dataclasses
import functools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import AbstractMesh, AxisType

from experiments.command import RESULTS, origin, run_module, start
from jaxad import backbones
from jaxad.base import Method
from jaxad.data import Dataset, Preprocess, demo
from jaxad.data.records import Record
from jaxad.driver.embedding import EmbeddingCache, embed_program
from jaxad.driver.execution import Execution
from jaxad.driver.fit import fit
from jaxad.driver.memory import peak_bytes
from jaxad.driver.mesh import DATA, Layout
from jaxad.driver.programs import abstract_state, embedded_spec
from jaxad.files import read_json, write_json
from jaxad.methods import METHODS
from jaxad.ops.coreset import greedy_coreset
from jaxad.ops.knn import knn

BACKBONE = "pdn_small"
DEVICES, IMAGES = (1, 8, 64), (100_000, 1_000_000, 10_000_000)
DEVICES_PER_HOST = 8
ASSUMPTIONS = (
    "Every device is like the measured one, whose rates are under `seconds_per_image`. A host feeds "
    f"{DEVICES_PER_HOST} devices and decodes as fast as the measured host while its devices compute.",
    "Hosts share decoding. Devices share embedding along either axis, without communication.",
    'Axis "class": every device has one class, each of so many images. Devices share nothing and do not communicate.',
    'Axis "data": the devices share one class. PaDiM shards positions, and their moments with them. PatchCore gathers '
    "the patches of each batch on all devices, since the stream is one sequence; the rows of the bank and the work of "
    "a reduction are sharded, but not the choice among candidates.",
    "Work of an update on D devices over that on one: s + (1 - s) / D, where s follows from the flops of the largest "
    "mesh in bench_scaling.json. It does not include the time of communication.",
    "No device shares the work of finishing (the last thinning, or the factors) with another.",
    "Memory of a device: that of the process after a tenth of the images, without the list of records, plus the "
    'measured growth for all images; on "data" without the part of the state that lies on other devices.',
    "The list of records, which names the images, lies in the memory of every host and grows with the images.",
)


@dataclass
class Options:
    """Stream many images."""

    images: int = 100_000
    size: int = 64
    centers: int = 2048
    batch_size: int = 64
    every: int = 2_500
    """Images between two readings of the memory."""
    sample: int = 4_000
    """Images of the stream for measuring rates and covering radii."""
    results: Path = RESULTS
    notes: str = ""
    """Remarks about this run, kept in its result."""
    table_only: bool = False
    """Measure nothing, and compute the table again."""
    smoke: bool = False
    """Few small images, in this process."""
    one: Annotated[str | None, tyro.conf.arg(help="internal: the method to measure in this process")] = None


def small(options: Options) -> Options:
    """The options of the smoke variant."""
    return dataclasses.replace(options, images=96, size=32, centers=16, batch_size=16, every=16, sample=32)


def stream(options: Options) -> Dataset:
    """A data set of different images that are rendered when they are read."""

    def record(i: int) -> Record:
        return Record(f"{i}", functools.partial(picture, i, options.size), "fabric", "train")

    preprocess = Preprocess((options.size, options.size))
    return Dataset("demo", "fabric", "train", tuple(map(record, range(options.images))), preprocess, 0, False)


def picture(index: int, size: int) -> np.ndarray:
    """A normal image of the demo fabric."""
    return demo.render("fabric", index, size=size)[0]


def resident_bytes() -> int:
    """The resident memory of this process now."""
    [line] = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


class Monitor:
    """A `Progress` that reads clock and memory after every `every` images."""

    def __init__(self, every: int) -> None:
        self.every, self.started, self.collected = every, time.perf_counter(), 0.0
        self.points: list[dict[str, Any]] = []

    def __call__(self, phase: str, done: int, total: int) -> None:
        """As `jaxad.driver.execution.Progress`."""
        seconds = time.perf_counter() - self.started
        if not total:
            self.collected = seconds
        elif not done:
            self.started = time.perf_counter()
        elif done == total or done // self.every > sum(p["images"] // self.every for p in self.points[-1:]):
            self.points.append({"images": done, "seconds": seconds, "resident_bytes": resident_bytes()})
            print(f"{phase} {self.points[-1]}", file=sys.stderr, flush=True)


def method_of(name: str, options: Options, **hyperparameters: Any) -> Method:
    """A method with the embedded backbone, for the size in the options."""
    shape = (options.size, options.size)
    return METHODS[name](backbone=BACKBONE, image_size=shape, **hyperparameters)


def measure(name: str, options: Options) -> dict[str, Any]:
    """Measures a method on the whole stream, then on the sample."""
    hyperparameters: dict[str, Any] = {"coreset_size": options.centers} if name == "patchcore" else {}
    method, frozen, key = method_of(name, options, **hyperparameters), backbones.load(BACKBONE), jax.random.key(0)
    before = resident_bytes()
    data = stream(options)
    records_bytes = resident_bytes() - before
    monitor = Monitor(options.every)
    execution = Execution(batch_size=options.batch_size)
    fitted = fit(method, frozen, data, key, execution._replace(progress=monitor))
    first = next(p for p in monitor.points if p["images"] >= options.images / 10)
    last = monitor.points[-1]
    peak = peak_bytes()
    spec = embedded_spec(method.embed, frozen, len(data), data.image_size)
    state = abstract_state(method, frozen, spec, 0)
    sampled = data.subset(slice(None, None, max(1, len(data) // options.sample)))
    execution = execution._replace(cache=EmbeddingCache())
    record = {
        "hyperparameters": hyperparameters,
        "images": last["images"],
        "compile_seconds": fitted.compile_seconds,
        "run_seconds": fitted.run_seconds,
        "images_per_second": last["images"] / fitted.run_seconds,
        "points": monitor.points,
        "growth_from": first["images"],
        "growth_bytes_per_image": (last["resident_bytes"] - first["resident_bytes"])
        / max(1, last["images"] - first["images"]),
        "image_bytes": options.size**2 * 3,
        "list_of_records_bytes_per_image": records_bytes / len(data),
        "peak_bytes": peak,
        "state_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        "state_bytes_on_a_device": {d: bytes_on_a_device(state, d) for d in DEVICES},
        "seconds_per_image": rates(method, frozen, sampled, key, execution),
    }
    if name == "patchcore":
        project = method.stages[0].init(jax.random.fold_in(key, 0), None, frozen, spec).project  # as the driver's
        record["covering"] = covering(method, fitted.state, project, frozen, sampled, key, execution, options)
        record["covering"]["levels_of_the_stream"] = state.count.shape[0]
    return record


def bytes_on_a_device(state: Any, devices: int) -> int:
    """Bytes of the state on each of several devices along "data"."""
    layout = Layout(AbstractMesh((devices,), (DATA,), axis_types=(AxisType.Auto,)))  # pyright: ignore[reportArgumentType]
    leaves = zip(jax.tree.leaves(state), jax.tree.leaves(layout.state(state, classes=False)), strict=True)
    return sum(int(np.prod(sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf, sharding in leaves)


def rates(method: Method, frozen: Any, data: Dataset, key: jax.Array, execution: Execution) -> dict[str, float]:
    """Seconds per image of each part, and the seconds of finishing; fills the cache."""
    b = execution.batch_size
    parts = [range(i, i + b) for i in range(0, min(len(data), 16 * b) - b + 1, b)]
    started = time.perf_counter()
    images = [data.images(part) for part in parts]
    decode = (time.perf_counter() - started) / (len(parts) * b)
    embed = embed_program(method.embed, Layout(), None)
    jax.block_until_ready(embed(frozen, jnp.asarray(images[0][None, None])))
    started = time.perf_counter()
    for batch in images:
        jax.block_until_ready(embed(frozen, jnp.asarray(batch[None, None])))
    embedded = (time.perf_counter() - started) / (len(parts) * b)
    for _ in range(2):  # in the second round programs are compiled and images embedded
        monitor = Monitor(len(data) + 1)
        fit(method, frozen, data, key, execution._replace(progress=monitor))
        seconds = time.perf_counter() - monitor.started
    update, finish = monitor.collected / len(data), seconds - monitor.collected
    return {"decode": decode, "embed": embedded, "update": update, "finish": finish}


def covering(
    method: Method,
    bank: Any,
    project: jax.Array | None,
    frozen: Any,
    data: Dataset,
    key: jax.Array,
    execution: Execution,
    options: Options,
) -> dict[str, Any]:
    """Covering radii of the sample's patches, in the projected space, by the stream's bank and by the sample's.

    Args:
        method: What was fitted to the stream.
        bank: What it has learned.
        project: Its random projection (c d); None: none.
        frozen: Its pretrained weights.
        data: The sample.
        key: For the fits.
        execution: With the sample's embeddings in its cache.
        options: Sizes.
    """
    complete = method_of("patchcore", options, coreset_sampling_ratio=1.0)
    all_patches = fit(complete, frozen, data, key, execution).state

    def projected(rows: jax.Array) -> jax.Array:
        return rows if project is None else jnp.matmul(rows, project, precision=jax.lax.Precision.HIGHEST)

    patches = projected(all_patches.bank[: int(all_patches.size)])

    def radius(bank: Any) -> float:
        return float(knn(patches, projected(bank.bank), 1, jnp.arange(bank.bank.shape[0]) < bank.size)[0].max())

    sampled = fit(method, frozen, data, key, execution).state
    spec = embedded_spec(method.embed, frozen, len(data), data.image_size)
    levels = abstract_state(method, frozen, spec, 0).count.shape[0]
    at_once = float(greedy_coreset(patches, min(options.centers, len(patches))).radius)
    return {
        "proven_of_the_stream": float(bank.radius),
        "true_on_the_sample": radius(bank),
        "sample": {
            "images": len(data),
            "patches": len(patches),
            "centers": int(sampled.size),
            "levels": levels,
            "proven": float(sampled.radius),
            "true": radius(sampled),
            "at_once": at_once,
            "true_over_at_once": radius(sampled) / at_once,
            "proven_over_at_once": float(sampled.radius) / at_once,
            "a_priori": 2 * levels,
        },
    }


def extrapolate(methods: dict[str, Any], scaling: dict[str, Any]) -> list[dict[str, Any]]:
    """Seconds and bytes for more images and devices, under `ASSUMPTIONS`.

    Args:
        methods: The measurements by method.
        scaling: The programs of bench_scaling.json.
    """
    rows = []
    for name, measured in methods.items():
        seconds, state = measured["seconds_per_image"], measured["state_bytes_on_a_device"]
        base = next(p for p in measured["points"] if p["images"] == measured["growth_from"])
        program = "patchcore_stream" if name == "patchcore" else name
        flops = {int(d): f for d, f in scaling[program]["data"]["update"]["flops"].items()}
        most = max(flops)
        serial = (flops[most] / flops[1] - 1) / (most - 1)
        for axis in ("data", "class"):
            for devices in DEVICES:
                for images in IMAGES:
                    classes, sharing = (devices, 1) if axis == "class" else (1, devices)
                    hosts = -(-devices // DEVICES_PER_HOST)
                    parts = {
                        "decode": classes * images * seconds["decode"] / hosts,
                        "embed": images * seconds["embed"] / sharing,
                        "update": images * seconds["update"] * (serial + (1 - serial) / sharing),
                        "finish": seconds["finish"],
                    }
                    record_bytes = measured["list_of_records_bytes_per_image"]
                    resident = base["resident_bytes"] - record_bytes * measured["images"]
                    resident += max(0, measured["growth_bytes_per_image"]) * images
                    resident -= int(state["1"]) - int(state[str(sharing)])
                    row = {"method": name, "axis": axis, "devices": devices, "classes": classes, "images": images}
                    overlapped = max(parts["decode"], parts["embed"] + parts["update"]) + parts["finish"]
                    row |= {"seconds": parts, "decode_beside": overlapped, "decode_in_turn": sum(parts.values())}
                    row |= {"images_per_second": classes * images / overlapped, "bytes": round(resident)}
                    rows.append(row | {"list_of_records_bytes": round(record_bytes * classes * images)})
    return rows


def measure_in_process(name: str, options: Options) -> dict[str, Any]:
    """`measure` in a new process; the options are those of this command line."""
    del options
    return run_module("experiments.bench.stream", *sys.argv[1:], "--one", name, MALLOC_ARENA_MAX="1")


def main(options: Options) -> None:
    """Measures both methods and writes results/bench_stream.json."""
    options = small(options) if options.smoke else options
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return
    path = options.results / "bench_stream.json"
    if options.table_only:
        record = read_json(path)
        for name, measured in record["methods"].items():
            method, frozen = method_of(name, options, **measured["hyperparameters"]), backbones.load(BACKBONE)
            spec = embedded_spec(method.embed, frozen, measured["images"], (options.size, options.size))
            state = abstract_state(method, frozen, spec, 0)
            measured["state_bytes_on_a_device"] = {str(d): bytes_on_a_device(state, d) for d in DEVICES}
    else:
        run = measure if options.smoke else measure_in_process
        record = {
            "recipe": "bench_stream",
            "backbone": BACKBONE,
            "image_size": options.size,
            "batch_size": options.batch_size,
            "methods": {name: json.loads(json.dumps(run(name, options))) for name in ("padim", "patchcore")},
            **origin(),
            "notes": options.notes,
        }
        write_json(path, record)
    scaling = options.results / "bench_scaling.json"
    if scaling.exists():
        record |= {"assumptions": ASSUMPTIONS, "table": extrapolate(record["methods"], read_json(scaling)["programs"])}
        write_json(path, record)
    for name, measured in record["methods"].items():
        print(f"{name}: {measured['images_per_second']:.1f} images/s,", end=" ")
        print(f"{measured['growth_bytes_per_image']:.1f} bytes a further image, {measured['seconds_per_image']}")


if __name__ == "__main__":
    start(main, Options)
