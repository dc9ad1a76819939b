"""Checks of values that come from files: what a value must be is said once, as nested checks.

A check is a function (value, where): it raises a ValueError that begins with `where` if the value is not what it must
be. Numbers are finite and fit into float32, strings are short and without NUL.
"""

import reprlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

Check = Callable[[Any, str], None]
LARGEST = 3.4e38
LONGEST = 1 << 20
DEEPEST = 16
"""Levels of nesting that JSON may have."""


def number(low: float = -LARGEST, high: float = LARGEST, *, whole: bool = False) -> Check:
    """A number in [low, high]; `whole`: an integer."""
    types, kind = ((int,), "whole number") if whole else ((int, float), "number")

    def check(value: Any, where: str) -> None:
        if isinstance(value, bool) or not isinstance(value, types) or not low <= value <= high:
            _fail(value, where, f"a {kind} in [{low:g}, {high:g}]")

    return check


def count(low: int = 0) -> Check:
    """An integer from `low` on that arrays can have as a length."""
    return number(low, 1e15, whole=True)


def text(*choices: str) -> Check:
    """A string; one of the choices if there are any."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, str) or len(value) > LONGEST or "\0" in value:
            _fail(value, where, "text")
        if choices and value not in choices:
            _fail(value, where, f"one of {', '.join(choices)}")

    return check


def flag(value: Any, where: str) -> None:
    """True or false."""
    if not isinstance(value, bool):
        _fail(value, where, "true or false")


def optional(check: Check) -> Check:
    """Null, or what `check` accepts."""
    return lambda value, where: None if value is None else check(value, where)


def items(check: Check, least: int = 0, most: int = 1_000_000) -> Check:
    """A list of `least` to `most` such values."""

    def check_all(value: Any, where: str) -> None:
        if not isinstance(value, list) or not least <= len(value) <= most:
            _fail(value, where, f"a list of {least} values" if least == most else f"a list of {least} to {most} values")
        for i, item in enumerate(value):
            check(item, f"{where}[{i}]")

    return check_all


def mapping(check: Check) -> Check:
    """An object of any names and such values."""

    def check_all(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            _fail(value, where, "an object")
        for name, item in value.items():
            check(item, f"{where}.{name}")

    return check_all


def record(
    required: Mapping[str, Check], others: Mapping[str, Check] = MappingProxyType({}), *, closed: bool = True
) -> Check:
    """An object with these fields, and any of the `others`; with `closed` no field beyond them."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            _fail(value, where, "an object")
        missing, unknown = required.keys() - value.keys(), value.keys() - required.keys() - others.keys()
        if missing:
            raise ValueError(f"{where} lacks {', '.join(sorted(missing))}")
        if unknown and closed:
            raise ValueError(f"{where} must not have {', '.join(sorted(unknown))}")
        for name in value.keys() - unknown:
            (required.get(name) or others[name])(value[name], f"{where}.{name}")

    return check


def shallow(value: Any, where: str) -> None:
    """Any JSON value that is nested no deeper than `DEEPEST` levels."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    if level:
        raise ValueError(f"{where} must be nested no deeper than {DEEPEST} levels")


def _fail(value: Any, where: str, rule: str) -> None:
    raise ValueError(f"{where} must be {rule}, got {reprlib.repr(value)}")
