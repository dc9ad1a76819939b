"""`jaxad list`: the methods by family, and the backbones; neither needs JAX."""

import itertools
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from jaxad import methods
from jaxad.backbones.store import available


def list_methods(argv: Sequence[str]) -> None:
    """Prints the methods with what they do and their papers, and the backbones."""
    if argv:
        if {"-h", "--help"} & set(argv):
            print("usage: jaxad list\n\nList the methods and backbones.")
            sys.exit(0)
        raise ValueError(f"jaxad list takes no options, got {' '.join(argv)}")
    table = Table("method", "what it does", "paper")
    descriptions = sorted(map(methods.describe, methods.names()), key=lambda one: (one.family, one.name))
    for family, members in itertools.groupby(descriptions, key=lambda one: one.family):
        table.add_section()
        table.add_row(f"[bold]{family}[/bold]")
        for description in members:
            table.add_row(description.name, description.summary, description.paper)
    print_table(table)
    weights = available()
    print(f"backbones: {', '.join(dict.fromkeys(one.name.partition('.')[0] for one in weights))}")
    here = [f"{one.name} ({one.state})" for one in weights if one.path]
    print(f"weights here: {', '.join(here) or 'none'}; `jaxad weights list` shows all")


def print_table(table: Table) -> None:
    """Prints a table to stdout, as wide as the terminal."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    with console.capture() as captured:  # of a pipe that is closed rich makes an exit code of its own
        console.print(table)
    print(captured.get(), end="")
