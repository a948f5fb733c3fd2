"""How this machine's processors and GPUs are arranged, as far as this process may use them. Standard library only."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexgen_lite.plan.machine import CPUS

NODES = Path("/sys/devices/system/node")
GPUS = Path("/proc/driver/nvidia/gpus")
DEVICES = Path("/sys/bus/pci/devices")

Core = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Topology:
    """
    Attributes:
        nodes: NUMA nodes that have CPUs of ours: of each its physical cores, of each core its CPUs.
        gpus: that PyTorch sees: of each the place of its node in `nodes`; None where that is not known, or has none.
    """

    nodes: tuple[tuple[Core, ...], ...]
    gpus: tuple[int | None, ...] = ()

    @property
    def num_cpus(self) -> int:
        return sum(len(core) for node in self.nodes for core in node)


def inspect_topology(cpus: Path = CPUS, nodes: Path = NODES, gpus: Path = GPUS, devices: Path = DEVICES) -> Topology:
    """What the system tells: without NUMA nodes all CPUs are one, without cores each CPU is one."""
    ours = set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {
        cpu: tuple(sorted(ours & cpus_of(cpus / f"cpu{cpu}" / "topology" / "thread_siblings_list"))) for cpu in ours
    }
    folders = sorted(nodes.glob("node[0-9]*"), key=lambda folder: int(folder.name.removeprefix("node")))
    found = {folder: here for folder in folders if (here := ours & cpus_of(folder / "cpulist"))}
    if set().union(*found.values()) != ours:
        found = {nodes: ours}
    arranged = tuple(tuple(sorted({cores[cpu] or (cpu,) for cpu in node})) for node in found.values())
    addresses = visible_gpus(gpus, os.environ)
    return Topology(arranged, tuple(_node_of(address, devices, [*found]) for address in addresses))


def cpus_of(file: Path) -> set[int]:
    """As the system lists them: "0-3,8"; none where it does not."""
    listed = re.findall(r"(\d+)(?:-(\d+))?", _text_of(file))
    return {cpu for first, last in listed for cpu in range(int(first), int(last or first) + 1)}


def visible_gpus(folder: Path, environment: Mapping[str, str]) -> list[str | None]:
    """Those of NVIDIA that are there and visible, where PyTorch can use any: in CUDA's order, each by its PCI address,
    None where that is not known. To ask PyTorch would take seconds."""
    there = sorted(each.name for each in folder.glob("*")) if _torch_has_cuda() else []
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [*there]
    names = [name.strip() for name in visible.split(",")]
    first_bad = next((place for place, name in enumerate(names) if not name or name.startswith("-")), len(names))
    known = names[: min(len(there), first_bad)]  # as CUDA reads it
    return [_address_of(name, folder, there) for name in known]


def _address_of(name: str, folder: Path, there: Sequence[str]) -> str | None:
    """Of a GPU that is named by its number or by the beginning of its UUID."""
    if name.isdecimal():
        return there[int(name)] if int(name) < len(there) else None
    return next((address for address in there if f" {name}" in _text_of(folder / address / "information")), None)


def _node_of(address: str | None, devices: Path, nodes: Sequence[Path]) -> int | None:
    """The place among the nodes of the one that the device is attached to."""
    number = _text_of(devices / address / "numa_node").strip() if address else ""
    names = [node.name for node in nodes]
    return names.index(f"node{number}") if number and f"node{number}" in names else None


def _text_of(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text(encoding="utf-8", errors="replace")
    return ""


def _torch_has_cuda() -> bool:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return not importlib.metadata.version("torch").endswith("+cpu")
    return False
