"""Memory that processes on this machine can still take: what the kernel calls available, within the limits of cgroups.

psutil knows the machine; the limits of the container that a process is in are read here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

# (controller in /proc/self/cgroup, limit, usage, reclaimable line of memory.stat) of cgroups v2 and v1.
V2 = ("", "memory.max", "memory.current", "inactive_file")
V1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_bytes(root: Path = Path("/")) -> int:
    """Bytes that can be allocated before the system or the container kills something. root: of the cgroups, for tests."""
    free = int(psutil.virtual_memory().available)
    for folder, (_, limit, usage, reclaimable) in _cgroups(root):
        try:
            bound = (folder / limit).read_text().strip()
            used = int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue  # the root group has no limit, and containers hide some files
        if bound.isdigit():  # v2 writes `max` for none
            free = min(free, int(bound) - used + int(stat.get(reclaimable, 0)))
    return max(free, 0)


def _cgroups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str, str]]]:
    """The folders of this process's memory cgroups and of those above them: each may set a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        version = V2 if not controllers else V1
        if version[0] not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / version[0]
        group = mount / path.lstrip("/")
        while True:
            yield group, version
            if group == mount or mount not in group.parents:
                break
            group = group.parent
