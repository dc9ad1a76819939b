"""Writes docs/parity.md: for every method, with what it was compared, and the largest relative errors.

python -m tests.parity.table
"""

import importlib
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from pathlib import Path

from jaxad.files import write_atomically
from tests.parity import golden

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "parity.md"
TOLERANCE = 1e-4
HEAD = """# Parity

Every method is compared with an implementation that is not jaxad's: the same inputs, the same weights, on one CPU. An
error is the largest difference as a share of the largest value; tests allow {tolerance} unless a footnote says
otherwise. Written by `python -m tests.parity.table` from the golden files of tests/parity, whose modules say what was
called.

| method | compared with | what, and the relative error |
|---|---|---|
"""


def errors(name: str) -> dict[str, float]:
    """The relative error of every quantity of a golden file.

    Raises:
        ValueError: jaxad does not give what the file holds, or in another shape.
    """
    file = golden.read(name)
    ours = _module(name).ours(file)
    if set(ours) != set(file.expected):
        raise ValueError(f"{name} must give {sorted(file.expected)}, got {sorted(ours)}")
    largest: dict[str, float] = {}
    for key, theirs in file.expected.items():
        quantity = key.partition("/")[0]
        error = golden.relative_error(ours[key], theirs)
        largest[quantity] = max(largest.get(quantity, 0.0), error)
    return largest


def tolerances(name: str) -> dict[str, tuple[float, str]]:
    """The quantities whose error may be larger than `TOLERANCE`: how large, and why."""
    return getattr(_module(name), "TOLERANCES", {})


def note(tolerance: float, reason: str) -> str:
    """The footnote of a quantity whose error may be larger."""
    return f"{reason}; {power(tolerance)} is allowed."


def start_of_row(name: str) -> str:
    """A row of the table up to the errors."""
    return f"| {name.replace('-', ', ', 1)} | {golden.read(name).reference} |"


def power(error: float) -> str:
    """The error to one digit, such as 2e-6."""
    return f"{error:.0e}".replace("e-0", "e-") if error else "0"


def document() -> str:
    """The page; compares everything."""
    rows, notes = [], []
    for name in golden.names():
        cells = []
        for quantity, error in errors(name).items():
            mark = ""
            if quantity in tolerances(name):
                notes.append(f"[^{len(notes) + 1}]: {note(*tolerances(name)[quantity])}")
                mark = f"[^{len(notes)}]"
            cells.append(f"{quantity} {power(error)}{mark}")
        rows.append(f"{start_of_row(name)} {', '.join(cells)} |\n")
    return HEAD.format(tolerance=power(TOLERANCE)) + "".join(rows) + "".join(f"\n{note}\n" for note in notes)


def _module(name: str):
    return importlib.import_module(f"tests.parity.{name.replace('-', '_')}")


if __name__ == "__main__":
    write_atomically(DOCUMENT, document())
