"""How this machine's processors and GPUs are arranged, as far as this process may use them. Standard library only."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flexgen_lite.plan.machine import CPUS

NODES = Path("/sys/devices/system/node")
GPUS = Path("/proc/driver/nvidia/gpus")

Core = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Topology:
    """
    Attributes:
        nodes: NUMA nodes that have CPUs of ours: of each its physical cores, of each core its CPUs.
        gpus: that PyTorch sees.
    """

    nodes: tuple[tuple[Core, ...], ...]
    gpus: int = 0

    @property
    def num_cpus(self) -> int:
        return sum(len(core) for node in self.nodes for core in node)


def inspect_topology(cpus: Path = CPUS, nodes: Path = NODES, gpus: Path = GPUS) -> Topology:
    """What the system tells: without NUMA nodes all CPUs are one, without cores each CPU is one."""
    ours = set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {
        cpu: tuple(sorted(ours & cpus_of(cpus / f"cpu{cpu}" / "topology" / "thread_siblings_list"))) for cpu in ours
    }
    folders = sorted(nodes.glob("node[0-9]*"), key=lambda folder: int(folder.name.removeprefix("node")))
    found = [ours & cpus_of(folder / "cpulist") for folder in folders]
    if set().union(*found) != ours:
        found = [ours]
    arranged = tuple(tuple(sorted({cores[cpu] or (cpu,) for cpu in node})) for node in found if node)
    return Topology(arranged, num_gpus(gpus, os.environ))


def cpus_of(file: Path) -> set[int]:
    """As the system lists them: "0-3,8"; none where it does not."""
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", file.read_text(encoding="ascii")):
            found |= set(range(int(first), int(last or first) + 1))
    return found


def num_gpus(folder: Path, environment: Mapping[str, str]) -> int:
    """Those of NVIDIA that are there and visible, where PyTorch can use any; to ask it would take seconds."""
    there = len(list(folder.glob("*"))) if _torch_has_cuda() else 0
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return there
    names = [name.strip() for name in visible.split(",")]
    first_bad = next((place for place, name in enumerate(names) if not name or name.startswith("-")), len(names))
    return min(there, first_bad)  # as CUDA reads it


def _torch_has_cuda() -> bool:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return not importlib.metadata.version("torch").endswith("+cpu")
    return False
