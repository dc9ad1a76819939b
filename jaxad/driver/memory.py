"""Memory that is free and memory that was used: of an accelerator, or of this machine and its containers."""

import math
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Memory(NamedTuple):
    """Memory that a fit may use."""

    free: int
    """Bytes: of the device that has least, or of the machine where devices are CPUs."""
    owner: str
    """Device or machine, in words."""


def available(devices: Sequence[Any] | None = None) -> Memory | None:
    """The memory that is free: of the devices where they have their own, else of this machine and its container.

    Args:
        devices: Those that will be used; None: the first.

    Returns:
        None where it is not known.
    """
    devices = devices or jax.devices()[:1]
    if devices[0].platform == "cpu":
        free = _machine()
        return None if free is None else Memory(free, "this machine")
    reports = [device.memory_stats() or {} for device in devices]
    free = [stats["bytes_limit"] - stats.get("bytes_in_use", 0) for stats in reports if "bytes_limit" in stats]
    return Memory(min(free), devices[0].device_kind) if free else None


def peak_bytes() -> int:
    """Most memory used so far: of the accelerator where it reports it, else of this process."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _machine() -> int | None:
    """Bytes that this process may still take: what the kernel could free, and what the limits of its groups leave."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
        return math.prod(map(os.sysconf, names)) if set(names) <= os.sysconf_names.keys() else None
    meminfo = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}
    return max(0, min([meminfo["MemAvailable"] + meminfo.get("SwapFree", 0), *_left_in_groups()]))


def _left_in_groups(
    mounted: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> Iterator[int]:
    """What each control group of this process has left of its limit; the page cache does not count as used."""
    try:
        groups = [line.split(":", 2)[1:] for line in membership.read_text().splitlines()]
    except OSError:
        return
    for controllers, path in groups:
        old = "memory" in controllers.split(",")
        if controllers and not old:
            continue
        root = mounted / "memory" if old else mounted
        limit, usage, cached = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if old
            else ("memory.max", "memory.current", "inactive_file")
        )
        inner = root / path.strip("/")
        for folder in {root, *(place for place in (inner, *inner.parents) if place.is_relative_to(root))}:
            try:
                most, used = ((folder / name).read_text().strip() for name in (limit, usage))
                stats = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            if most != "max":
                yield int(most) - int(used) + int(stats.get(cached, 0))
