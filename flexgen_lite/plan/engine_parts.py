"""Which CPUs and which GPU each of several engines of a machine has. Pure logic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.plan.plan import PlanError
from flexgen_lite.plan.topology import Core, Topology


@dataclass(frozen=True, slots=True)
class EnginePart:
    """
    Attributes:
        number: of the engine, from 0.
        cpus: that are its own.
        device: as the configuration names it.
    """

    number: int
    cpus: tuple[int, ...]
    device: str


def num_engines(config: EngineConfig, topology: Topology) -> int:
    """Raises PlanError where there cannot be as many as are asked for."""
    gpus = _gpus(config, topology)
    count = (gpus or len(topology.nodes)) if config.engines == "auto" else int(config.engines)
    if count > topology.num_cpus:
        raise PlanError(
            f"engines={count} is more than there are CPUs to share, {topology.num_cpus}: lower engines, or give auto"
        )
    if gpus is not None and count > gpus:
        raise PlanError(
            f"engines={count} is more than there are GPUs, {gpus}, and each engine needs one of its own: lower "
            "engines, or give auto, or device cpu"
        )
    return count


def engine_parts(config: EngineConfig, topology: Topology, count: int) -> list[EnginePart]:
    """The CPUs in as many parts, and a GPU for each where there are any: one of its own node, as far as there are."""
    parts = _cpu_sets(topology, count)
    on_gpu = _gpus(config, topology) is not None
    devices = [f"cuda:{gpu}" for gpu in _gpu_of_each(parts, topology)] if on_gpu else ["cpu"] * count
    return [EnginePart(number, cpus, devices[number]) for number, cpus in enumerate(parts)]


def cpus_text(cpus: Sequence[int]) -> str:
    """As the system lists them: "0-3, 8"."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _gpus(config: EngineConfig, topology: Topology) -> int | None:
    """How many there are for engines; None where products are computed on the CPU."""
    if config.device == "cpu" or (config.device == "auto" and not topology.gpus):
        return None
    return len(topology.gpus)


def _gpu_of_each(parts: Sequence[Sequence[int]], topology: Topology) -> list[int]:
    """Its number, for each part."""
    nodes = [{cpu for core in node for cpu in core} for node in topology.nodes]
    near = [{place for place, node in enumerate(nodes) if node & set(part)} for part in parts]
    free, found = dict(enumerate(topology.gpus)), dict[int, int]()
    for part in sorted(range(len(parts)), key=lambda part: len(near[part])):  # those with little choice first
        if (gpu := next((gpu for gpu, node in free.items() if node in near[part]), None)) is not None:
            found[part] = gpu
            del free[gpu]
    others = iter(free)
    return [found[part] if part in found else next(others) for part in range(len(parts))]


def _cpu_sets(topology: Topology, count: int) -> list[tuple[int, ...]]:
    """Whole NUMA nodes, or parts of one each, where that comes out even; else runs of cores, and of CPUs where there
    are fewer cores."""
    nodes = topology.nodes
    if len(nodes) % count == 0:
        each = len(nodes) // count
        groups = [[core for node in nodes[i * each : (i + 1) * each] for core in node] for i in range(count)]
    elif count % len(nodes) == 0 and all(len(node) >= count // len(nodes) for node in nodes):
        groups = [group for node in nodes for group in _runs(node, count // len(nodes))]
    else:
        cores = [core for node in nodes for core in node]
        if len(cores) < count:
            cores = [(cpu,) for core in cores for cpu in core]
        groups = _runs(cores, count)
    return [tuple(sorted(cpu for core in group for cpu in core)) for group in groups]


def _runs(cores: Sequence[Core], count: int) -> list[list[Core]]:
    """As many runs of cores, whose lengths differ by one at most."""
    bounds = [len(cores) * i // count for i in range(count + 1)]
    return [list(cores[first:last]) for first, last in pairwise(bounds)]
