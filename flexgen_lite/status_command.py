"""`flexgen-lite status`: what a running engine does."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

from flexgen_lite.client import Client
from flexgen_lite.client_messages import Status
from flexgen_lite.terminal import signals_interrupt
from flexgen_lite.voice import LiveVoice, Voice, is_terminal

WATCH_SECONDS = 1.0


def show_status(endpoint: str, key_file: Path | None, watch: bool, as_json: bool) -> None:
    """Once, or again and again until interrupted.

    Raises:
        EngineError: there is no engine, or it has ended.
    """
    with signals_interrupt(), Client(endpoint, key_file=key_file) as client:
        if not watch:
            _tell(client, client.status(), as_json)
            return
        with LiveVoice() if is_terminal() and not as_json else Voice() as voice:
            while True:
                status = client.status()
                if isinstance(voice, LiveVoice):
                    voice.progress("", {}, status)
                else:
                    _tell(client, status, as_json)
                time.sleep(WATCH_SECONDS)


def _tell(client: Client, status: Status, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"model": client.welcome.model, **asdict(status)}), flush=True)
        return
    from rich.console import Console

    from flexgen_lite.live_view import EngineView, render

    busy = status.totals.get("busy_seconds", 0.0)
    rates = [status.totals.get(f"{name}_tokens", 0.0) / busy if busy > 0 else 0.0 for name in ("generated", "prompt")]
    console = Console(highlight=False)
    console.print(f"model     {client.welcome.model}", markup=False, soft_wrap=True)
    console.print(render(EngineView(status, (rates[0], rates[1]), (rates[0], rates[1])), None))
