"""The memory that this process may still allocate on its machine, and shares of it for threads."""

import contextlib
import math
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

FREE = 64 << 20
"""Bytes that a thread need not reserve."""

_condition = threading.Condition()
_reserved: list[int] = []


def free_bytes() -> int | None:
    """Bytes that this process may still allocate: of the machine, its control groups and its own limit; None: unknown.

    The limit is that of the address space (`ulimit -v`).
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
        return math.prod(map(os.sysconf, names)) if set(names) <= os.sysconf_names.keys() else None
    meminfo = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}
    machine = meminfo["MemAvailable"] + meminfo.get("SwapFree", 0)
    return max(0, min([machine, *_free_in_cgroups(), *_free_below_limit()]))


@contextlib.contextmanager
def reserved(n_bytes: int) -> Iterator[None]:
    """Waits until so many bytes fit, beside what other threads have reserved, into half of the free memory.

    Raises:
        MemoryError: They do not, even alone.
    """
    if n_bytes <= FREE:
        yield
        return
    with _condition:
        while (free := free_bytes()) is not None and sum(_reserved) + n_bytes > free / 2:
            if not _reserved:
                raise MemoryError(f"it takes {n_bytes / 1e9:.2g} GB, more than half of the free {free / 1e9:.2g} GB")
            _condition.wait()
        _reserved.append(n_bytes)
    try:
        yield
    finally:
        with _condition:
            _reserved.remove(n_bytes)
            _condition.notify_all()


def _free_below_limit() -> Iterator[int]:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        yield limit - int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


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
