"""How much memory this process's machine, or its container, has left."""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
_LIMIT_AND_USE = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
"""Files of cgroups v2 and v1."""
_RECLAIMABLE = ("inactive_file", "total_inactive_file")
"""Cached pages of files, which count as used and are given up first."""


def free_memory_bytes(cgroups: Path = CGROUPS) -> int:
    """Bytes that processes here can still take: of the machine, or of the container if that has a limit.

    Args:
        cgroups: Where the kernel shows the limits of the container.
    """
    free = int(psutil.virtual_memory().available)
    for limit, use, statistics in _LIMIT_AND_USE:
        try:
            most = (cgroups / limit).read_text("ascii").strip()
            used = int((cgroups / use).read_text("ascii"))
            kinds = dict(line.split() for line in (cgroups / statistics).read_text("ascii").splitlines())
        except (OSError, ValueError):
            continue
        if most != "max":
            cached = next((int(kinds[kind]) for kind in reversed(_RECLAIMABLE) if kind in kinds), 0)
            free = min(free, int(most) - used + cached)
    return max(0, free)
