"""What a compiled program costs one device: floating point operations, memory traffic and communication.

Operations and bytes are those of XLA's cost analysis, with three corrections. XLA counts the body of a loop once: here
each body is analyzed apart and multiplied by its number of rounds, which XLA knows (`known_trip_count`) or the caller
gives. XLA does not count library calls: the operations of LAPACK and the operands and results of all calls are added.
XLA counts the whole operand of a fusion that only cuts a slice out of it: here the slice counts, since the all-to-all
of the CPU consists of such slices.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jaxlib import _hlo, _jax  # pyright: ignore[reportAttributeAccessIssue]

OPERATIONS = {
    "lapack_spotrf_ffi": lambda n, m: n**3 / 3,
    "lapack_strsm_ffi": lambda n, m: n * n * m,
    "lapack_sgeqrf_ffi": lambda n, m: 2 * m * m * (n - m / 3),
    "lapack_sorgqr_ffi": lambda n, m: 2 * m * m * (n - m / 3),
}
"""Floating point operations of library calls, by the last two sizes of the result."""


class Cost(NamedTuple):
    """What a program costs one device."""

    flops: float
    bytes: float
    communication: Counter[str]
    """How often each kind of message is sent."""

    def __add__(self, other: Any) -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.communication + other.communication)

    def times(self, n: float) -> "Cost":
        """The cost of running it n times."""
        messages = Counter({k: n * v for k, v in self.communication.items()})
        return Cost(n * self.flops, n * self.bytes, messages)


class Module:
    """The text of a compiled program, and the costs of its parts.

    Args:
        text: What `compiled.as_text()` returns.
        rounds: Rounds of the loops whose number depends on data: of the outermost, of those inside it, and so on.
    """

    START = re.compile(r"^(?:ENTRY )?%([\w.-]+) \(.*\{$", re.MULTILINE)

    def __init__(self, text: str, rounds: tuple[float, ...]) -> None:
        self._rounds = rounds
        text = re.sub(r", metadata=\{[^}]*\}", "", text)
        starts = list(self.START.finditer(text))
        ends = [start.start() for start in starts[1:]] + [len(text)]
        self._parts = {s[1]: text[s.start() : end].removeprefix("ENTRY ") for s, end in zip(starts, ends, strict=True)}
        self._entry = next(s[1] for s in starts if s[0].startswith("ENTRY"))
        self._without_loops = functools.cache(self._analyze)

    def cost(self) -> Cost:
        """The cost of the whole program, loops multiplied out."""
        return self._total(self._entry, 0)

    def _total(self, name: str, depth: int) -> Cost:
        total = self._without_loops(name)
        for loop, body in self._loops(name):
            known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop)
            rounds = float(known[1]) if known else self._rounds[depth]
            total = total + self._total(body, depth + (not known)).times(rounds)
        return total

    def _loops(self, name: str) -> Iterator[tuple[str, str]]:
        """The loops of a part and of the parts that it calls: the line of each, and the name of its body."""
        for line in self._parts[name].splitlines():
            if " while(" in line:
                yield line, _named("body", line)
            elif " call(" in line:
                yield from self._loops(_named("to_apply", line))

    def _analyze(self, name: str) -> Cost:
        """The cost of a part without the bodies of its loops."""
        marked = [("ENTRY " if part == name else "") + text for part, text in self._parts.items()]
        module = _hlo.hlo_module_from_text("HloModule part\n\n" + "".join(marked))
        counted = _jax.hlo_module_cost_analysis(jax.devices()[0].client, module)
        cost = Cost(counted.get("flops", 0.0), counted.get("bytes accessed", 0.0), Counter()) + self._uncounted(name)
        for _, body in self._loops(name):  # XLA has counted each once, with the loops inside it
            flops, moved = self._inside(body)
            cost = Cost(cost.flops - flops, cost.bytes - moved, cost.communication)
        return cost

    def _inside(self, name: str) -> tuple[float, float]:
        """Operations and bytes that XLA counts for a part: bodies of loops once, no library calls."""
        cost, extra = self._without_loops(name), self._uncounted(name)
        inner = [self._inside(body) for _, body in self._loops(name)]
        return cost.flops - extra.flops + sum(f for f, _ in inner), cost.bytes - extra.bytes + sum(b for _, b in inner)

    def _uncounted(self, name: str) -> Cost:
        """The cost of library calls and communication, and the correction for slices."""
        flops, moved, communication = 0.0, 0.0, Counter()
        sizes: dict[str, int] = {}
        for line in self._parts[name].splitlines():
            match = re.match(r"  (?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)", line)
            if not match:
                continue
            result, types, kind, operands = match.groups()
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
                communication[f"{kind} {' '.join(f'{t}{list(s)}' for t, s in shapes)}, {sizes[result]} bytes"] += 1
            elif kind == "call":
                inner = self._uncounted(_named("to_apply", line))
                flops, moved = flops + inner.flops, moved + inner.bytes
                communication += inner.communication
        return Cost(flops, moved, communication)

    def _copies_a_slice(self, name: str) -> bool:
        """Whether a fusion only rearranges its operand and cuts a slice out of it."""
        operations = re.findall(r"= \S+ ([\w-]+)\(%?([\w.-]+)", self._parts[name])
        slices = [operand for kind, operand in operations if kind == "slice"]
        rearranging = {"parameter", "bitcast", "convert", "copy", "transpose", "slice"}
        only = {kind for kind, _ in operations} <= rearranging
        return len(slices) == 1 and not slices[0].startswith("param") and only


def _named(attribute: str, line: str) -> str:
    """The name of the part that an attribute of an operation refers to."""
    match = re.search(rf"{attribute}=%([\w.-]+)", line)
    assert match
    return match[1]


def _bytes(kind: str, shape: tuple[int, ...]) -> int:
    bits = re.sub(r"^\D+", "", kind)
    return math.prod(shape) * (int(bits) // 8 if bits else 1)
