"""What is known of a batch file's job before it runs: the settings that it would be fastest with, and what it takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flexgen_lite.batch.survey import READ_UP_TO, survey
from flexgen_lite.batch.token_counts import Counted, count_tokens
from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.cost.comparison import Prediction
from flexgen_lite.cost.job import JobRequest, JobTime
from flexgen_lite.engine.calibration import Calibration
from flexgen_lite.launcher import calibrate
from flexgen_lite.launcher.forecast import SHORTER, Forecaster, disk_now
from flexgen_lite.launcher.search import Policy, search
from flexgen_lite.plan.machine import inspect_machine


@dataclass(frozen=True, slots=True)
class Outlook:
    """
    Attributes:
        job: with the policy's settings.
        predicted: the same in short, with what would change it.
    """

    policy: Policy
    job: JobTime
    predicted: Prediction


def outlook(config: EngineConfig, input_file: Path, answer_tokens: int | None = None) -> Outlook | None:
    """None where this machine was not calibrated with the model, or the engine would take no line.

    Args:
        answer_tokens: of an answer, on average; None: as many as it may have.

    Raises:
        PlanError: the budget does not hold even the smallest plan.
        OSError, BatchFileError: of the file.
    """
    calibration = calibrate.known(config)
    if calibration is None or not input_file.is_file() or input_file.stat().st_size > READ_UP_TO:
        return None
    requests = requests_of(calibration, input_file, answer_tokens)
    if not requests:
        return None
    forecaster = Forecaster(
        calibration, inspect_machine(), survey(input_file), requests, disk_now(calibration.opened.spec)
    )
    if calibration.opened.device_total_bytes:  # no prediction has been compared with a run on a GPU
        policy = Policy({}, forecaster.forecast(config), 1.0)
    else:
        policy = search(forecaster, config)
    job = policy.forecast.job
    if job is None:
        return None
    variants = forecaster.variants(config, policy.settings, policy.forecast)
    changes = {one.name: one.job for one in variants if one.job is not None and one.name != SHORTER}
    return Outlook(policy, job, Prediction.of(job, changes))


def requests_of(calibration: Calibration, input_file: Path, answer_tokens: int | None) -> list[JobRequest]:
    """Of its good lines. Those that are alike are one object: a file may have millions."""
    made: dict[Counted, JobRequest] = {}
    found = []
    for one in count_tokens(input_file, calibration.tokenizer, calibration.opened.chat_template):
        if one not in made:
            generated = min(one.max_tokens, answer_tokens or one.max_tokens)
            made[one] = JobRequest(one.prompt, generated, one.max_tokens, one.scored, one.shared)
        found.append(made[one])
    return found
