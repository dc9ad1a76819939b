"""How every experiment starts, with one line for bad input, and what its result says of where it comes from."""

import os
import shlex
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tyro

import jaxad
from jaxad.cli import refused


def start(main: Callable[[Any], None], options: type) -> None:
    """Calls `main` with the options of the command line; for a ValueError or a missing file exits with 2."""
    try:
        main(tyro.cli(options))
    except (ValueError, OSError) as error:
        sys.exit(refused(error))


def machine() -> dict[str, Any]:
    """The device and the versions of what computes."""
    versions = {"jaxad": jaxad.__version__, "jax": jax.__version__, "numpy": np.__version__}
    return {"device": jax.devices()[0].device_kind, "versions": versions}


def origin() -> dict[str, Any]:
    """The machine, the cores of its host and the command line."""
    return machine() | {"cores": os.cpu_count(), "command": shlex.join(["python", *sys.argv])}
