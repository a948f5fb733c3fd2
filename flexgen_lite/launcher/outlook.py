"""What is known of a batch file's job before it runs: the settings that it would be fastest with, and what it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexgen_lite.batch.shard import WHOLE, Shard
from flexgen_lite.batch.survey import survey
from flexgen_lite.batch.token_counts import Counted, count_tokens
from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.cost.comparison import Prediction
from flexgen_lite.cost.job import JobRequest, JobTime
from flexgen_lite.engine.calibration import Calibration
from flexgen_lite.launcher import calibrate
from flexgen_lite.launcher.alternatives import Alternative
from flexgen_lite.launcher.choice import Candidate, JobAhead, candidates, choose, of_the_rows, prospects
from flexgen_lite.launcher.forecast import SHORTER
from flexgen_lite.launcher.search import Policy
from flexgen_lite.plan.machine import inspect_machine
from flexgen_lite.plan.workload import Workload

MET = 1 / 16  # of the bytes of weights, by a token, each for an operation
FAST = 400e9  # operations per second, more than most processors do
LONG_SECONDS = 120.0  # by these two, which are on the fast side: ten minutes and more in truth


@dataclass(frozen=True, slots=True)
class Outlook:
    """
    Attributes:
        alternative: of those that are allowed.
        job: with the policy's settings.
        predicted: the same in short, with what would change it.
    """

    alternative: Alternative
    policy: Policy
    job: JobTime
    predicted: Prediction


def outlook(
    found: Sequence[Alternative], input_file: Path, on_log: Callable[[str], None], shard: Shard = WHOLE
) -> Outlook | None:
    """None where the engine would take no line, or this machine was not calibrated with the model, which is done where
    the job is long, or where there is something to choose. Answers are taken to be as long as they may be.

    Args:
        found: what may be chosen, what is configured first.
        shard: the lines that are the job.

    Raises:
        PlanError: the budget does not hold even the smallest plan.
        EngineError: it was to be calibrated, and could not.
        OSError, BatchFileError: of the file.
    """
    expected = survey(input_file, shard)
    if expected is None:
        return None
    config = found[0].config
    if len(found) == 1 and calibrate.known(config) is None and not _is_long(config, expected):
        return None
    return _outlook(candidates(found, on_log), input_file, shard, expected)


def resumed(
    found: Sequence[Alternative],
    input_file: Path,
    output_file: Path,
    on_log: Callable[[str], None],
    shard: Shard = WHOLE,
) -> Alternative:
    """With which the rows that are there go on: what they were made with. Where that can be several, as none changes
    what is computed, the one that would be chosen for the whole file.

    Raises:
        FileExistsError: the output has lines that are no rows of a run.
    """
    expected = survey(input_file, shard)
    if expected is None:
        return found[0]
    fitting = of_the_rows(candidates(found, on_log), input_file, output_file, shard)
    made = _outlook(fitting, input_file, shard, expected) if len(fitting) > 1 else None
    return fitting[0].alternative if made is None else made.alternative


def _outlook(measured: Sequence[Candidate], input_file: Path, shard: Shard, expected: Workload) -> Outlook | None:
    calibration = next(one.calibration for one in measured if one.calibration is not None)
    requests = requests_of(calibration, input_file, shard)
    if not requests:
        return None
    ahead = JobAhead(expected, requests, calibrate.disk_now(calibration.opened.spec), inspect_machine())
    # No prediction has been compared with a run on a GPU.
    chosen = choose(prospects(measured, ahead, search_on_gpu=False))
    job = chosen.policy.forecast.job
    if job is None:
        return None
    variants = chosen.forecaster.variants(chosen.alternative.config, chosen.policy.settings, chosen.policy.forecast)
    changes = {one.name: one.job for one in variants if one.job is not None and one.name != SHORTER}
    return Outlook(chosen.alternative, chosen.policy, job, Prediction.of(job, changes))


def _is_long(config: EngineConfig, expected: Workload) -> bool:
    """Whether it takes several times as long as a calibration, however few of the weights a token meets."""
    folder = Path(config.model)
    files = [folder] if folder.is_file() else [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    weights = sum(file.stat().st_size for file in files)
    tokens = expected.sequences * expected.typical_tokens
    return calibrate.looks_like_cpu(config) and tokens * weights * MET / FAST > LONG_SECONDS


def requests_of(calibration: Calibration, input_file: Path, shard: Shard = WHOLE) -> list[JobRequest]:
    """Of the shard's good lines, with answers as long as they may be. Those that are alike are one object: there may be
    millions."""
    made: dict[Counted, JobRequest] = {}
    found = []
    for one in count_tokens(input_file, calibration.tokenizer, calibration.opened.chat_template, shard):
        if one not in made:
            made[one] = JobRequest(
                one.prompt, one.max_tokens, one.max_tokens, one.scored, one.shared, one.common, one.copy
            )
        found.append(made[one])
    return found
