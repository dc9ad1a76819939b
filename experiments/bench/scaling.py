"""The same work on 1, 2, 4 and 8 devices: operations, memory traffic and communication of the driver's own programs.

    python -m experiments.bench.scaling

Nothing is executed. For each number of virtual CPU devices a new process compiles every program from shapes, and
`program_cost` counts what it costs one device. One class is sharded over the mesh axis "data", eight classes over the
axis "class". Ideally, a program on N devices costs each device 1/N of what it costs a single one. The growth is the
cost of all devices together over that of a single one; the goal is at most 1.1.

`rounds` are the rounds of loops whose number depends on data. They are the same on any number of devices, except for
SPADE, where each device visits those of an image's nearest images that it holds, on average an equal share.

The goal applies to whole runs: `fit` is embedding and updating for all images and one finish, `scoring` is embedding
and scoring one batch. Programs that cost next to nothing may run whole on every device.

`--smoke` is the small variant for the tests.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import tyro

from experiments.bench.program_cost import Module
from experiments.command import RESULTS, origin, run_module, start
from jaxad.backbones import backbone as architecture
from jaxad.base import Batch
from jaxad.driver.embedding import embed_program
from jaxad.driver.mesh import Layout, make_mesh
from jaxad.driver.programs import abstract_state, embedded_spec, fit_programs, score_program
from jaxad.driver.schedule import next_multiple
from jaxad.files import write_json
from jaxad.methods import METHODS
from jaxad.ops.coreset import FAN

ACCEPTED = 128
"""Centers that one pass of the greedy selection finds, roughly (178 in a bank of 4,096 of the demo data's patches)."""
GOAL = 1.1


@dataclass
class Options:
    """Compile for several numbers of devices."""

    devices: tuple[int, ...] = (1, 2, 4, 8)
    methods: tuple[str, ...] = ("patchcore", "patchcore_stream", "padim", "spade", "mahalanobis_ad")
    classes: int = 8
    """Classes along the axis "class"."""
    images: int = 768
    """Training images of each class, about as many as MTD has."""
    batch_size: int = 192
    """24 images for each of 8 devices, every one of which reads all weights."""
    size: int = 224
    backbone: str | None = None
    """None: each method's default."""
    centers: int = 65536
    """Size of the merged coreset, about a tenth of the patches."""
    results: Path = RESULTS
    keep: Path | None = None
    """A folder for the compiled programs as text; None: they are not kept."""
    smoke: bool = False
    """Small shapes, on 1 and 2 devices."""
    one: Annotated[int | None, tyro.conf.arg(help="internal: the number of devices to measure in this process")] = None


def small(options: Options) -> Options:
    """The options of the smoke variant."""
    shapes: dict[str, Any] = dict(images=16, batch_size=4, size=64, backbone="resnet18", centers=16)
    return Options((1, 2), ("patchcore_stream", "padim"), 2, **shapes, results=options.results, smoke=True)


def compiled(name: str, axis: str, devices: int, options: Options) -> Iterator[tuple[str, Any, tuple[float, ...]]]:
    """The programs of a method as the driver compiles them.

    Args:
        name: Of the method; "patchcore_stream" is PatchCore with a merged coreset.
        axis: The mesh axis along which the devices lie.
        devices: Their number.
        options: Shapes.

    Yields:
        The name of a program, its executable, and the rounds of its loops as `Module` wants them.
    """
    classes = options.classes if axis == "class" else 1
    layout = Layout(make_mesh(shape=(devices, 1) if axis == "class" else (1, devices)))
    size, rows = (options.size, options.size), options.batch_size
    arguments: dict[str, Any] = {"image_size": size} if name != "mahalanobis_ad" else {}
    arguments |= {"coreset_size": options.centers} if name == "patchcore_stream" else {}
    arguments |= {"backbone": options.backbone} if options.backbone else {}
    factory = METHODS[name.removesuffix("_stream")]
    method = factory(**arguments)
    network = architecture(arguments.get("backbone") or (factory.__kwdefaults__ or {})["backbone"])

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def placed(arrays: Any, *spec: str | None) -> Any:
        """The arrays of one step and class, as those of all classes on the devices."""
        sharding = layout.named(None, *spec)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((classes, 1, *leaf.shape), leaf.dtype, sharding=sharding), arrays
        )

    frozen = jax.eval_shape(network.init, jax.random.key(0))
    spec = embedded_spec(method.embed, frozen, options.images, size)
    frozen = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.replicated()), frozen
    )
    row_axis = layout.rows(rows)
    x = placed(embedded_spec(method.embed, frozen, rows, size), row_axis)
    embed = embed_program(method.embed, layout, row_axis)
    yield "embed", embed.compile(frozen, placed(array(rows, *size, 3, dtype=jnp.uint8), row_axis)), ()

    key_type = jax.eval_shape(jax.random.key, 0).dtype
    keys = jax.ShapeDtypeStruct((classes,), key_type, sharding=layout.named())
    active = jax.ShapeDtypeStruct((classes, 1), bool, sharding=layout.named())
    valid, integers = (placed(array(rows, dtype=t), row_axis) for t in (jnp.dtype(bool), jnp.dtype(jnp.int32)))
    batch = Batch(x, valid, integers, None, integers, placed(array(dtype=jnp.float32)))
    state = layout.abstract(abstract_state(method, frozen, spec, 0), classes)
    fitted = abstract_state(method, frozen, spec)
    patches, centers = 1, 1
    if name.startswith("patchcore"):
        centers = jax.tree.leaves(fitted)[0].shape[0]
        patches = rows * spec[network.patch_layers[0]].shape[1] ** 2
    rounds = (max(1, centers / ACCEPTED), min(centers, ACCEPTED))
    reductions = patches / (FAN * centers) * FAN / (FAN - 1)
    [stage] = method.stages
    programs = fit_programs(method, layout, next_multiple(options.images, layout.data_shards), size)
    update = programs.updates[0].compile(state, keys, active, batch, frozen, None, array(1))
    yield "update", update, (1.0 + patches / (FAN * centers), reductions, *rounds)
    yield f"finalize {stage.name}", programs.finishes[0].compile(keys, state, frozen), rounds
    neighbors = min(50, options.images) / layout.data_shards if name == "spade" else 1.0
    score = score_program(method, layout, None, True)
    yield "score", score.compile(layout.abstract(fitted, classes), frozen, x), (neighbors,)


def measure(devices: int, options: Options) -> dict[str, Any]:
    """The costs of all programs on so many devices, by method, axis and program."""
    costs: dict[str, Any] = {}
    for name in options.methods:
        for axis in ("data", "class"):
            for program, executable, rounds in compiled(name, axis, devices, options):
                text = executable.as_text()
                if options.keep:
                    (options.keep / f"{name}-{axis}-{program.split()[0]}-{devices}.txt").write_text(text)
                cost, once = Module(text, rounds).cost(), executable.cost_analysis()
                entry = {"flops": cost.flops, "bytes": cost.bytes}
                entry |= {"communication": cost.communication, "rounds": rounds}
                entry |= {f"{k.split()[0]}_bodies_once": once.get(k, 0.0) for k in ("flops", "bytes accessed")}
                costs.setdefault(name, {}).setdefault(axis, {})[program.split()[0]] = entry
                print(devices, name, axis, program, f"{cost.flops:.3g} {cost.bytes:.3g}", file=sys.stderr, flush=True)
    return costs


def growth(by_devices: dict[int, dict[str, Any]], options: Options) -> dict[str, Any]:
    """The cost of all devices together over that of a single one, for every method, axis and program.

    Args:
        by_devices: What `measure` returns, by the number of devices.
        options: Shapes.
    """
    programs: dict[str, Any] = {}
    first = min(by_devices)
    steps = -(-options.images // options.batch_size)
    runs = {"fit": {"embed": steps, "update": steps, "finalize": 1}, "scoring": {"embed": 1, "score": 1}}
    for name, axes in by_devices[first].items():
        for axis, entries in axes.items():
            programs.setdefault(name, {})[axis] = rows = {}
            for program in entries:
                costs = {n: measured[name][axis][program] for n, measured in by_devices.items()}
                totals = {k: {n: n * cost[k] for n, cost in costs.items()} for k in ("flops", "bytes")}
                ratio = {k: {n: v / (per[first] or 1) for n, v in per.items()} for k, per in totals.items()}
                rows[program] = totals | {
                    "growth": ratio,
                    "communication": {n: cost["communication"] for n, cost in costs.items() if cost["communication"]},
                    "rounds": costs[first]["rounds"],
                    "one_device_with_bodies_once": {k: costs[first][f"{k}_bodies_once"] for k in ("flops", "bytes")},
                }
            for run, parts in runs.items():
                sums = {
                    k: {n: sum(times * rows[p][k][n] for p, times in parts.items()) for n in by_devices}
                    for k in ("flops", "bytes")
                }
                ratio = {k: {n: v / per[first] for n, v in per.items()} for k, per in sums.items()}
                within = all(v <= GOAL for per in ratio.values() for v in per.values())
                rows[run] = sums | {"growth": ratio, "within_goal": within}
    return programs


def measure_in_process(devices: int, options: Options) -> dict[str, Any]:
    """`measure` in a new process with so many virtual devices; the options are those of this command line."""
    del options
    flags = f"--xla_force_host_platform_device_count={devices}"
    arguments = (*sys.argv[1:], "--one", str(devices))
    return run_module("experiments.bench.scaling", *arguments, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")


def main(options: Options) -> None:
    """Compiles for every number of devices and writes results/bench_scaling.json."""
    options = small(options) if options.smoke else options
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return
    run = measure if options.smoke else measure_in_process
    by_devices = {n: json.loads(json.dumps(run(n, options))) for n in options.devices}
    programs = growth(by_devices, options)
    record = {
        "recipe": "bench_scaling",
        "goal": GOAL,
        "classes": options.classes,
        "images": options.images,
        "batch_size": options.batch_size,
        "image_size": options.size,
        "coreset_size": options.centers,
        "accepted_per_pass": ACCEPTED,
        "programs": programs,
        "beyond_the_goal": [
            f"{name}, {axis}, {program}"
            for name, axes in programs.items()
            for axis, entries in axes.items()
            for program, entry in entries.items()
            if not entry.get("within_goal", True)
        ],
        **origin(),
        "device": "virtual CPU devices, compiled only",
    }
    write_json(options.results / "bench_scaling.json", record)
    largest = max(options.devices)
    for name, axes in programs.items():
        for axis, entries in axes.items():
            parts = (
                f"{p} {e['growth']['flops'][largest]:.2f}/{e['growth']['bytes'][largest]:.2f}"
                for p, e in entries.items()
            )
            print(f"{name} on {largest} devices along {axis}, growth of flops/bytes: {', '.join(parts)}")


if __name__ == "__main__":
    start(main, Options)
