"""Plans of several engines of a machine that map the same weights, within one budget. Pure logic.

What stays in main memory of the weights is there once; processes, workspace, exchange, KV cache, states and the ring
each engine has of its own. With N engines, R bytes for all and S bytes of weights that they share, each may plan with

    ram = (R + (N - 1) * S) / N        of which S are not its own:  N * (ram - S) + S = R

The first engine decides which layers stay, and with that S; the plans of all engines follow from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.memory.arena import LARGE_PAGE
from flexgen_lite.model.spec import ModelSpec
from flexgen_lite.plan.machine import Machine
from flexgen_lite.plan.need import Measured, Sharing, sizes_of_layers
from flexgen_lite.plan.plan import Plan, PlanError, RamError, make_plan
from flexgen_lite.plan.slots import shared_bytes
from flexgen_lite.plan.workload import Workload
from flexgen_lite.wire.engine_share import SharedWeights

IN_FRONT_BYTES = 128 << 20  # of the process in front of the engines, with the requests that it has


@dataclass(frozen=True, slots=True)
class Planner:
    """What plans of the engines of a machine have in common.

    Attributes:
        count: engines.
        ram: bytes that all of them together may take; IN_FRONT_BYTES are beside them.
        others: see `make_plan`.
    """

    config: EngineConfig
    spec: ModelSpec
    processes: Measured
    on_gpu: bool
    gpu_total: int
    expected: Workload | None
    count: int
    ram: int

    def plan(self, machine: Machine, weights: SharedWeights | None) -> Plan:
        """Of one engine. Raises PlanError where the budget does not hold all of them.

        Args:
            machine: the engine's part of it.
            weights: as the first engine decided; None: this is the first.
        """
        if self.count == 1:
            return self._make(machine, self.ram, None)
        made = self._decided(machine, self._decide(machine) if weights is None else weights)
        assert self.total([made] * self.count) <= self.ram, "the engines take more than there is"
        return made

    def plans(self, machines: Sequence[Machine]) -> list[Plan]:
        """Of all engines, one for each part of the machine. Raises PlanError."""
        first = self.plan(machines[0], None)
        weights = SharedWeights(first.resident_layers, first.shared_bytes)
        return [first, *(self.plan(machine, weights) for machine in machines[1:])]

    @staticmethod
    def total(plans: Sequence[Plan]) -> int:
        """Bytes of main memory that engines with these plans take together."""
        return sum(plan.planned_bytes - plan.shared_bytes for plan in plans) + plans[0].shared_bytes

    def _decide(self, machine: Machine) -> SharedWeights:
        """Which layers stay: as many as there is room for; all of them where the engines' rings would take more."""
        everything = self._shared_bytes(self.spec.num_layers)
        slots = self.config.layer_slots
        all_may_stay = slots is None or slots >= self.spec.num_layers
        try:
            made = self._searched(machine, everything)
            rings = self.count * made.layer_slots * made.layer_slot_bytes
            if all_may_stay and rings and made.shared_bytes + rings >= everything:
                made = self._all(machine, everything)
        except RamError as refusal:
            if not all_may_stay:
                raise
            try:
                made = self._all(machine, everything)
            except RamError as other:
                raise min(refusal, other, key=lambda error: error.enough) from None
        return SharedWeights(made.resident_layers, made.shared_bytes)

    def _searched(self, machine: Machine, everything: int) -> Plan:
        """That there is more room the more of the weights are shared is counted only as far as they are."""
        made = self._open(machine, everything)
        if made.shared_bytes >= everything:
            return made
        made = self._open(machine, self._shared_bytes(0))
        while (more := self._open(machine, made.shared_bytes)).shared_bytes > made.shared_bytes:
            made = more
        return made

    def _all(self, machine: Machine, everything: int) -> Plan:
        layers = tuple(range(self.spec.num_layers))
        return self._make(machine, self._ram(everything), Sharing(self.count, layers))

    def _open(self, machine: Machine, shared: int) -> Plan:
        """If at least so many bytes are shared it is within the budget."""
        return self._make(machine, self._ram(shared), Sharing(self.count))

    def _decided(self, machine: Machine, weights: SharedWeights) -> Plan:
        made = self._make(machine, self._ram(weights.num_bytes), Sharing(self.count, weights.resident_layers))
        if made.shared_bytes != weights.num_bytes:
            raise PlanError(
                f"the engines share {weights.num_bytes} bytes of weights, this one would have {made.shared_bytes}: "
                "give all of them the same settings and devices of one kind, or set engines=1"
            )
        return made

    def _ram(self, shared: int) -> int:
        """That one engine may plan with, where so many bytes are shared."""
        return (self.ram + (self.count - 1) * shared) // self.count

    def _make(self, machine: Machine, ram: int, sharing: Sharing | None) -> Plan:
        config = self.config.model_copy(update={"ram": ram})
        try:
            return make_plan(
                config, self.spec, machine, self.processes, self.on_gpu, self.gpu_total, self.expected, sharing
            )
        except RamError as error:
            if sharing is None:
                raise
            raise self._refusal(error, sharing) from None

    def _shared_bytes(self, num_layers: int) -> int:
        """At least, where so many layers stay."""
        each = sizes_of_layers(self.config, self.spec, self.on_gpu).without
        return shared_bytes(num_layers * each + self.spec.units[-1].num_bytes)

    def _refusal(self, error: RamError, sharing: Sharing) -> RamError:
        """Of the engines and the process in front, for want of what one of them needs."""
        shared = self._shared_bytes(len(sharing.resident or ())) - LARGE_PAGE
        return RamError(
            f"{self.spec.class_name} in {self.count} engines",
            self.count * (error.enough - shared) + shared + IN_FRONT_BYTES,
            self.ram + IN_FRONT_BYTES,
            f", or lower engines ({self.count}){error.remedies}",
        )
