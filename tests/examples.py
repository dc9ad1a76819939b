"""Examples that `make test` leaves to `make test-all`."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_after(n: int, examples: Iterable[Any]) -> list:
    """All examples of a test; those after the first n run only in `make test-all`."""
    parts = [example if isinstance(example, tuple) else (example,) for example in examples]
    return [pytest.param(*part, marks=pytest.mark.slow if i >= n else ()) for i, part in enumerate(parts)]
