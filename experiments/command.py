"""What all experiments share: their start, their progress, where results go and what a result says of its origin."""

import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

import jaxad
from jaxad.cli import refuse

ROOT = Path(__file__).resolve().parents[1]
"""The checkout, in which experiments run."""
RESULTS = ROOT / "experiments" / "results"


def start(main: Callable[[Any], None], options: type) -> None:
    """Calls `main` with the options of the command line; exits with 2 after a ValueError or a missing file."""
    beginning()
    try:
        main(tyro.cli(options))
    except (ValueError, OSError) as error:
        sys.exit(refuse(error))


def run_module(module: str, *arguments: str, **environment: str) -> Any:
    """Runs an experiment in a new process.

    Args:
        module: Its name, such as "experiments.bench.memory".
        arguments: The rest of its command line.
        environment: Variables to set.

    Returns:
        The last line that it prints, which is JSON.
    """
    command = [sys.executable, "-m", module, *arguments]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | environment)
    return json.loads(run.stdout.splitlines()[-1])


def command_line() -> str:
    """The command that started this process, as one types it in the root of the checkout."""
    spec = sys.modules["__main__"].__spec__
    program = [sys.argv[0]] if spec is None else ["-m", spec.name]
    return shlex.join(["python", *program, *sys.argv[1:]])


def machine() -> dict[str, Any]:
    """The device and the versions of the libraries that compute."""
    versions = {"jaxad": jaxad.__version__, "jax": jax.__version__, "numpy": np.__version__}
    return {"device": jax.devices()[0].device_kind, "versions": versions}


@functools.cache
def beginning() -> tuple[str | None, float]:
    """The commit and the load of the machine at the first call, which is at the start: both change in the hours after.

    The commit ends in "+" if code differs from it, and is None outside of a checkout.
    """
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    head = git(["git", "rev-parse", "HEAD"]) if shutil.which("git") else None
    if head is None or head.returncode:
        return None, os.getloadavg()[0]
    changed = git(["git", "diff", "--quiet", "HEAD", "--", "jaxad/*.py", "experiments/*.py"]).returncode
    return head.stdout.strip() + ("+" if changed else ""), os.getloadavg()[0]


def origin() -> dict[str, Any]:
    """The commit, the machine, the number of its CPU cores, its load at the start and now, and the command line."""
    commit, load = beginning()
    loads = {"start": load, "end": os.getloadavg()[0]}
    return {"commit": commit} | machine() | {"cores": os.cpu_count(), "load": loads, "command": command_line()}


def progress(unit: str = "images") -> Callable[[str, int, int], None]:
    """Shows one line on stderr, rewritten at every call, with the rate and the time left of the current phase."""
    current, started = "", 0.0

    def show(phase: str, done: int, total: int) -> None:
        nonlocal current, started
        if phase != current:
            current, started = phase, time.perf_counter()
        rate = done / (time.perf_counter() - started)
        left = f", {rate:.0f}/s, {(total - done) / rate:.0f} s left  " if done else ""
        end = "\n" if done == total else ""
        print(f"\r{phase} {done}/{total} {unit}{left}", end=end, file=sys.stderr, flush=True)

    return show
