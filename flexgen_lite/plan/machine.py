"""What this machine offers: processors and memory, cgroup limits respected. Standard library only."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
CPUS = Path("/sys/devices/system/cpu")
NODES = Path("/sys/devices/system/node")


@dataclass(frozen=True, slots=True)
class Machine:
    cpus: tuple[int, ...]  # that this process may use
    available_ram: int  # bytes that could be taken now without pushing others out
    numa_nodes: int  # that have some of `cpus`
    quota: int | None = None  # processors' worth of time that the cgroup allows
    cores: int | None = None  # physical ones that `cpus` belong to, where known

    @property
    def num_threads(self) -> int:
        """Threads of arithmetic that pay: one per core. A second one on the same core shares its multipliers."""
        most = self.cores or len(self.cpus)
        return most if self.quota is None else max(1, min(most, self.quota))

    @property
    def cpus_text(self) -> str:
        return ", ".join(map(str, self.cpus))


def inspect_machine(cpus: Iterable[int] = (), engines: int = 1) -> Machine:
    """
    Args:
        cpus: that count; none: all that this process may use.
        engines: that share the time which the cgroup allows.
    """
    chosen = tuple(sorted(cpus)) or usable_cpus()
    free_in_cgroup = cgroup_free_bytes()
    available = _available_bytes()
    ram = available if free_in_cgroup is None else min(available, free_in_cgroup)
    quota = cpu_quota()
    share = None if quota is None else max(1, quota // engines)
    return Machine(chosen, ram, num_nodes(chosen), share, num_cores(chosen))


def usable_cpus() -> tuple[int, ...]:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def num_nodes(cpus: Iterable[int], folder: Path = NODES) -> int:
    """NUMA nodes that have some of `cpus`; 1 where the system does not say."""
    wanted = set(cpus)
    lists = (_read_text(path / "cpulist") for path in folder.glob("node[0-9]*"))
    return sum(1 for text in lists if wanted & _cpus_of(text)) or 1


def _cpus_of(text: str) -> set[int]:
    """Of a list such as "0-3,8"."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            found |= set(range(int(first), int(last or first) + 1))
    return found


def num_cores(cpus: Iterable[int], folder: Path = CPUS) -> int | None:
    """Physical cores that `cpus` belong to; None where the system does not say."""
    siblings = {_read_text(folder / f"cpu{cpu}" / "topology" / "thread_siblings_list").strip() for cpu in cpus}
    return None if "" in siblings else len(siblings)


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def cgroup_free_bytes() -> int | None:
    """Bytes left in the tightest memory cgroup that this process is in; None where there is no limit."""
    names = {"": ("memory.max", "memory.current"), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")}
    free = []
    for controller, (limit_name, usage_name) in names.items():
        for folder in _cgroup_folders(controller):
            limit, usage = _read_int(folder / limit_name), _read_int(folder / usage_name)
            if limit is not None and usage is not None and limit < 1 << 60:
                free.append(limit - usage)
    return min(free, default=None)


def cpu_quota() -> int | None:
    """Processors' worth of time that the tightest cgroup allows, rounded up; None where there is no limit."""
    quotas = []
    for folder in _cgroup_folders(""):
        fields = _read_text(folder / "cpu.max").split()
        if len(fields) == 2 and fields[0].isdigit():
            quotas.append(-(-int(fields[0]) // int(fields[1])))
    for folder in _cgroup_folders("cpu"):
        quota, period = _read_int(folder / "cpu.cfs_quota_us"), _read_int(folder / "cpu.cfs_period_us")
        if quota is not None and period:
            quotas.append(-(-quota // period))
    return min(quotas, default=None)


def _cgroup_folders(controller: str) -> list[Path]:
    """This process's cgroup of a version 1 controller (of version 2: ""), and its ancestors."""
    for line in _read_text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            root = CGROUP_ROOT / controller if controller else CGROUP_ROOT
            folder = root / path.lstrip("/")
            return [place for place in (folder, *folder.parents) if place.is_relative_to(root)]
    return []


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _read_int(path: Path) -> int | None:
    text = _read_text(path).strip()
    return int(text) if text.isdigit() else None
