"""Free and used memory of an accelerator, or of the machine."""

import resource
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jaxad.host_memory import free_bytes


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
        free = free_bytes()
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
