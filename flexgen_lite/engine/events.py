"""What the coordinator tells the process that started it: events on standard output, one JSON object a line."""

from __future__ import annotations

import contextlib
import json
import sys


def emit(event: str, **values: object) -> None:
    """Events are log, plan, ready, calibrated and failed."""
    with contextlib.suppress(BrokenPipeError, OSError):
        sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
        sys.stdout.flush()


def log(text: str) -> None:
    emit("log", message=text)
