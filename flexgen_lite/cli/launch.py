"""`flexgen-lite launch`: an engine in the foreground."""

from __future__ import annotations

import contextlib

from flexgen_lite.cli.console import Console, LiveConsole
from flexgen_lite.cli.terminal import signals_interrupt
from flexgen_lite.client.client import Client
from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.errors import NoStatus
from flexgen_lite.launcher.process import EngineProcess
from flexgen_lite.wire.client_messages import Status


def launch_engine(config: EngineConfig, console: Console) -> None:
    """Serve until interrupted.

    Raises:
        EngineError: the engine could not be started, or failed.
    """
    try:
        with (
            signals_interrupt(),
            EngineProcess(config, on_log=console.log, on_plan=console.plan) as engine,
            Client(engine.endpoint, epitaph=engine.last_words, key_file=config.key_file) as client,
        ):
            console.ready(engine.endpoint)
            _watch(client, console)
    except KeyboardInterrupt:
        console.say("stopped")


def _watch(client: Client, console: Console) -> None:
    """Tell whenever something has changed. Ends with an error only."""
    line = ""
    while True:
        with contextlib.suppress(NoStatus):  # it is busy
            status = client.status()
            before, line = line, _line(status)
            if line != before or isinstance(console, LiveConsole):
                console.progress(line, {}, status)
        client.wait_for_end(console.interval)


def _line(status: Status) -> str:
    text = f"{status.running} running, {status.waiting} waiting, {status.done} done"
    if not status.running:
        return text
    return f"{text}; " + ", ".join(f"{lane} {share:.0%}" for lane, share in status.lanes.items())
