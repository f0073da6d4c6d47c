"""How much memory is left for this process, on a device or in the machine and its containers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

# Where the system does not say how much memory it has.
ASSUMED_MEMORY = 4 << 30


def free_memory(device: torch.device) -> int:
    """Bytes that a device has left for this process, what torch keeps in reserve included."""
    if device.type != "cuda":
        return available_memory()
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory left for this process: the machine's, or fewer where a control group (a container) has less.

    root: where proc and sys lie.
    """
    return min([_machine_memory(root), *_control_group_memory(root)])


def _machine_memory(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not a Unix, or one that does not say
        return ASSUMED_MEMORY


def _control_group_memory(root: Path) -> Iterator[int]:
    """What each control group that this process is in leaves of its limit; pages of files can be had back."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # The limits of all groups above hold too. Inside a container the path may be one of the host; its own group
        # is the mount then.
        group = mount / path.lstrip("/")
        while group.is_relative_to(mount):
            left = _left(group, *names)
            if left is not None:
                yield left
            if group == mount:
                break
            group = group.parent


def _left(group: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    """Limit less usage of one control group; None where there is no limit."""
    try:
        limit = (group / limit_name).read_text().strip()
        used = int((group / usage_name).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(int(limit) - used + int(statistics.get(cache_name, 0)), 0) if limit != "max" else None
    except (OSError, ValueError):
        return None
