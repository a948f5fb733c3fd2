"""`flexgen-lite plan` and `calibrate`: what an engine would do, without one. Options of all commands are in main.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen_lite.batch.lines import check_lines
from flexgen_lite.batch.survey import survey
from flexgen_lite.cli.console import Console
from flexgen_lite.cli.rates import clock
from flexgen_lite.cli.terminal import signals_interrupt
from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.cost.job import JobRequest, JobTime
from flexgen_lite.dispatch.plans_ahead import plans_ahead
from flexgen_lite.engine.calibration import Calibration
from flexgen_lite.launcher import calibrate
from flexgen_lite.launcher.alternatives import (
    Alternative,
    alternative,
    alternatives,
    refuse_allowed,
    settings_text,
)
from flexgen_lite.launcher.answers import AnswerTokens
from flexgen_lite.launcher.choice import Candidate, JobAhead, candidates, choose, prospects
from flexgen_lite.launcher.forecast import SHORTER, Forecast, Forecaster, Variant
from flexgen_lite.launcher.outlook import requests_of
from flexgen_lite.launcher.process import with_number_of_engines
from flexgen_lite.launcher.search import Policy
from flexgen_lite.plan.machine import Machine, inspect_machine
from flexgen_lite.plan.plan import Plan
from flexgen_lite.plan.text import describe
from flexgen_lite.plan.workload import Workload
from flexgen_lite.text.shown import shown_path

WORTH_TELLING = 1.05  # times as fast
NAME_WIDTH = 28


@dataclass(frozen=True, slots=True)
class Job:
    """Without a file: so many requests, all alike."""

    requests: int
    prompt_tokens: int
    max_tokens: int


def show_plan(
    config: EngineConfig,
    input_file: Path | None,
    job: Job | None,
    answers: AnswerTokens | None,
    machine_file: Path | None,
    allowed: Sequence[str],
    console: Console,
) -> None:
    """
    Args:
        input_file: of requests; None: as `job` says, and where that is None only the plan is shown.
        answers: how long they are; None: as long as they may be.
        machine_file: of another machine's calibration.
        allowed: settings that may be chosen, see launcher/alternatives.py.

    Raises:
        CalibrationError: the file holds none.
        ConfigError: of what is allowed.
        PlanError: the budget does not hold even the smallest plan.
    """
    config = with_number_of_engines(config)
    if config.engines != 1:
        _show_plans(config, input_file, job, machine_file, allowed, console)
        return
    choices = alternatives(config, allowed)
    if allowed and machine_file is not None:
        raise ValueError(
            "--allow and --machine exclude each other: the file has one set of settings measured, give it for these"
        )
    if allowed and input_file is None and job is None:
        raise ValueError("--allow chooses what a job would be fastest with: give -i FILE, or --requests")
    with signals_interrupt():
        if input_file is not None:
            check_lines(input_file)
        measured, machine = _measured(choices, machine_file, console)
        calibration = next(one.calibration for one in measured if one.calibration is not None)
        disk = calibrate.disk_now(calibration.opened.spec) if machine_file is None else None
        requests, expected = _work(calibration, input_file, job)
        requests = requests if answers is None else list(answers.of(requests))
        if input_file is not None and not requests:
            raise ValueError(f"{shown_path(input_file)} has no good line: run-batch says what is wrong with each")
        if not requests:
            found = Forecaster(calibration, machine, expected, requests, disk).forecast(config)
            console.plan(describe(found.setup.plan, found.setup.spec))
            values = {"policy": {}, "gain": 1.0, "spread": {}} | _values(found, [])
            console.done("give -i FILE, or --requests, to have a job predicted", values)
            return
        told = _told_of([one.alternative for one in measured], calibration) if machine_file is None else []
        beside = [Candidate(one, known) for one in told if (known := calibrate.known(one.config)) is not None]
        ahead = JobAhead(expected, requests, disk, machine)
        chosen = choose(prospects(measured, ahead), prospects(beside, ahead))
        policy, found = chosen.policy, chosen.policy.forecast
        variants = chosen.forecaster.variants(chosen.alternative.config, policy.settings, found)
        variants += chosen.rows
        new = [one for one in told if all(one is not other.alternative for other in beside)]
        variants += [Variant(str(one), None, f"not measured yet: `--allow {one}` does") for one in new]
        spread = _spread(chosen.forecaster, config.model_copy(update=policy.settings), requests, answers)
    console.plan(describe(found.setup.plan, found.setup.spec))
    lines = [*policy_lines(policy), *_lines(found, variants, spread)]
    values = {"policy": policy.settings, "gain": policy.gain} | _values(found, variants)
    console.done("\n".join(lines), values | {"spread": {str(name): _numbers(one) for name, one in spread.items()}})


def _show_plans(
    config: EngineConfig,
    input_file: Path | None,
    job: Job | None,
    machine_file: Path | None,
    allowed: Sequence[str],
    console: Console,
) -> None:
    """Of several engines; how long a job would take is not predicted. Raises as `show_plan` does."""
    refuse_allowed(config, allowed)
    if machine_file is not None:
        raise ValueError(
            f"--machine and engines={config.engines} exclude each other: the file does not say which CPUs of that "
            "machine are together"
        )
    with signals_interrupt():
        if input_file is not None:
            check_lines(input_file)
        calibration = calibrate.calibrated(config, console.log)
        _, expected = _work(calibration, input_file, job)
        plans, text = plans_ahead(config, calibration, expected)
    console.plan(text)
    values = {"engines": [_plan_values(plan, calibration.opened.spec.num_layers) for plan in plans]}
    console.done("how long a job would take is predicted of one engine alone", values)


def _measured(
    choices: Sequence[Alternative], machine_file: Path | None, console: Console
) -> tuple[list[Candidate], Machine]:
    if machine_file is None:
        return candidates(choices, console.log), inspect_machine()
    calibration = calibrate.read(machine_file)
    _check_settings(choices[0].config, calibration, machine_file)
    return [Candidate(choices[0], calibration)], calibration.machine


def _told_of(choices: Sequence[Alternative], calibration: Calibration) -> list[Alternative]:
    """What is not allowed, and may be worth it."""
    config, asked = choices[0].config, {key for one in choices for key in one.settings}
    found = dict[str, str]()
    if config.quantization == "auto" and not calibration.opened.spec.has_few_bits:
        found["quantization"] = "int4"
    if config.cpu_projections == "auto" and calibrate.stages_weights(config):
        found["cpu_projections"] = "qkv"
    return [
        alternative(config, config.model_copy(update={key: value})) for key, value in found.items() if key not in asked
    ]


def _spread(
    forecaster: Forecaster, config: EngineConfig, requests: Sequence[JobRequest], answers: AnswerTokens | None
) -> dict[int, JobTime]:
    """The job where all answers have as few tokens as they may have, and as many."""
    if answers is None or answers.low == answers.high:
        return {}
    found = {}
    for length in (answers.low, answers.high):
        job = forecaster.of(config, list(AnswerTokens(length, length).of(requests))).job
        if job is not None:
            found[length] = job
    return found


def _check_settings(config: EngineConfig, calibration: Calibration, path: Path) -> None:
    """Raises ValueError where the file was measured with others."""
    wanted = calibrate.settings_of(config, calibration.opened.device_total_bytes > 0)
    for key in (*calibration.settings, *wanted):
        value = calibration.settings.get(key)
        if wanted.get(key) != value:
            raise ValueError(
                f"{shown_path(path)} was measured with {key}={value}, not {wanted.get(key)}: plan with that, or "
                "calibrate there again"
            )


def policy_lines(policy: Policy) -> list[str]:
    if not policy.settings:
        return []
    line = f"policy    {settings_text(policy.settings)}: "
    if policy.gain is None:
        return [f"{line}what is configured is not possible"]
    return [f"{line}predicted to be {policy.gain:.2f} times as fast as what the plan's rules choose"]


def run_calibration(config: EngineConfig, output: Path | None, console: Console) -> None:
    """Measure, whatever is there; keep it, and write it to `output` as well."""
    with signals_interrupt():
        found = calibrate.calibrated(config, console.log, again=True)
        if output is not None:
            calibrate.write(found, output)
    rates = found.rates
    name = "packed" if any(key.startswith("packed") for key in rates.segments) else "raw"
    rows = max((rate.prompt.points[-1][0] for rate in rates.segments.values()), default=1)
    layers = [rate for key, rate in rates.segments.items() if key.startswith(name)]
    slowest = max(layers, key=lambda rate: rate.prompt.at(rows))
    lines = [
        f"disk         {rates.disk / 1e9:.2f} GB/s" if rates.disk else "disk         not used",
        f"a layer      {slowest.prompt.at(rows) * 1e3:.1f} ms for {rows:.0f} rows of prompts, "
        f"{slowest.decode.at(64) * 1e3:.1f} ms for 64 single rows",
    ]
    if output is not None:
        lines.append(f"{output}: for `flexgen-lite plan --machine`")
    console.done("\n".join(lines), {"rates": rates.to_dict()})


def _work(
    calibration: Calibration, input_file: Path | None, job: Job | None
) -> tuple[list[JobRequest], Workload | None]:
    if input_file is not None:
        return requests_of(calibration, input_file), survey(input_file)
    if job is None:
        return [], None
    one = JobRequest(job.prompt_tokens, job.max_tokens, job.max_tokens)
    whole = job.prompt_tokens + job.max_tokens
    return [one] * job.requests, Workload(job.requests, whole, whole, whole)


def _lines(found: Forecast, variants: Sequence[Variant], spread: Mapping[int, JobTime]) -> list[str]:
    job = found.job
    assert job is not None
    width = max(NAME_WIDTH, *(len(variant.name) + 2 for variant in variants))
    lines = [
        f"predicted {clock(job.seconds)} for {job.requests:,} requests, "
        f"{job.generated_tokens / job.seconds:,.1f} tok/s ({job.prompt_tokens:,} tokens of prompts, "
        f"{job.generated_tokens:,} of answers); "
        f"{clock(job.load)} before that to load weights",
        *(f"          {clock(one.seconds)} if all answers have {length:,} tokens" for length, one in spread.items()),
        f"passes    {_passes(job)}",
        f"          {_verdict(job, variants)}",
        "with      " + "time".rjust(width + 8) + "tok/s".rjust(12) + "as fast".rjust(12),
    ]
    for variant in variants:
        name = f"{variant.name:<{width}}"
        if variant.job is None:
            lines.append(f"          {name}{variant.problem}")
            continue
        rate = variant.job.generated_tokens / variant.job.seconds
        factor = _rate(variant.job) / _rate(job)
        lines.append(f"          {name}{clock(variant.job.seconds):>8}{rate:>12,.1f}{factor:>10.2f} x")
    return lines


def _passes(job: JobTime) -> str:
    """How many, how long, and how long each lane works in them."""
    length = sum(job.pass_seconds) / max(1, len(job.pass_seconds))
    lanes = ", ".join(f"{lane} {share * length:.3g} s ({share:.0%})" for lane, share in _busiest(job))
    return f"{job.seconds / max(length, 1e-9):,.0f} of {length:.3g} s on average: {lanes}"


def _rate(job: JobTime) -> float:
    """Requests per second."""
    return job.requests / job.seconds


def _busiest(job: JobTime) -> list[tuple[str, float]]:
    ranked = sorted(job.busy.items(), key=lambda item: item[1], reverse=True)
    return [(lane, share) for lane, share in ranked if share >= 0.005]


def _verdict(job: JobTime, variants: Sequence[Variant]) -> str:
    """Which lane sets the time, and what of the variants would help most."""
    lane, share = _busiest(job)[0]
    text = f"the busiest lane is {lane}, {share:.0%} of the time"
    choices = [one for one in variants if one.job is not None and one.name != SHORTER]
    best = max(choices, key=lambda one: _rate(one.job) if one.job else 0.0, default=None)
    if best is None or best.job is None or _rate(best.job) < WORTH_TELLING * _rate(job):
        return f"{text}: none of the changes below would help much"
    return f"{text}: {best.name} would be {_rate(best.job) / _rate(job):.1f} times as fast"


def _values(found: Forecast, variants: Sequence[Variant]) -> dict[str, Any]:
    values = _plan_values(found.setup.plan, found.setup.spec.num_layers) | {"disk_bytes_per_second": found.disk}
    if found.job is not None:
        values["predicted"] = _numbers(found.job)
        values["with"] = [
            {"name": one.name, **({"problem": one.problem} if one.job is None else _numbers(one.job))}
            for one in variants
        ]
    return values


def _plan_values(plan: Plan, num_layers: int) -> dict[str, Any]:
    return {
        "memory": dict(plan.parts),
        "ram": plan.ram,
        "shared_bytes": plan.shared_bytes,
        "resident_layers": len(plan.resident_layers),
        "num_layers": num_layers,
        "max_sequences": plan.max_sequences,
        "micro_batches": plan.micro_batches,
        "micro_batch_tokens": plan.micro_batch_tokens,
    }


def _numbers(job: JobTime) -> dict[str, Any]:
    return {
        "seconds": job.seconds,
        "load_seconds": job.load,
        "requests": job.requests,
        "prompt_tokens": job.prompt_tokens,
        "generated_tokens": job.generated_tokens,
        "tokens_per_second": job.generated_tokens / job.seconds,
        "lanes": job.busy,
    }
