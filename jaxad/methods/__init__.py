"""The published methods by name. Every file here is a method, and holds a factory of the same name.

`jaxad.methods.padim` is the factory, whether its file has been imported or not. Files are imported on first use;
`names` and `describe` answer without JAX.
"""

import ast
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from jaxad.base import Method

    Factory = Callable[..., Method]

__all__ = ["METHODS", "Description", "describe", "factory", "names"]


class Description(NamedTuple):
    """What the docstring of a method's file says."""

    name: str
    title: str
    """The method's name as its paper writes it."""
    summary: str
    """The first sentence, behind the method's name and without the final period."""
    family: str
    """What groups methods in lists and tables: "features", "flows" ...; empty where the docstring names none."""
    paper: str
    """Title, venue, year and address."""


def names() -> tuple[str, ...]:
    """The names of all methods, sorted."""
    return tuple(sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py")))


def factory(name: str) -> "Factory":
    """Imports a method's file and returns its factory.

    Raises:
        ValueError: There is no such method; names similar ones.
    """
    _check(name)
    return getattr(importlib.import_module(f"{__name__}.{name}"), name)


def describe(name: str) -> Description:
    """Reads the docstring of a method's file without importing it.

    Raises:
        ValueError: There is no such method; names similar ones.
    """
    _check(name)
    source = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    text = ast.get_docstring(ast.parse(source)) or ""
    title, _, rest = " ".join(text.partition("\n\n")[0].split()).partition(": ")
    summary = rest.partition(". ")[0].removesuffix(".")
    return Description(name, title, summary, _section(text, "Family"), _section(text, "Paper").removesuffix("."))


def _check(name: str) -> None:
    known = names()
    if name not in known:
        import difflib

        near = difflib.get_close_matches(name, known, 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
        raise ValueError(f"no method is called {name!r}: {hint}")


def _section(text: str, heading: str) -> str:
    """The text behind a heading, up to the next line that is not indented."""
    match = re.search(rf"^{heading}: (.*(?:\n +.*)*)", text, re.MULTILINE)
    return " ".join(match[1].split()) if match else ""


class _Methods(Mapping[str, "Factory"]):
    """Name -> factory. Only indexing imports, and only the file of that name."""

    def __getitem__(self, name: str) -> "Factory":
        if name not in self:
            raise KeyError(name)
        return factory(name)

    def __contains__(self, name: object) -> bool:
        return name in names()

    def __iter__(self) -> Iterator[str]:
        return iter(names())

    def __len__(self) -> int:
        return len(names())

    def __repr__(self) -> str:
        return f"METHODS({', '.join(self)})"


METHODS: Mapping[str, "Factory"] = _Methods()
"""Name -> factory; iteration imports nothing, indexing imports the method's file."""


def __getattr__(name: str) -> Any:
    if name in names():
        return factory(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *names()})


class _Package(ModuleType):
    """This package. The import of a submodule binds its name here; to the factory, not to the module."""

    def __setattr__(self, name: str, value: Any) -> None:
        is_submodule = isinstance(value, ModuleType) and value.__name__ == f"{__name__}.{name}"
        super().__setattr__(name, getattr(value, name) if is_submodule else value)


sys.modules[__name__].__class__ = _Package
