"""How every experiment starts: its options from the command line, and one line for bad input."""

import sys
from collections.abc import Callable
from typing import Any

import tyro

from jaxad.cli import refused


def start(main: Callable[[Any], None], options: type) -> None:
    """Calls `main` with the options of the command line; for a ValueError or a missing file exits with 2."""
    try:
        main(tyro.cli(options))
    except (ValueError, OSError) as error:
        sys.exit(refused(error))
