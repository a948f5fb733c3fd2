"""Which of the alternatives that are allowed a job would be fastest with: each is measured once, then searched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexgen_lite.batch.file import BadLine, read_requests
from flexgen_lite.batch.lines import open_lines
from flexgen_lite.batch.result_row import RowsThere, request_id_of
from flexgen_lite.batch.shard import WHOLE, Shard
from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.cost.job import JobRequest
from flexgen_lite.engine.calibration import Calibration
from flexgen_lite.engine.setup import fingerprint_of
from flexgen_lite.errors import EngineError
from flexgen_lite.launcher import calibrate
from flexgen_lite.launcher.alternatives import Alternative, alternative
from flexgen_lite.launcher.forecast import Forecaster, Variant
from flexgen_lite.launcher.search import WORTH, Policy, rate_of, search
from flexgen_lite.plan.machine import Machine
from flexgen_lite.plan.workload import Workload

WORTH_OTHER_ANSWERS = 1.1  # times as fast


@dataclass(frozen=True, slots=True)
class Candidate:
    """An alternative that was measured, or the reason why it could not be."""

    alternative: Alternative
    calibration: Calibration | None
    error: Exception | None = None

    @property
    def fingerprint(self) -> str | None:
        """Of an engine with it."""
        if self.calibration is None:
            return None
        opened = self.calibration.opened
        return fingerprint_of(opened, self.alternative.config.stored_kv_dtype(opened.spec.dtype))


@dataclass(frozen=True, slots=True)
class JobAhead:
    """
    Attributes:
        expected: what the engine is told of it beforehand.
        disk: bytes per second that weights are read at; None: as when it was calibrated.
        machine: that it is to run on.
    """

    expected: Workload | None
    requests: Sequence[JobRequest]
    disk: float | None
    machine: Machine


@dataclass(frozen=True, slots=True)
class Prospect:
    """What a candidate comes to for a job, with the settings that are found for it; or why it comes to nothing."""

    alternative: Alternative
    forecaster: Forecaster | None
    policy: Policy | None
    error: Exception | None = None

    @property
    def rate(self) -> float:
        return rate_of(self.policy.forecast) if self.policy is not None else 0.0


@dataclass(frozen=True, slots=True)
class Choice:
    """
    Attributes:
        alternative: that is fastest.
        forecaster: with what was measured of it.
        policy: all settings that differ from what is configured, its own among them.
        rows: of the table of what would change the job; none where there was nothing to choose.
    """

    alternative: Alternative
    forecaster: Forecaster
    policy: Policy
    rows: tuple[Variant, ...]


def candidates(alternatives: Sequence[Alternative], on_log: Callable[[str], None]) -> list[Candidate]:
    """Measures those that never were. Where `cpu_projections: auto` may become "qkv", that counts as well if it was
    measured.

    Raises:
        EngineError: none could be.
    """
    found = []
    for number, one in enumerate(alternatives, start=1):
        named = f"{one} ({number} of {len(alternatives)})" if len(alternatives) > 1 else ""
        try:
            found.append(Candidate(one, calibrate.calibrated(one.config, on_log, named=named)))
        except EngineError as error:
            if not error.user_error:
                raise
            found.append(Candidate(one, None, error))
    first = found[0].error
    if first is not None and all(one.error for one in found):
        raise first
    beside = (_with_projections(one, alternatives[0].config) for one in found)
    asked = [one.config for one in alternatives]
    return found + [one for one in beside if one is not None and one.alternative.config not in asked]


def _with_projections(one: Candidate, configured: EngineConfig) -> Candidate | None:
    """The same with projections on the CPU, where that is free and known."""
    config = one.alternative.config
    asked = configured.cpu_projections != "auto" or "cpu_projections" in one.alternative.settings
    if asked or not calibrate.stages_weights(config):
        return None
    config = config.model_copy(update={"cpu_projections": "qkv"})
    known = calibrate.known(config)
    return None if known is None else Candidate(alternative(configured, config), known)


def prospects(measured: Sequence[Candidate], job: JobAhead, search_on_gpu: bool = True) -> list[Prospect]:
    """`search_on_gpu`: else the rules' choice stands there."""
    found = []
    for one in measured:
        if one.calibration is None:
            found.append(Prospect(one.alternative, None, None, one.error))
            continue
        config = one.alternative.config
        forecaster = Forecaster(one.calibration, job.machine, job.expected, job.requests, job.disk)
        try:
            if one.calibration.opened.device_total_bytes and not search_on_gpu:
                policy = Policy({}, forecaster.forecast(config), 1.0)
            else:
                policy = search(forecaster, config)
        except ValueError as error:
            found.append(Prospect(one.alternative, forecaster, None, error))
            continue
        found.append(Prospect(one.alternative, forecaster, policy))
    return found


def choose(found: Sequence[Prospect], beside: Sequence[Prospect] = ()) -> Choice:
    """The fastest of those that are faster than what is configured by more than predictions are worth, or other answers
    are.

    Args:
        found: the first is what is configured.
        beside: others that are told of, and not chosen.

    Raises:
        PlanError, ValueError: the job cannot be done with any of them.
        EngineError: what is configured could not be measured, and no other will do.
    """
    configured = found[0]
    faster = [one for one in found[1:] if one.rate > 0 and one.rate >= _worth(one.alternative) * configured.rate]
    best = max(faster, key=lambda one: one.rate, default=configured)
    if best.policy is None or best.forecaster is None:
        assert configured.error is not None, "there is a reason"
        raise configured.error
    gain = None
    if configured.policy is not None and configured.policy.gain is not None:
        gain = configured.policy.gain * best.rate / configured.rate
    policy = Policy({**best.alternative.settings, **best.policy.settings}, best.policy.forecast, gain)
    rows = tuple(_row(one) for one in (*(found if len(found) > 1 else ()), *beside))
    return Choice(best.alternative, best.forecaster, policy, rows)


def _worth(one: Alternative) -> float:
    return WORTH_OTHER_ANSWERS if one.changes_answers else WORTH


def _row(one: Prospect) -> Variant:
    job = one.policy.forecast.job if one.policy is not None else None
    return Variant(str(one.alternative), job, "" if one.error is None else str(one.error))


def of_the_rows(
    measured: Sequence[Candidate], input_file: Path, output_file: Path, shard: Shard = WHOLE
) -> list[Candidate]:
    """Those that the rows of an earlier run can be of; all, where there is no row that tells.

    Raises:
        FileExistsError: the output has lines that are no rows of a run.
    """
    there = RowsThere(output_file)
    if output_file.is_file():
        with output_file.open("rb") as lines:
            there = RowsThere(output_file, lines)
    for matching in _matching(measured, input_file, shard, there):
        if matching:
            return matching
    return list(measured)


def _matching(
    measured: Sequence[Candidate], input_file: Path, shard: Shard, there: RowsThere
) -> Iterator[list[Candidate]]:
    """By request of the input."""
    with open_lines(input_file) as lines:
        for item in read_requests(lines, shard):
            if not isinstance(item, BadLine):
                known = [(one, one.fingerprint) for one in measured]
                yield [one for one, engine in known if engine and there.answers(item, request_id_of(item, engine))]
