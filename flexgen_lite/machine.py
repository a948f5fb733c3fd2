"""What this machine offers: processors and memory, cgroup limits respected. Standard library only."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Machine:
    cpus: tuple[int, ...]  # that this process may use
    available_ram: int  # bytes that could be taken now without pushing others out
    numa_nodes: int

    @property
    def num_cpus(self) -> int:
        return len(self.cpus)


def inspect_machine() -> Machine:
    cpus = (
        tuple(sorted(os.sched_getaffinity(0)))
        if hasattr(os, "sched_getaffinity")
        else tuple(range(os.cpu_count() or 1))
    )
    nodes = sum(1 for _ in Path("/sys/devices/system/node").glob("node[0-9]*")) or 1
    free_in_cgroup = cgroup_free_bytes()
    available = _available_bytes()
    return Machine(cpus, available if free_in_cgroup is None else min(available, free_in_cgroup), nodes)


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def cgroup_free_bytes() -> int | None:
    """Bytes left in the tightest memory cgroup that this process is in; None where there is no limit."""
    free: int | None = None
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit_name, usage_name = CGROUP_ROOT, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit_name, usage_name = CGROUP_ROOT / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = root / path.lstrip("/")
        for place in (folder, *folder.parents):
            limit, usage = _read_int(place / limit_name), _read_int(place / usage_name)
            if limit is not None and usage is not None and limit < 1 << 60:
                free = limit - usage if free is None else min(free, limit - usage)
            if place == root:
                break
    return free


def _read_int(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
