"""What is known of a batch file's job before it runs: the settings that it would be fastest with, and what it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flexgen_lite.batch.survey import survey
from flexgen_lite.batch.token_counts import Counted, count_tokens
from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.cost.comparison import Prediction
from flexgen_lite.cost.job import JobRequest, JobTime
from flexgen_lite.engine.calibration import Calibration
from flexgen_lite.launcher import calibrate
from flexgen_lite.launcher.forecast import SHORTER, Forecaster
from flexgen_lite.launcher.search import Policy, search
from flexgen_lite.plan.machine import inspect_machine
from flexgen_lite.plan.workload import Workload

GPU_DRIVER = Path("/dev/nvidiactl")
MET = 1 / 16  # of the bytes of weights, by a token, each for an operation
FAST = 400e9  # operations per second, more than most processors do
LONG_SECONDS = 120.0  # by these two, which are on the fast side: ten minutes and more in truth


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


def outlook(config: EngineConfig, input_file: Path, on_log: Callable[[str], None]) -> Outlook | None:
    """None where the engine would take no line, or this machine was not calibrated with the model, which is done where
    the job is long. Answers are taken to be as long as they may be.

    Raises:
        PlanError: the budget does not hold even the smallest plan.
        EngineError: it was to be calibrated, and could not.
        OSError, BatchFileError: of the file.
    """
    expected = survey(input_file)
    if expected is None:
        return None
    calibration = calibrate.known(config)
    if calibration is None and _is_long(config, expected):
        calibration = calibrate.calibrated(config, on_log)
    if calibration is None:
        return None
    requests = requests_of(calibration, input_file)
    if not requests:
        return None
    forecaster = Forecaster(
        calibration, inspect_machine(), expected, requests, calibrate.disk_now(calibration.opened.spec)
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


def _is_long(config: EngineConfig, expected: Workload) -> bool:
    """Whether it takes several times as long as a calibration, however few of the weights a token meets."""
    folder = Path(config.model)
    files = [folder] if folder.is_file() else [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    weights = sum(file.stat().st_size for file in files)
    tokens = expected.sequences * expected.typical_tokens
    on_cpu = config.device == "cpu" or (config.device == "auto" and not GPU_DRIVER.exists())
    return on_cpu and tokens * weights * MET / FAST > LONG_SECONDS


def requests_of(calibration: Calibration, input_file: Path) -> list[JobRequest]:
    """Of its good lines, with answers as long as they may be. Those that are alike are one object: there may be
    millions."""
    made: dict[Counted, JobRequest] = {}
    found = []
    for one in count_tokens(input_file, calibration.tokenizer, calibration.opened.chat_template):
        if one not in made:
            made[one] = JobRequest(
                one.prompt, one.max_tokens, one.max_tokens, one.scored, one.shared, one.common, one.copy
            )
        found.append(made[one])
    return found
