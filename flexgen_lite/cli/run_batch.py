"""`flexgen-lite run-batch`: a batch run with its progress shown. Options of all commands are in main.py."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from flexgen_lite.batch.result_file import ResultWriter
from flexgen_lite.batch.run import BatchRun, Progress
from flexgen_lite.batch.shard import WHOLE, Shard
from flexgen_lite.batch.survey import survey
from flexgen_lite.cli.console import Console
from flexgen_lite.cli.plan import policy_lines
from flexgen_lite.cli.rates import Expected, clock
from flexgen_lite.cli.terminal import signals_interrupt
from flexgen_lite.client.client import Client
from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.cost.comparison import Prediction, where_they_part
from flexgen_lite.errors import EngineError
from flexgen_lite.launcher.alternatives import Alternative, alternatives, refuse_allowed
from flexgen_lite.launcher.outlook import Outlook, outlook, resumed
from flexgen_lite.launcher.process import with_number_of_engines
from flexgen_lite.launcher.supervisor import EngineSupervisor
from flexgen_lite.plan.workload import Workload
from flexgen_lite.report.bottleneck import verdict
from flexgen_lite.text.shown import shown_path


def run_on_own_engine(
    config: EngineConfig,
    input_file: Path,
    output_file: Path,
    overwrite: bool,
    console: Console,
    allowed: Sequence[str] = (),
    shard: Shard = WHOLE,
) -> None:
    """Start an engine, run the file, stop the engine. One that dies on the way is started again.

    Args:
        allowed: settings that may be chosen, see launcher/alternatives.py.
        shard: the lines of the file that are run.
    """
    _leave_to_rows(output_file, console)
    config = with_number_of_engines(config)
    choices, found = alternatives(config, allowed), None
    if config.engines != 1:
        refuse_allowed(config, allowed)
        console.log(f"{config.engines} engines: nothing is predicted of them, and no settings are searched")
    elif overwrite or not output_file.exists():  # of a rest nothing is predicted
        found = _outlook(choices, input_file, shard, console)
    elif allowed:
        config = _as_the_rows(choices, input_file, output_file, shard, console)
    with (
        signals_interrupt(),
        ResultWriter(output_file, overwrite=overwrite, warn=console.warn) as results,
        contextlib.ExitStack() as running,
    ):
        engine, found = _engine(config, found, survey(input_file, shard), console)
        client = running.enter_context(running.enter_context(engine).connect())
        _run(client, input_file, results, console, found, shard)


def _engine(
    config: EngineConfig, found: Outlook | None, expected: Workload | None, console: Console
) -> tuple[EngineSupervisor, Outlook | None]:
    """With settings that were found, or without them, and what was predicted of them, where they do not fit after
    all."""

    def start(config: EngineConfig, predicted: Prediction | None) -> EngineSupervisor:
        return EngineSupervisor(
            config, expected=expected, predicted=predicted, on_log=console.log, on_plan=console.plan
        )

    if found is not None:
        settings = found.policy.settings
        try:
            return start(config.model_copy(update=dict(settings)), found.predicted), found
        except EngineError as error:
            if not (error.user_error and settings):
                raise
            console.warn(f"{error}; once more without the settings that were found, and without a prediction")
    return start(config, None), None


def _as_the_rows(
    choices: Sequence[Alternative], input_file: Path, output_file: Path, shard: Shard, console: Console
) -> EngineConfig:
    """Of what is allowed, what the rows that are there were made with."""
    found = resumed(choices, input_file, output_file, console.log, shard)
    if found.settings:
        console.log(f"going on with {found}")
    return found.config


def _outlook(choices: Sequence[Alternative], input_file: Path, shard: Shard, console: Console) -> Outlook | None:
    """What was measured of this machine and the model, if it was, makes of the job."""
    try:
        found = outlook(choices, input_file, console.log, shard)
    except Exception as error:  # of any kind: no prediction stops a run, and what ails its file or budget is told later
        logging.getLogger("flexgen_lite").debug("nothing is predicted", exc_info=error)
        if isinstance(error, EngineError):  # of a calibration
            console.warn(f"nothing is predicted: {error}")
        found = None
    if found is None and len(choices) > 1:
        console.warn("the file is run as configured, whatever --allow says: nothing is predicted of it")
    if found is not None:
        for line in policy_lines(found.policy):
            console.log(line)
        rate = found.job.generated_tokens / found.job.seconds
        console.log(f"predicted {clock(found.job.seconds)} where answers are as long as they may be, {rate:,.1f} tok/s")
    return found


def run_on_endpoint(
    endpoint: str,
    key_file: Path | None,
    model: str | None,
    input_file: Path,
    output_file: Path,
    overwrite: bool,
    console: Console,
    shard: Shard = WHOLE,
) -> None:
    """Run the file, or a part of its lines, on a running engine.

    Raises:
        EngineError: it serves another model than `model`.
    """
    _leave_to_rows(output_file, console)
    with (
        signals_interrupt(),
        ResultWriter(output_file, overwrite=overwrite, warn=console.warn) as results,
        Client(endpoint, key_file=key_file) as client,
    ):
        served = client.welcome.model
        if model is not None and os.path.realpath(model) != os.path.realpath(served):
            raise EngineError(f"the engine at {endpoint} serves {served}, not {shown_path(model)}", user_error=True)
        _run(client, input_file, results, console, shard=shard)


def _leave_to_rows(output_file: Path, console: Console) -> None:
    """Where rows go to standard output, nothing else does."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(1), os.stat(output_file)):
            console.standard_output = sys.stderr


def _run(
    client: Client,
    input_file: Path,
    results: ResultWriter,
    console: Console,
    found: Outlook | None = None,
    shard: Shard = WHOLE,
) -> None:
    run = BatchRun(client, input_file, results, warn=console.warn, shard=shard)
    if num_rows := results.there.num_rows:
        _tell_what_is_there(run, num_rows, console)
    try:
        last = watch(run, console, found)
    except EngineError as error:
        if error.user_error:
            raise
        raise EngineError(f"{error}; the same command goes on where it stopped", details=error.details) from error
    values, text = last.to_dict(), last.summary()
    if found is not None:
        values |= {"predicted_seconds": found.predicted.seconds, "predicted_lanes": dict(found.predicted.lanes)}
        busy = {lane: share * last.busy_seconds for lane, share in last.lanes.items()}
        if parted := where_they_part(found.predicted, last.busy_seconds, busy):
            text += f"; {parted}\n{verdict(last.lanes, found.predicted.changes)}"
    console.done(text, values)


def _tell_what_is_there(run: BatchRun, num_rows: int, console: Console) -> None:
    text = f"resuming: {num_rows} rows are there already"
    if run.num_new is not None and num_rows > run.num_earlier:
        text += f", {num_rows - run.num_earlier} of them for no line of the input"
    console.log(text)
    if run.num_new == 0:
        console.log("nothing to do: every line of the input has its row")


def watch(run: BatchRun, console: Console, found: Outlook | None = None) -> Progress:
    """Run to the end, and tell of it."""
    expected = None if found is None or not found.job.done_at else Expected(found.job.done_at)

    def tell(now: Progress) -> None:
        values, text = now.to_dict(), str(now)
        if expected is not None and now.total:
            no_work = now.earlier + now.failed  # bad lines are done at once
            left = expected.seconds_left(now.done - no_work, now.total - no_work, now.busy_seconds)
            values |= {"seconds_left": left, "predicted_seconds": expected.seconds}
            in_all = clock(now.busy_seconds + left)
            text += f"; {clock(left)} left, {in_all} in all where {clock(expected.seconds)} were predicted"
        console.progress(text, values, now.status)

    return run.run(tell, console.interval)
