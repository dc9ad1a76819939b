"""Examples that `make test` leaves to `make test-all`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_after(n: int, examples: Iterable[Any]) -> list:
    """All examples of a test; those after the first n run only in `make test-all`."""
    parts = [example if isinstance(example, tuple) else (example,) for example in examples]
    return [pytest.param(*part, marks=pytest.mark.slow if i >= n else ()) for i, part in enumerate(parts)]


def slow_outside(quick: Collection[str], names: Iterable[str]) -> list:
    """All names; those that are not quick run only in `make test-all`."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]
