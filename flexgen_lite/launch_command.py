"""`flexgen-lite launch`: an engine in the foreground."""

from __future__ import annotations

import contextlib

from flexgen_lite.client import Client
from flexgen_lite.client_messages import Status
from flexgen_lite.config import EngineConfig
from flexgen_lite.engine_process import EngineProcess
from flexgen_lite.errors import NoStatus
from flexgen_lite.terminal import signals_interrupt
from flexgen_lite.voice import LiveVoice, Voice


def launch_engine(config: EngineConfig, voice: Voice) -> None:
    """Serve until interrupted.

    Raises:
        EngineError: the engine could not be started, or failed.
    """
    try:
        with (
            signals_interrupt(),
            EngineProcess(config, on_log=voice.log, on_plan=voice.plan) as engine,
            Client(engine.endpoint, epitaph=engine.last_words, key_file=config.key_file) as client,
        ):
            voice.ready(engine.endpoint)
            _watch(client, voice)
    except KeyboardInterrupt:
        voice.say("stopped")


def _watch(client: Client, voice: Voice) -> None:
    """Tell whenever something has changed. Ends with an error only."""
    line = ""
    while True:
        with contextlib.suppress(NoStatus):  # it is busy
            status = client.status()
            before, line = line, _line(status)
            if line != before or isinstance(voice, LiveVoice):
                voice.progress(line, {}, status)
        client.wait_for_end(voice.interval)


def _line(status: Status) -> str:
    text = f"{status.running} running, {status.waiting} waiting, {status.done} done"
    if not status.running:
        return text
    return f"{text}; " + ", ".join(f"{lane} {share:.0%}" for lane, share in status.lanes.items())
