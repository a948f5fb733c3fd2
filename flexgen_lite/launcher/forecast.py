"""What a job would take on an engine that is not started: the plan that it would have, and its passes simulated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.cost.job import FOLLOWED_ROUNDS, SHARED_TOKENS, JobRequest, JobTime, predict
from flexgen_lite.cost.kinds import OUTSIDE, layer_kinds
from flexgen_lite.cost.pass_work import Work
from flexgen_lite.cost.rates import Rates
from flexgen_lite.cost.simulator import Simulator
from flexgen_lite.engine.calibration import Calibration
from flexgen_lite.engine.kv_setup import with_kv_on_disk
from flexgen_lite.engine.setup import Setup, set_up
from flexgen_lite.memory.kv_groups import pages_for
from flexgen_lite.memory.kv_layout import disk_slot_bytes
from flexgen_lite.model.spec import ModelSpec
from flexgen_lite.plan.machine import Machine
from flexgen_lite.plan.need import shares_prefixes
from flexgen_lite.plan.plan import PlanError
from flexgen_lite.plan.workload import Workload
from flexgen_lite.text.sizes import format_size

TWICE = 2
SHORTER = "answers half as long"  # which is another job
FAST_DISK = 3e9  # bytes per second
WORTH_SHARING = 0.2  # of a prompt, which others begin with as well
SOME = 1000  # requests, whose lengths are looked at
GIB = 1 << 30
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

    def forecast(self, config: EngineConfig, rounds: int = FOLLOWED_ROUNDS) -> Forecast:
        """Raises PlanError where the budget does not hold even the smallest plan. `rounds`: see cost/job.py."""
        return self._of(config, self._rates, self._requests, rounds)

    def of(self, config: EngineConfig, requests: Sequence[JobRequest]) -> Forecast:
        """Of other requests. Raises PlanError as `forecast` does."""
        return self._of(config, self._rates, requests)

    def _of(
        self,
        config: EngineConfig,
        rates: Rates,
        requests: Sequence[JobRequest],
        rounds: int = FOLLOWED_ROUNDS,
    ) -> Forecast:
        found = self._calibration
        setup = set_up(found.opened, config, self._machine, self._expected, found.processes)
        setup = with_kv_on_disk(setup, config, lanes=0)  # no file is opened
        job = None
        if requests:
            work = Work(setup.spec, setup.plan, rates, setup.kv_disk.slot_bytes if setup.kv_disk else 0)
            credit = CREDIT_OF_GPU if found.opened.device_total_bytes else 1
            simulator = Simulator(setup.make_schedule(), work, rates, setup.plan.attention_workers, credit)
            batcher, at_once = setup.make_batcher(config.prefix_caching), setup.plan.max_sequences
            job = predict(batcher, simulator, requests, at_once, rounds, longest_sequence(setup))
        return Forecast(setup, job, rates.disk)

    def variants(self, config: EngineConfig, settings: Mapping[str, int], base: Forecast) -> list[Variant]:
        """What would change it; each with `settings`, or without them where that is faster."""
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
        if self._may_share(config, base.setup):
            changes.append(("prefix caching", {"prefix_caching": True}, self._rates))
        if (room := self._kv_disk_worth_asking(config, base.setup)) is not None:
            changes.append((f"KV on disk (kv_disk {format_size(room)})", {"kv_disk": room}, self._rates))
        for name, update, rates in changes:
            found.append(self._variant(name, config, [{**settings, **update}, update], rates))
        shorter = [replace(one, generated=max(1, one.generated // TWICE)) for one in self._requests]
        if any(one.generated > 1 for one in self._requests):
            changed = self._of(config.model_copy(update=dict(settings)), self._rates, shorter)
            found.append(Variant(SHORTER, changed.job))
        return found

    def _may_share(self, config: EngineConfig, setup: Setup) -> bool:
        """Prompts begin alike, and do not share that yet."""
        shares = any(len(one.shared) * SHARED_TOKENS >= WORTH_SHARING * one.prompt for one in self._requests)
        spec = setup.spec
        return shares and shares_prefixes(True, spec) and not shares_prefixes(config.prefix_caching, spec)

    def _kv_disk_worth_asking(self, config: EngineConfig, setup: Setup) -> int | None:
        """Bytes that have room for all that may run at once, twice where half of them are for prefixes; None where it
        is set, or RAM has room for the whole lives of those."""
        plan, count = setup.plan, min(setup.plan.max_sequences, len(self._requests))
        some = self._requests[:SOME]
        wanted = sum(pages_for(plan.kv_groups, one.prompt + one.max_tokens) for one in some) * count / len(some)
        if config.kv_disk is not None or wanted <= plan.num_pages:
            return None
        room = plan.num_pages * disk_slot_bytes(setup.kv.page_bytes)
        room += plan.max_sequences * (setup.spec.state_bytes + disk_slot_bytes(setup.kv.page_bytes))
        room *= 2 if shares_prefixes(config.prefix_caching, setup.spec) else 1
        return -(-room // GIB) * GIB

    def _variant(
        self, name: str, config: EngineConfig, updates: Sequence[Mapping[str, object]], rates: Rates
    ) -> Variant:
        problem, jobs = "", []
        for update in updates:
            try:
                jobs.append(self._of(config.model_copy(update=dict(update)), rates, self._requests).job)
            except PlanError as error:
                problem = f"does not fit: {error}"
        best = min((job for job in jobs if job is not None), key=lambda job: job.seconds, default=None)
        return Variant(name, best, problem or "no request would be taken")


def longest_sequence(setup: Setup) -> int:
    """Tokens of the longest one that the engine takes: the model's, or what the KV cache holds."""
    return min(setup.spec.max_length, setup.kv_tokens)


def with_disk(rates: Rates, spec: ModelSpec, disk: float) -> Rates:
    """Where it gives so many bytes per second."""
    read, converted = dict[int, int](), set[int]()
    for kind, unit in zip((*layer_kinds(spec), OUTSIDE), spec.units, strict=True):
        pieces = (piece.num_bytes for index in unit.converted for piece in unit.tensors[index].pieces)
        read[kind] = sum(extent.num_bytes for extent in unit.extents) + sum(pieces)
        if unit.converted:
            converted.add(kind)
    return rates.with_disk(disk, read, converted)
