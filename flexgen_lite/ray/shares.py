"""What part of a machine an actor and its engine get."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEFT_CPUS = 2  # of a machine, where it has them, for tasks: Ray's count, for engines compute on all
ENGINE_RAM = 0.95  # of the memory that Ray leaves to processes: what an actor's own process takes is not in it


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster, as Ray counts it. `memory`: bytes that processes may take, besides the object store."""

    cpus: float
    gpus: float = 0
    memory: float = 0


@dataclass(frozen=True, slots=True)
class Share:
    """
    Attributes:
        ray_cpus: that Ray keeps for each actor.
        ray_gpus: the same.
        engine_cpus: processors that each engine may use; None: its part of all that the machine has.
        actors_per_machine: that may meet on one.
        ram: bytes that each engine may take; None: nothing is known of the machines.
    """

    ray_cpus: float
    ray_gpus: float
    engine_cpus: int | None
    actors_per_machine: int
    ram: int | None

    def num_cpus(self, available: int) -> int:
        """Processors for one engine of a machine that has so many."""
        wanted = available // self.actors_per_machine if self.engine_cpus is None else self.engine_cpus
        return max(1, min(available, wanted))


def share_of(
    nodes: Sequence[Node], actors: int, num_cpus: float | None, num_gpus: float | None, with_gpu: bool
) -> Share:
    """
    Args:
        nodes: of the cluster.
        actors: the most that there will be.
        num_cpus, num_gpus: of each actor, where the user says so.
        with_gpu: the engine takes a GPU where there is one.

    Without the user's word Ray keeps so many processors for an actor that no further one has room on its machine, and
    two are left for what reads, writes and does other things to rows. The smallest machine counts.
    """
    if num_gpus is None:
        num_gpus = 1.0 if with_gpu and any(node.gpus >= 1 for node in nodes) else 0.0
    able = [node for node in nodes if node.cpus > 0 and node.gpus >= num_gpus]
    per_machine = max(1, math.ceil(actors / len(able))) if able else 1
    memory = min((node.memory for node in able), default=0.0)
    ram = int(memory * ENGINE_RAM / per_machine) or None
    if num_cpus is not None:
        return Share(num_cpus, num_gpus, max(1, int(num_cpus)), per_machine, ram)
    if num_gpus > 0:
        return Share(1.0, num_gpus, None, per_machine, ram)
    cpus = min((node.cpus for node in able), default=1.0)
    return Share(_kept(cpus, per_machine), num_gpus, None, per_machine, ram)


def _kept(cpus: float, actors: int) -> float:
    """Processors that Ray keeps for each of so many actors of a machine: a whole number, or a part of one."""
    enough, most = cpus // (actors + 1) + 1, (cpus - LEFT_CPUS) // actors
    return float(min(enough, most)) if most >= 1 else min(1.0, cpus / 2 / actors)
