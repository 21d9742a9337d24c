"""What the system allows this process: cores, and memory within its control groups.

Linux says both in files that macOS does not have; there the portable answer is taken. Memory is
counted the way the kernel decides: the smallest limit of all groups above the process holds.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from pathlib import Path

MEMORY_INFO = Path("/proc/meminfo")
OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
# (limit, usage, key of memory.stat with the file cache that is given back first) by version.
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def cores() -> int:
    """Processor cores that this process may use, 1 or more: by affinity, and by the time that its
    control groups are given (`docker run --cpus 2`)."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    found = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min([found, *map(math.ceil, group_cores())]))


def group_cores() -> list[float]:
    """Cores that every control group of this process with a limit may keep busy."""
    found = []
    for version, folder in _groups("cpu"):
        for group in (folder, *folder.parents):
            # "max" and -1 are no limit.
            with contextlib.suppress(OSError, ValueError):
                if version == 2:
                    quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
                else:
                    quota, period = (
                        (group / f"cpu.cfs_{name}_us").read_text(encoding="ascii")
                        for name in ("quota", "period")
                    )
                if int(quota) > 0:
                    found.append(int(quota) / int(period))
            if group in (GROUPS, GROUPS / "cpu"):
                break
    return found


def memory_info() -> dict[str, int]:
    """/proc/meminfo in bytes; empty where there is none (not Linux)."""
    try:
        lines = MEMORY_INFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}


def total_memory() -> int | None:
    """Bytes of memory that the machine has, or that its tightest control group allows."""
    found = [limit for limit, _ in group_memory()]
    if total := memory_info().get("MemTotal"):
        found.append(total)
    else:
        # macOS and other systems; a name that they do not know is a ValueError.
        with contextlib.suppress(ValueError, OSError, AttributeError):
            found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(found, default=None)


def group_memory() -> list[tuple[int, int]]:
    """(limit, used) in bytes of every control group with a limit that this process is in.

    Both versions of the interface are read. File cache that nobody uses is not counted as used:
    the kernel gives it back before it kills. In a container the groups above it cannot be seen.
    """
    found = []
    for version, folder in _groups("memory"):
        limit_file, usage_file, cache_key = _FILES[version]
        for group in (folder, *folder.parents):
            # "max" and other words are no number.
            with contextlib.suppress(OSError, ValueError):
                limit = int((group / limit_file).read_text(encoding="ascii"))
                used = int((group / usage_file).read_text(encoding="ascii"))
                found.append((limit, max(used - _cache(group, cache_key), 0)))
            if group in (GROUPS, GROUPS / "memory"):
                break
    total = memory_info().get("MemTotal")
    # Version 1 writes "no limit" as a number beyond all memory.
    return [pair for pair in found if total is None or pair[0] < total]


def _groups(controller: str) -> list[tuple[int, Path]]:
    """(version, folder) of this process's groups for "memory" or "cpu"."""
    try:
        lines = OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if number == "0" and not controllers:
            found.append((2, GROUPS / name.lstrip("/")))
        elif controller in controllers.split(","):
            found.append((1, GROUPS / controller / name.lstrip("/")))
    return found


def _cache(group: Path, key: str) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (group / "memory.stat").read_text(encoding="ascii").splitlines():
            if line.split()[0] == key:
                return int(line.split()[1])
    return 0


def available_memory() -> int | None:
    """Bytes that a new process can use (free, cache and swap, within the groups' limits).

    None where the system does not say (not Linux).
    """
    values = memory_info()
    if not values:
        return None
    free = values.get("MemAvailable", 0) + values.get("SwapFree", 0)
    return max(min([free, *(limit - used for limit, used in group_memory())]), 0)


def peak_memory(usage: int) -> int:
    """Bytes of a `ru_maxrss`, which Linux counts in KiB and macOS in bytes."""
    return usage if sys.platform == "darwin" else usage * 1024
