"""100,000 images through one fit in flat memory: PaDiM, and PatchCore whose coreset is merged as the images come.

    python experiments/bench_stream.py

Every image is rendered from its index when it is read (demo fabric, embedded backbone), no two are the same, and none
is kept. Each method has a process of its own, with one heap for all threads (`MALLOC_ARENA_MAX=1`), whose resident
memory is read after every few thousand images. Then, on a sample spread over the stream: what decoding, embedding and
updating cost an image, each alone; and for PatchCore how well its centers cover, beside the bound that comes with the
bank, the greedy selection among all patches of the sample at once, and the bound that was proven beforehand.

The table for more devices and images follows from these rates and from `bench_scaling.json` by the formulas in
`extrapolate`; `--table-only` makes it anew from what was measured. `--smoke` is the small variant that the tests run.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import AbstractMesh, AxisType

from command import origin, start
from jaxad import backbones
from jaxad.files import read_json, write_json
from jaxad.base import Method
from jaxad.data import Dataset, Preprocess, demo
from jaxad.data.records import Record
from jaxad.detector import peak_bytes
from jaxad.driver.embedding import EmbeddingCache, embed_program
from jaxad.driver.fit import abstract_state, fit
from jaxad.driver.mesh import DATA, Layout
from jaxad.methods import METHODS
from jaxad.ops.coreset import greedy_coreset
from jaxad.ops.knn import knn

BACKBONE = "pdn_small"
DEVICES, IMAGES = (1, 8, 64), (100_000, 1_000_000, 10_000_000)
DEVICES_PER_HOST = 8
ASSUMPTIONS = (
    "A device is one like that of the measurement (its rates, alone, are under `seconds_per_image`); a host feeds "
    f"{DEVICES_PER_HOST} of them and decodes as fast as the host of the measurement, beside its devices' work.",
    "Decoding: divided by the hosts. Embedding: divided by the devices along either axis, without communication.",
    'Axis "class": every device has a class of its own, of so many images each; nothing is shared, nothing is told.',
    'Axis "data": the devices share one class. PaDiM: positions are shared, and so are its moments. PatchCore: the '
    "stream is one sequence, so each batch's patches are gathered on all devices; the rows held, and what a reduction "
    "computes, are shared, its choice among the candidates is not.",
    "Work of an update on D devices over that on one: s + (1 - s) / D, with s from the flops that bench_scaling.json "
    "gives for its largest mesh. The time of communication is not in it.",
    "Finishing (the last thinning, or the factors) is taken as not shared at all.",
    "Memory of a device: that of the process after a tenth of the images, less the list of records, and the measured "
    'growth for all images; on "data" less the part of the state that the driver\'s layout leaves to other devices.',
    "The list of records, which names the images, is in each host's memory and does grow with them.",
)


@dataclass
class Options:
    """Stream many images."""

    images: int = 100_000
    size: int = 64
    centers: int = 2048
    batch_size: int = 64
    every: int = 2_500
    """Images between two looks at the memory."""
    sample: int = 4_000
    """Images of the stream that rates and covering radii are measured on."""
    results: Path = field(default_factory=lambda: Path(__file__).parent / "results")
    notes: str = ""
    """What else to know about this run, kept with it."""
    table_only: bool = False
    smoke: bool = False
    """Few small images, in this process."""
    one: Annotated[str | None, tyro.conf.arg(help="internal: a method")] = None


def small(options: Options) -> Options:
    """The options of the smoke variant."""
    return dataclasses.replace(options, images=96, size=32, centers=16, batch_size=16, every=16, sample=32)


def stream(options: Options) -> Dataset:
    """Images that are rendered when they are read; no two are the same."""

    def record(i: int) -> Record:
        return Record(f"{i}", functools.partial(picture, i, options.size), "fabric", "train")

    preprocess = Preprocess((options.size, options.size))
    return Dataset("demo", "fabric", "train", tuple(map(record, range(options.images))), preprocess, 0, False)


def picture(index: int, size: int) -> np.ndarray:
    """One specimen of the demo fabric."""
    return demo.render("fabric", index, size=size)[0]


def resident_bytes() -> int:
    """The memory that this process holds at the moment."""
    [line] = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


class Watch:
    """Progress of a fit that looks at clock and memory after every so many images."""

    def __init__(self, every: int) -> None:
        self.every, self.started, self.finish = every, time.perf_counter(), 0.0
        self.points: list[dict[str, Any]] = []

    def __call__(self, what: str, done: int, total: int) -> None:
        """As `jaxad.fit.Progress`."""
        seconds = time.perf_counter() - self.started
        if not total:
            self.finish = seconds
        elif not done:
            self.started = time.perf_counter()
        elif done == total or done // self.every > sum(p["images"] // self.every for p in self.points[-1:]):
            self.points.append({"images": done, "seconds": seconds, "resident_bytes": resident_bytes()})
            print(f"{what} {self.points[-1]}", file=sys.stderr, flush=True)


def method_of(name: str, options: Options, **hyperparameters: Any) -> Method:
    """A method for this backbone and size."""
    shape = (options.size, options.size)
    return METHODS[name](backbone=BACKBONE, image_size=shape, **hyperparameters)


def measure(name: str, options: Options) -> dict[str, Any]:
    """One method on the whole stream, then on the sample."""
    hyperparameters: dict[str, Any] = {"coreset_size": options.centers} if name == "patchcore" else {}
    method, frozen, key = method_of(name, options, **hyperparameters), backbones.load(BACKBONE), jax.random.key(0)
    before = resident_bytes()
    data = stream(options)
    listed = resident_bytes() - before
    watch = Watch(options.every)
    fitted = fit(method, frozen, data, key, batch_size=options.batch_size, progress=watch)
    first = next(p for p in watch.points if p["images"] >= options.images / 10)
    last = watch.points[-1]
    peak = peak_bytes()
    spec, state = collected(method, len(data), options)
    sampled = data.subset(slice(None, None, max(1, len(data) // options.sample)))
    cache = EmbeddingCache()
    record = {
        "hyperparameters": hyperparameters,
        "images": last["images"],
        "compile_seconds": fitted.compile_seconds,
        "run_seconds": fitted.run_seconds,
        "images_per_second": last["images"] / fitted.run_seconds,
        "points": watch.points,
        "growth_from": first["images"],
        "growth_bytes_per_image": (last["resident_bytes"] - first["resident_bytes"])
        / max(1, last["images"] - first["images"]),
        "image_bytes": options.size**2 * 3,
        "list_of_records_bytes_per_image": listed / len(data),
        "peak_bytes": peak,
        "state_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        "state_bytes_on_a_device": {d: share(state, d) for d in DEVICES},
        "seconds_per_image": rates(method, frozen, sampled, key, cache, options),
    }
    if name == "patchcore":
        project = method.init(jax.random.fold_in(key, 0), frozen, spec).project  # as the driver's
        record["covering"] = covering(method, fitted.state, project, frozen, sampled, key, cache, options)
        record["covering"]["levels_of_the_stream"] = state.count.shape[0]
    return record


def collected(method: Method, images: int, options: Options) -> tuple[Any, Any]:
    """Shapes of so many embedded images, and of the state that takes them."""
    frozen = backbones.load(BACKBONE)
    pixels = jax.ShapeDtypeStruct((images, options.size, options.size, 3), jnp.uint8)
    spec = jax.eval_shape(method.embed, frozen, pixels)
    return spec, abstract_state(method, frozen, spec, 0)


def share(state: Any, devices: int) -> int:
    """Bytes of the state on one of several devices along "data"."""
    layout = Layout(AbstractMesh((devices,), (DATA,), axis_types=(AxisType.Auto,)))  # pyright: ignore[reportArgumentType]
    leaves = zip(jax.tree.leaves(state), jax.tree.leaves(layout.state(state)), strict=True)
    return sum(int(np.prod(placed.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf, placed in leaves)


def rates(
    method: Method, frozen: Any, data: Dataset, key: jax.Array, cache: EmbeddingCache, options: Options
) -> dict[str, float]:
    """Seconds an image of the parts, each alone, and seconds in all of the finish; fills the cache."""
    b = options.batch_size
    parts = [range(i, i + b) for i in range(0, min(len(data), 16 * b) - b + 1, b)]
    started = time.perf_counter()
    images = [data.images(part) for part in parts]
    decode = (time.perf_counter() - started) / (len(parts) * b)
    embed = embed_program(method.embed, Layout(), None)
    jax.block_until_ready(embed(frozen, jnp.asarray(images[0][None])))
    started = time.perf_counter()
    for batch in images:
        jax.block_until_ready(embed(frozen, jnp.asarray(batch[None])))
    embedded = (time.perf_counter() - started) / (len(parts) * b)
    for _ in range(2):  # the second finds programs compiled and images embedded
        watch = Watch(len(data) + 1)
        fit(method, frozen, data, key, batch_size=b, cache=cache, progress=watch)
        whole = time.perf_counter() - watch.started
    return {"decode": decode, "embed": embedded, "update": watch.finish / len(data), "finish": whole - watch.finish}


def covering(
    method: Method,
    bank: Any,
    project: jax.Array | None,
    frozen: Any,
    data: Dataset,
    key: jax.Array,
    cache: EmbeddingCache,
    options: Options,
) -> dict[str, Any]:
    """Covering radii, in the projected space: of the stream's bank on the sample, and of the sample's own."""
    everything = method_of("patchcore", options, coreset_sampling_ratio=1.0)
    all_patches = fit(everything, frozen, data, key, batch_size=options.batch_size, cache=cache).state

    def projected(rows: jax.Array) -> jax.Array:
        return rows if project is None else jnp.matmul(rows, project, precision=jax.lax.Precision.HIGHEST)

    patches = projected(all_patches.bank[: int(all_patches.size)])

    def radius(bank: Any) -> float:
        return float(knn(patches, projected(bank.bank), 1, jnp.arange(bank.bank.shape[0]) < bank.size)[0].max())

    own = fit(method, frozen, data, key, batch_size=options.batch_size, cache=cache).state
    levels = method.init(key, frozen, next(iter(cache.values())).spec).count.shape[0]
    at_once = float(greedy_coreset(patches, min(options.centers, len(patches))).radius)
    return {
        "proven_of_the_stream": float(bank.radius),
        "true_on_the_sample": radius(bank),
        "sample": {
            "images": len(data),
            "patches": len(patches),
            "centers": int(own.size),
            "levels": levels,
            "proven": float(own.radius),
            "true": radius(own),
            "at_once": at_once,
            "true_over_at_once": radius(own) / at_once,
            "proven_over_at_once": float(own.radius) / at_once,
            "a_priori": 2 * levels,
        },
    }


def extrapolate(methods: dict[str, Any], scaling: dict[str, Any]) -> list[dict[str, Any]]:
    """Seconds and bytes for more images and devices, under `ASSUMPTIONS`."""
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
                    listed = measured["list_of_records_bytes_per_image"]
                    resident = base["resident_bytes"] - listed * measured["images"]
                    resident += max(0, measured["growth_bytes_per_image"]) * images
                    resident -= int(state["1"]) - int(state[str(sharing)])
                    row = {"method": name, "axis": axis, "devices": devices, "classes": classes, "images": images}
                    apart = max(parts["decode"], parts["embed"] + parts["update"]) + parts["finish"]
                    row |= {"seconds": parts, "decode_beside": apart, "decode_in_turn": sum(parts.values())}
                    row |= {"images_per_second": classes * images / apart, "bytes": round(resident)}
                    rows.append(row | {"list_of_records_bytes": round(listed * classes * images)})
    return rows


def apart(name: str, options: Options) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


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
            method = method_of(name, options, **measured["hyperparameters"])
            _, state = collected(method, measured["images"], options)
            measured["state_bytes_on_a_device"] = {str(d): share(state, d) for d in DEVICES}
    else:
        run = measure if options.smoke else apart
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
