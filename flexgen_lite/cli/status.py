"""`flexgen-lite status`: what a running engine does."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

from flexgen_lite.cli.console import Console, LiveConsole, is_terminal
from flexgen_lite.cli.terminal import signals_interrupt
from flexgen_lite.client.client import Client
from flexgen_lite.wire.client_messages import Status

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
        with LiveConsole() if is_terminal() and not as_json else Console() as console:
            while True:
                status = client.status()
                if isinstance(console, LiveConsole):
                    console.progress("", {}, status)
                else:
                    _tell(client, status, as_json)
                time.sleep(WATCH_SECONDS)


def _tell(client: Client, status: Status, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"model": client.welcome.model, **asdict(status)}), flush=True)
        return
    from rich.console import Console as RichConsole

    from flexgen_lite.cli.live_view import EngineView, render

    busy = status.totals.get("busy_seconds", 0.0)
    rates = [status.totals.get(f"{name}_tokens", 0.0) / busy if busy > 0 else 0.0 for name in ("generated", "prompt")]
    console = RichConsole(highlight=False)
    console.print(f"model     {client.welcome.model}", markup=False, soft_wrap=True)
    console.print(render(EngineView(status, (rates[0], rates[1]), (rates[0], rates[1])), None))
