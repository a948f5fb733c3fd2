"""`flexgen-lite run-batch`: a batch run with its progress shown."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flexgen_lite.batch_run import BatchRun, Progress
from flexgen_lite.client import Client
from flexgen_lite.config import EngineConfig
from flexgen_lite.engine_process import EngineProcess
from flexgen_lite.errors import EngineError
from flexgen_lite.expected_work import survey
from flexgen_lite.result_file import ResultWriter
from flexgen_lite.terminal import log, signals_interrupt

_BAR_SECONDS = 0.5
_LOG_SECONDS = 10.0


def run_on_own_engine(config: EngineConfig, input_file: Path, output_file: Path, overwrite: bool) -> None:
    """Start an engine, run the file, stop the engine."""
    with (
        signals_interrupt(),
        ResultWriter(output_file, overwrite=overwrite, warn=_warn) as results,
        EngineProcess(config, expected=survey(input_file), on_log=log, on_plan=log) as engine,
        Client(engine.endpoint, epitaph=engine.last_words, key_file=config.key_file) as client,
    ):
        _run(client, input_file, results)


def run_on_endpoint(
    endpoint: str, key_file: Path | None, model: str | None, input_file: Path, output_file: Path, overwrite: bool
) -> None:
    """Run the file on a running engine.

    Raises:
        EngineError: it serves another model than `model`.
    """
    with (
        signals_interrupt(),
        ResultWriter(output_file, overwrite=overwrite, warn=_warn) as results,
        Client(endpoint, key_file=key_file) as client,
    ):
        served = client.welcome.model
        if model is not None and os.path.realpath(model) != os.path.realpath(served):
            raise EngineError(f"the engine at {endpoint} serves {served}, not {model}", user_error=True)
        _run(client, input_file, results)


def _run(client: Client, input_file: Path, results: ResultWriter) -> None:
    run = BatchRun(client, input_file, results, warn=_warn)
    if num_rows := results.there.num_rows:
        _tell_what_is_there(run, num_rows)
    try:
        last = watch(run)
    except EngineError as error:
        if error.user_error:
            raise
        raise EngineError(f"{error}; the same command goes on where it stopped", details=error.details) from error
    print(last.summary(), flush=True)


def _tell_what_is_there(run: BatchRun, num_rows: int) -> None:
    text = f"resuming: {num_rows} rows are there already"
    if run.num_new is not None and num_rows > run.num_earlier:
        text += f", {num_rows - run.num_earlier} of them for no line of the input"
    log(text)
    if run.num_new == 0:
        log("nothing to do: every line of the input has its row")


def _warn(text: str) -> None:
    log(f"warning: {text}")


def watch(run: BatchRun) -> Progress:
    """Run to the end with a progress bar, or with log lines where there is no terminal."""
    if sys.stderr.isatty():
        with _bar() as show:
            return run.run(show, _BAR_SECONDS)
    return run.run(lambda progress: log(str(progress)), _LOG_SECONDS)


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.1f} tok/s"),
        TextColumn("{task.fields[lanes]}"),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("requests", total=None, rate=0.0, lanes="")

        def show(progress: Progress) -> None:
            bar.update(
                task,
                completed=progress.done,
                total=progress.total,
                rate=progress.rate,
                lanes=progress.lanes_text,
            )

        yield show
