"""The same work on 1, 2, 4 and 8 devices: operations, memory traffic and communication of the driver's own programs.

    python experiments/bench_scaling.py

Nothing is executed: every program is compiled from shapes alone, for so many virtual CPU devices, in a process for each
number of devices. One class is spread over the axis "data", eight classes over the axis "class". Ideally a program on
N devices costs each of them a N-th of what it costs one; what all of them do together, over what one does, is the
growth, and 1.1 the goal.

Operations and bytes are those of XLA's cost analysis. It counts the body of a loop once, so each body is analyzed on
its own and multiplied by its number of rounds: the one that XLA knows (`known_trip_count`), or, where data decide, the
one under `rounds`: the same on any number of devices, but for SPADE, where each device looks at those of an image's
nearest images that it holds, evenly many. What a call of LAPACK computes, and what it and any other library call read
and write, is added: XLA does not count it. Of what a fusion only cuts a slice out of, the slice counts, not the whole
as with XLA: the all-to-all of the CPU consists of such slices.

The goal is that of the whole: `fit` is embedding and updating for all images and finishing once, `scoring` is embedding
and scoring a batch. Programs that cost next to nothing may stay whole on every device.

`--smoke` is the small variant that the tests run.
"""

import functools
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from jaxlib import _hlo, _jax  # pyright: ignore[reportAttributeAccessIssue]

from command import origin, start
from jaxad.files import write_json
from jaxad.backbones import backbone as architecture
from jaxad.base import Batch
from jaxad.driver.embedding import embed_program
from jaxad.driver.fit import _programs, _score_program, abstract_state
from jaxad.driver.mesh import Layout, make_mesh
from jaxad.methods import METHODS
from jaxad.ops.coreset import FAN

ACCEPTED = 128
"""Centers that a pass of the greedy selection finds, about (178 in a bank of 4,096 of the demo data's patches)."""
GOAL = 1.1
OPERATIONS = {
    "lapack_spotrf_ffi": lambda n, m: n**3 / 3,
    "lapack_strsm_ffi": lambda n, m: n * n * m,
    "lapack_sgeqrf_ffi": lambda n, m: 2 * m * m * (n - m / 3),
    "lapack_sorgqr_ffi": lambda n, m: 2 * m * m * (n - m / 3),
}
"""Floating point operations of library calls, from the last two sizes of the result."""


@dataclass
class Options:
    """Compile for several numbers of devices."""

    devices: tuple[int, ...] = (1, 2, 4, 8)
    methods: tuple[str, ...] = ("patchcore", "patchcore_stream", "padim", "spade", "mahalanobis_ad")
    classes: int = 8
    """Along the axis "class"."""
    images: int = 768
    """Of each class: as many as MTD has."""
    batch_size: int = 192
    """24 for each of 8 devices, every one of which reads the weights."""
    size: int = 224
    backbone: str | None = None
    """None: each method's own."""
    centers: int = 65536
    """Of the merged coreset: as many as a tenth of the patches."""
    results: Path = field(default_factory=lambda: Path(__file__).parent / "results")
    keep: Path | None = None
    """Where to leave the compiled programs as text."""
    smoke: bool = False
    """Few, small and on 1 and 2 devices."""
    one: Annotated[int | None, tyro.conf.arg(help="internal: a number of devices")] = None


def small(options: Options) -> Options:
    """The options of the smoke variant."""
    shapes: dict[str, Any] = dict(images=16, batch_size=4, size=64, backbone="resnet18", centers=16)
    return Options((1, 2), ("patchcore_stream", "padim"), 2, **shapes, results=options.results, smoke=True)


class Cost(NamedTuple):
    """What a program costs one device."""

    flops: float
    bytes: float
    told: Counter[str]
    """What devices tell each other, and how often."""

    def __add__(self, other: Any) -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.told + other.told)

    def times(self, n: float) -> "Cost":
        """So many of it."""
        return Cost(n * self.flops, n * self.bytes, Counter({k: n * v for k, v in self.told.items()}))


class Module:
    """The text of a compiled program, and the costs of its parts.

    Args:
        text: Of `compiled.as_text()`.
        rounds: Rounds of the loops whose number data decide: of the outermost, of those in them, and so on.
    """

    START = re.compile(r"^(?:ENTRY )?%([\w.-]+) \(.*\{$", re.MULTILINE)

    def __init__(self, text: str, rounds: tuple[float, ...]) -> None:
        self._rounds = rounds
        text = re.sub(r", metadata=\{[^}]*\}", "", text)
        starts = list(self.START.finditer(text))
        ends = [start.start() for start in starts[1:]] + [len(text)]
        self._parts = {s[1]: text[s.start() : end].removeprefix("ENTRY ") for s, end in zip(starts, ends, strict=True)}
        self._entry = next(s[1] for s in starts if s[0].startswith("ENTRY"))
        self._own = functools.cache(self._analyze)

    def cost(self) -> Cost:
        """Of the whole program, loops multiplied out."""
        return self._total(self._entry, 0)

    def _total(self, name: str, depth: int) -> Cost:
        total = self._own(name)
        for loop, body in self._loops(name):
            known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop)
            rounds = float(known[1]) if known else self._rounds[depth]
            total = total + self._total(body, depth + (not known)).times(rounds)
        return total

    def _loops(self, name: str) -> Iterator[tuple[str, str]]:
        """The loops of a part and of what it calls, and their bodies."""
        for line in self._parts[name].splitlines():
            if " while(" in line:
                yield line, _named("body", line)
            elif " call(" in line:
                yield from self._loops(_named("to_apply", line))

    def _analyze(self, name: str) -> Cost:
        """A part on its own, without the bodies of its loops."""
        marked = [("ENTRY " if part == name else "") + text for part, text in self._parts.items()]
        module = _hlo.hlo_module_from_text("HloModule part\n\n" + "".join(marked))
        counted = _jax.hlo_module_cost_analysis(jax.devices()[0].client, module)
        own = Cost(counted.get("flops", 0.0), counted.get("bytes accessed", 0.0), Counter()) + self._uncounted(name)
        for _, body in self._loops(name):  # XLA has counted each once, with what is in it
            inner = self._inside(body)
            own = Cost(own.flops - inner[0], own.bytes - inner[1], own.told)
        return own

    def _inside(self, name: str) -> tuple[float, float]:
        """What XLA counts for a part: bodies once, no library calls."""
        own, extra = self._own(name), self._uncounted(name)
        inner = [self._inside(body) for _, body in self._loops(name)]
        return own.flops - extra.flops + sum(f for f, _ in inner), own.bytes - extra.bytes + sum(b for _, b in inner)

    def _uncounted(self, name: str) -> Cost:
        """Library calls, and communication."""
        flops, moved, told = 0.0, 0.0, Counter()
        sizes: dict[str, int] = {}
        for line in self._parts[name].splitlines():
            found = re.match(r"  (?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)", line)
            if not found:
                continue
            result, types, kind, operands = found.groups()
            shapes = [
                (t, tuple(map(int, filter(None, s.split(",")))))
                for t, s in re.findall(r"([a-z]\w*)\[([\d,]*)\]", types)
            ]
            sizes[result] = sum(_bytes(*shape) for shape in shapes)
            target = re.search(r'custom_call_target="(\w+)"', line)
            if target:
                if target[1] in OPERATIONS:
                    *lead, n, m = shapes[0][1]
                    flops += math.prod(lead) * OPERATIONS[target[1]](n, m)
                moved += sizes[result] + sum(sizes.get(o, 0) for o in re.findall(r"%([\w.-]+)", operands))
            elif kind == "fusion" and self._copies_a_slice(_named("calls", line)):
                moved -= sum(sizes.get(o, 0) for o in re.findall(r"%([\w.-]+)", operands)) - sizes[result]
            kind = kind.removesuffix("-start")
            if kind in ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"):
                told[f"{kind} {' '.join(f'{t}{list(s)}' for t, s in shapes)}, {sizes[result]} bytes"] += 1
            elif kind == "call":
                inner = self._uncounted(_named("to_apply", line))
                flops, moved, told = flops + inner.flops, moved + inner.bytes, told + inner.told
        return Cost(flops, moved, told)

    def _copies_a_slice(self, name: str) -> bool:
        """Whether a fusion only turns its operand and cuts something out, for which XLA counts the whole operand."""
        found = re.findall(r"= \S+ ([\w-]+)\(%?([\w.-]+)", self._parts[name])
        cuts = [operand for kind, operand in found if kind == "slice"]
        turns = {"parameter", "bitcast", "convert", "copy", "transpose", "slice"}
        return len(cuts) == 1 and not cuts[0].startswith("param") and {kind for kind, _ in found} <= turns


def _named(what: str, line: str) -> str:
    found = re.search(rf"{what}=%([\w.-]+)", line)
    assert found
    return found[1]


def _bytes(kind: str, shape: tuple[int, ...]) -> int:
    bits = re.sub(r"^\D+", "", kind)
    return math.prod(shape) * (int(bits) // 8 if bits else 1)


def compiled(name: str, axis: str, devices: int, options: Options) -> Iterator[tuple[str, Any, tuple[float, ...]]]:
    """The programs of a method as the driver compiles them, and the rounds of their loops that data decide."""
    classes = options.classes if axis == "class" else 1
    layout = Layout(make_mesh(shape=(devices, 1) if axis == "class" else (1, devices)), axis == "class")
    size, rows = (options.size, options.size), options.batch_size
    given: dict[str, Any] = {"image_size": size} if name != "mahalanobis_ad" else {}
    given |= {"coreset_size": options.centers} if name == "patchcore_stream" else {}
    given |= {"backbone": options.backbone} if options.backbone else {}
    factory = METHODS[name.removesuffix("_stream")]
    method = factory(**given)
    network = architecture(given.get("backbone") or (factory.__kwdefaults__ or {})["backbone"])

    def lead(leaf: Any) -> tuple[int, ...]:
        return (classes, 1, *leaf.shape) if layout.stacked else (1, *leaf.shape)

    def put(tree: Any, *spec: str | None) -> Any:
        sharding = layout.named(None, *spec)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(lead(leaf), leaf.dtype, sharding=sharding), tree)

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    frozen = jax.eval_shape(network.init, jax.random.key(0))
    images = array(options.images, *size, 3, dtype=jnp.uint8)
    spec = jax.eval_shape(method.embed, frozen, images)
    frozen = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.replicated()), frozen
    )
    axis_of_rows = layout.rows(rows)
    few = array(rows, *size, 3, dtype=jnp.uint8)
    x = put(jax.eval_shape(method.embed, frozen, few), axis_of_rows)
    embed = embed_program(method.embed, layout, axis_of_rows)
    yield "embed", embed.compile(frozen, put(few, axis_of_rows)), ()

    kind = jax.eval_shape(jax.random.key, 0).dtype
    key = jax.ShapeDtypeStruct((classes,) if layout.stacked else (), kind, sharding=layout.named())
    [stage], programs = method.stages, _programs(method, layout)
    valid, label, index = (
        put(array(rows, dtype=t), axis_of_rows) for t in (jnp.dtype(bool), jnp.dtype(jnp.int32), jnp.dtype(jnp.int32))
    )
    active = jax.ShapeDtypeStruct((classes, 1) if layout.stacked else (1,), bool, sharding=layout.named())
    state = layout.abstract(abstract_state(method, frozen, spec, 0), classes)
    patches, centers = 1, 1
    if name.startswith("patchcore"):
        bank = jax.tree.leaves(abstract_state(method, frozen, spec))[0]
        centers = bank.shape[0]
        patches = rows * (spec[network.patch_layers[0]].shape[1]) ** 2
    rounds = (max(1, centers / ACCEPTED), min(centers, ACCEPTED))
    reductions = patches / (FAN * centers) * FAN / (FAN - 1)
    batch = Batch(x, valid, label, None, index)
    update = programs.updates[0].compile(state, key, active, batch, frozen, array(1))
    yield "update", update, (1.0 + patches / (FAN * centers), reductions, *rounds)
    yield f"finalize {stage.name}", programs.finalizes[0].compile(key, state, frozen), rounds
    fitted = layout.abstract(abstract_state(method, frozen, spec), classes)
    neighbors = min(50, options.images) / layout.data_shards if name == "spade" else 1.0
    yield "score", _score_program(method, layout, None).compile(fitted, frozen, x), (neighbors,)


def measure(devices: int, options: Options) -> dict[str, Any]:
    """The costs of all programs on so many devices."""
    found: dict[str, Any] = {}
    for name in options.methods:
        for axis in ("data", "class"):
            for program, executable, rounds in compiled(name, axis, devices, options):
                text = executable.as_text()
                if options.keep:
                    (options.keep / f"{name}-{axis}-{program.split()[0]}-{devices}.txt").write_text(text)
                cost, once = Module(text, rounds).cost(), executable.cost_analysis()
                entry = {"flops": cost.flops, "bytes": cost.bytes, "told": cost.told, "rounds": rounds}
                entry |= {f"{k.split()[0]}_bodies_once": once.get(k, 0.0) for k in ("flops", "bytes accessed")}
                found.setdefault(name, {}).setdefault(axis, {})[program.split()[0]] = entry
                print(devices, name, axis, program, f"{cost.flops:.3g} {cost.bytes:.3g}", file=sys.stderr, flush=True)
    return found


def growth(by_devices: dict[int, dict[str, Any]], options: Options) -> dict[str, Any]:
    """What all devices do together over what one does, for every program of every method along every axis."""
    programs: dict[str, Any] = {}
    first = min(by_devices)
    steps = -(-options.images // options.batch_size)
    wholes = {"fit": {"embed": steps, "update": steps, "finalize": 1}, "scoring": {"embed": 1, "score": 1}}
    for name, axes in by_devices[first].items():
        for axis, entries in axes.items():
            programs.setdefault(name, {})[axis] = made = {}
            for program in entries:
                of = {n: found[name][axis][program] for n, found in by_devices.items()}
                together = {k: {n: n * e[k] for n, e in of.items()} for k in ("flops", "bytes")}
                ratio = {k: {n: v / (per[first] or 1) for n, v in per.items()} for k, per in together.items()}
                made[program] = together | {
                    "growth": ratio,
                    "told_by_a_device": {n: e["told"] for n, e in of.items() if e["told"]},
                    "rounds": of[first]["rounds"],
                    "one_device_with_bodies_once": {k: of[first][f"{k}_bodies_once"] for k in ("flops", "bytes")},
                }
            for whole, parts in wholes.items():
                sums = {
                    k: {n: sum(times * made[p][k][n] for p, times in parts.items()) for n in by_devices}
                    for k in ("flops", "bytes")
                }
                ratio = {k: {n: v / per[first] for n, v in per.items()} for k, per in sums.items()}
                within = all(v <= GOAL for per in ratio.values() for v in per.values())
                made[whole] = sums | {"growth": ratio, "within_goal": within}
    return programs


def apart(devices: int, options: Options) -> dict[str, Any]:
    """`measure` in a process of its own with so many virtual devices."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", str(devices)]
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main(options: Options) -> None:
    """Compiles for every number of devices and writes results/bench_scaling.json."""
    options = small(options) if options.smoke else options
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return
    run = measure if options.smoke else apart
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
    most = max(options.devices)
    for name, axes in programs.items():
        for axis, entries in axes.items():
            parts = (
                f"{p} {e['growth']['flops'][most]:.2f}/{e['growth']['bytes'][most]:.2f}" for p, e in entries.items()
            )
            print(f"{name} on {most} devices along {axis}, growth of flops/bytes: {', '.join(parts)}")


if __name__ == "__main__":
    start(main, Options)
