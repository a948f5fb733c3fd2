"""`flexgen-lite launch`: an engine in the foreground."""

from __future__ import annotations

import contextlib

from flexgen_lite.client import Client
from flexgen_lite.config import EngineConfig
from flexgen_lite.engine_process import EngineProcess
from flexgen_lite.errors import NoStatus
from flexgen_lite.messages import Status
from flexgen_lite.terminal import log, signals_interrupt

_STATUS_SECONDS = 10.0


def serve(config: EngineConfig) -> None:
    """Serve until interrupted.

    Raises:
        EngineError: the engine could not be started, or failed.
    """
    try:
        with (
            signals_interrupt(),
            EngineProcess(config, on_log=log, on_plan=_print) as engine,
            Client(engine.endpoint, epitaph=engine.last_words, key_file=config.key_file) as client,
        ):
            _print(f"endpoint: {engine.endpoint}")
            _watch(client)
    except KeyboardInterrupt:
        _print("stopped")


def _watch(client: Client) -> None:
    """Print a line whenever something has changed. Ends with an error only."""
    line = ""
    while True:
        with contextlib.suppress(NoStatus):  # it is busy
            before, line = line, _line(client.status())
            if line != before:
                _print(line)
        client.wait_for_end(_STATUS_SECONDS)


def _line(status: Status) -> str:
    text = f"{status.running} running, {status.waiting} waiting, {status.done} done"
    if not status.running:
        return text
    return f"{text}; " + ", ".join(f"{lane} {share:.0%}" for lane, share in status.lanes.items())


def _print(text: str) -> None:
    print(text, flush=True)
