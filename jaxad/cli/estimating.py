"""How much memory a fit needs: `jaxad estimate`."""

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
from rich.table import Column, Table

from jaxad.cli.listing import print_table
from jaxad.cli.options import (
    EstimateData,
    settings_of,
)
from jaxad.data import open_data
from jaxad.data.dataset import check_normals
from jaxad.driver import memory
from jaxad.driver.execution import Execution
from jaxad.driver.plan import Plan, size
from jaxad.interruption import undoing
from jaxad.learning import abstract_frozen, load_frozen, shortage
from jaxad.progress import say
from jaxad.runs.fitting import plan_all
from jaxad.settings import Settings

PLAN_COLUMNS = ("weights", "state", "images", "temporaries", "each device", "host")
"""What `jaxad estimate` prints of every program."""


def estimate(argv: list[str], data: EstimateData, options: dict[str, Any], hyperparameters: dict[str, Any]) -> None:
    """Print how much memory a fit needs, without fitting."""
    settings = settings_of(data.method, data.preset, options | hyperparameters)
    opened = open_data(data.data, category=data.category, preprocess=settings.preprocess, group_by=data.group_by)
    check_normals(*(split.train for split in opened.values()))
    try:
        frozen = load_frozen(settings)
    except FileNotFoundError:
        if any(settings.weights):
            raise
        frozen = abstract_frozen(settings)
    if data.devices > jax.device_count():
        say(f"{jax.device_count()} of {data.devices} devices are here: compiling for virtual ones on the CPU")
        _on_virtual_devices(data.devices, ["estimate", *argv])
        return
    trains = {category: split.train for category, split in opened.items()}
    execution = Execution(classes_per_step=data.classes_per_step)
    options = dict(frozen=frozen, unified=data.unified, devices=data.devices, execution=execution)
    for plan in plan_all(settings, trains, **options):
        _print_plan(plan, settings)


def _on_virtual_devices(devices: int, argv: Sequence[str]) -> None:
    """Runs a command in another process, with that many virtual devices of the CPU."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
    command = [sys.executable, "-m", "jaxad", *argv]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    with undoing(process.kill):
        print(process.communicate()[0], end="")
    if process.returncode:
        sys.exit(process.returncode)


def _print_plan(plan: Plan, settings: Settings) -> None:
    """The table of what is in memory while each program runs, and what follows from it."""
    virtual = plan.shared and len(plan.devices) > 1
    table = Table("while this runs", *(Column(name, justify="right") for name in PLAN_COLUMNS))
    for need in plan.needs:
        parts = (need.weights, need.state, need.batch, need.temporaries, need.device, need.host)
        table.add_row(need.name, *map(size, parts), style="bold" if need is plan.peak else None)
    table.add_section()
    table.add_row("the model", "", size(plan.model), "", "", size(plan.model), "")
    print_table(table)
    peak, free = plan.peak, memory.available(plan.devices)
    place = "device and host together" if plan.shared and not virtual else f"on each of {len(plan.devices)} devices"
    print(f'most: {size(peak.device if virtual else plan.total(peak))} while "{peak.name}" runs, {place}')
    print(f"host: up to {size(max(need.host for need in plan.needs))}, and {size(plan.checkpoint)} for a checkpoint")
    if virtual:
        print("virtual devices on the CPU: an accelerator may pad arrays and need other temporaries")
    elif free is not None:
        lacking = shortage(settings, plan)
        print(lacking or f"it fits: {free.owner} has {size(free.free + plan.loaded)} for it")
