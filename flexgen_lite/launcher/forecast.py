"""What a job would take on an engine that is not started: the plan that it would have, and its passes simulated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.cost.job import JobRequest, JobTime, predict
from flexgen_lite.cost.kinds import OUTSIDE, layer_kinds
from flexgen_lite.cost.pass_work import Work
from flexgen_lite.cost.rates import Rates
from flexgen_lite.cost.simulator import Simulator
from flexgen_lite.engine.calibration import Calibration
from flexgen_lite.engine.setup import Setup, set_up
from flexgen_lite.model.spec import ModelSpec
from flexgen_lite.plan.disk_rate import read_rate
from flexgen_lite.plan.machine import Machine
from flexgen_lite.plan.plan import PlanError
from flexgen_lite.plan.workload import Workload

DISK_SECONDS = 1.0
TWICE = 2
FAST_DISK = 3e9  # bytes per second
CREDIT_OF_GPU = 2  # segments that a GPU takes at a time, one of which runs


@dataclass(frozen=True, slots=True)
class Variant:
    """What would be changed, and what it would come to.

    Attributes:
        job: None where it cannot be.
        problem: why it cannot.
    """

    name: str
    job: JobTime | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Forecast:
    """
    Attributes:
        job: None where there are no requests.
        disk: bytes per second that it was made for; 0: the disk plays no part.
    """

    setup: Setup
    job: JobTime | None
    disk: float


class Forecaster:
    """
    Args:
        calibration: of the model with the config's settings.
        machine: that it is to run on.
        expected: what the engine is told of the work beforehand.
        requests: of the job; none: only the plan is asked for.
        disk: bytes per second that weights are read at; None: as when it was calibrated.
    """

    def __init__(
        self,
        calibration: Calibration,
        machine: Machine,
        expected: Workload | None,
        requests: Sequence[JobRequest],
        disk: float | None = None,
    ) -> None:
        self._calibration, self._machine = calibration, machine
        self._expected, self._requests = expected, requests
        spec = calibration.opened.spec
        rates = calibration.rates
        self._rates = rates if disk is None else with_disk(rates, spec, disk)

    def forecast(self, config: EngineConfig) -> Forecast:
        """Raises PlanError where the budget does not hold even the smallest plan."""
        return self._of(config, self._rates, self._requests)

    def _of(self, config: EngineConfig, rates: Rates, requests: Sequence[JobRequest]) -> Forecast:
        found = self._calibration
        setup = set_up(found.opened, config, self._machine, self._expected, found.processes)
        job = None
        if requests:
            work = Work(setup.spec, setup.plan, rates)
            credit = CREDIT_OF_GPU if found.opened.device_total_bytes else 1
            simulator = Simulator(setup.make_schedule(), work, rates, setup.plan.attention_workers, credit)
            job = predict(setup.make_batcher(False), simulator, requests, setup.plan.max_sequences)
        return Forecast(setup, job, rates.disk)

    def variants(self, config: EngineConfig, base: Forecast) -> list[Variant]:
        """What would change it."""
        ram, found = base.setup.plan.ram, []
        changes: list[tuple[str, dict[str, object], Rates]] = [
            ("twice the RAM", {"ram": TWICE * ram}, self._rates),
            ("half the RAM", {"ram": ram // TWICE}, self._rates),
        ]
        if base.setup.plan.layer_slots:
            faster = with_disk(self._rates, base.setup.spec, FAST_DISK)
            changes.append((f"a disk of {FAST_DISK / 1e9:g} GB/s", {}, faster))
        most = base.setup.plan.max_sequences
        changes.append(("twice the sequences at once", {"max_sequences": TWICE * most}, self._rates))
        for name, update, rates in changes:
            try:
                changed = self._of(config.model_copy(update=update), rates, self._requests)
            except PlanError as error:
                found.append(Variant(name, None, f"does not fit: {error}"))
            else:
                found.append(Variant(name, changed.job))
        shorter = [replace(one, generated=max(1, one.generated // TWICE)) for one in self._requests]
        if any(one.generated > 1 for one in self._requests):
            found.append(Variant("answers half as long", self._of(config, self._rates, shorter).job))
        return found


def with_disk(rates: Rates, spec: ModelSpec, disk: float) -> Rates:
    """Where it gives so many bytes per second."""
    read, converted = dict[int, int](), set[int]()
    for kind, unit in zip((*layer_kinds(spec), OUTSIDE), spec.units, strict=True):
        pieces = (piece.num_bytes for index in unit.converted for piece in unit.tensors[index].pieces)
        read[kind] = sum(extent.num_bytes for extent in unit.extents) + sum(pieces)
        if unit.converted:
            converted.add(kind)
    return rates.with_disk(disk, read, converted)


def disk_now(spec: ModelSpec) -> float | None:
    """Bytes per second of the weights' files; None where there are none."""
    return read_rate([Path(file) for file in spec.files], DISK_SECONDS)[0] if spec.files else None
