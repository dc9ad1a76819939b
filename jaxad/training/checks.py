"""Range checks of hyperparameters."""

import math


def at_least_one(**counts: int) -> None:
    """Raises ValueError for the first count below 1."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")


def above_zero(**values: float) -> None:
    """Raises ValueError for the first number that is not above 0 or not finite."""
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be above 0, got {value}")


def zero_or_more(**values: float) -> None:
    """Raises ValueError for the first number that is below 0 or not finite."""
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be 0 or more, got {value}")


def multiples_of(step: int, **sizes: tuple[int, int]) -> None:
    """Raises ValueError for the first size (height, width) with a side that is no positive multiple of `step`."""
    for name, size in sizes.items():
        if any(side < 1 or side % step for side in size):
            raise ValueError(f"{name} must be multiples of {step}, got {size}")
