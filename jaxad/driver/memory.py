"""Free and used memory of an accelerator, or of the machine and its container."""

import math
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Memory(NamedTuple):
    """The memory that a fit may use."""

    free: int
    """Free bytes: of the device with the least, or of the machine if the devices are CPUs."""
    owner: str
    """The name of the device, or "this machine"."""


def available(devices: Sequence[Any] | None = None) -> Memory | None:
    """The free memory of accelerators, or of the machine and its container if the devices are CPUs.

    Args:
        devices: The devices that will be used; None for the first device.

    Returns:
        The free memory, or None if it is unknown.
    """
    devices = devices or jax.devices()[:1]
    if devices[0].platform == "cpu":
        free = _free_on_machine()
        return None if free is None else Memory(free, "this machine")
    reports = [device.memory_stats() or {} for device in devices]
    free = [stats["bytes_limit"] - stats.get("bytes_in_use", 0) for stats in reports if "bytes_limit" in stats]
    return Memory(min(free), devices[0].device_kind) if free else None


def peak_bytes() -> int:
    """Peak memory so far, in bytes: of the accelerator if it reports it, else of this process."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _free_on_machine() -> int | None:
    """Bytes that this process may still allocate, limited by the kernel's free memory and by its control groups."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
        return math.prod(map(os.sysconf, names)) if set(names) <= os.sysconf_names.keys() else None
    meminfo = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}
    return max(0, min([meminfo["MemAvailable"] + meminfo.get("SwapFree", 0), *_free_in_cgroups()]))


def _free_in_cgroups(
    mount: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> Iterator[int]:
    """Bytes left below the memory limit of each control group of this process, not counting the page cache as used."""
    try:
        groups = [line.split(":", 2)[1:] for line in membership.read_text().splitlines()]
    except OSError:
        return
    for controllers, path in groups:
        is_version_1 = "memory" in controllers.split(",")
        if controllers and not is_version_1:
            continue
        root = mount / "memory" if is_version_1 else mount
        limit_file, usage_file, cache_entry = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if is_version_1
            else ("memory.max", "memory.current", "inactive_file")
        )
        inner = root / path.strip("/")
        for folder in {root, *(parent for parent in (inner, *inner.parents) if parent.is_relative_to(root))}:
            try:
                limit, usage = ((folder / name).read_text().strip() for name in (limit_file, usage_file))
                stats = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            if limit != "max":
                yield int(limit) - int(usage) + int(stats.get(cache_entry, 0))
