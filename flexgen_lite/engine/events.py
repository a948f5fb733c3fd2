"""What the coordinator is told by the process that started it, in one line on standard input, and what it tells: events
on standard output, one JSON object a line."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from typing import Any

_one_line = threading.Lock()


def read_order(descriptor: int) -> dict[str, Any]:
    """Read unbuffered: what comes behind the line is watched for. Raises EOFError where there is none."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(descriptor, 1)
        if not byte:
            raise EOFError("no order on standard input")
        line += byte
    order: dict[str, Any] = json.loads(line)
    return order


def emit(event: str, **values: object) -> None:
    """Events are log, plan, ready, calibrated, engines (of those behind one queue) and failed. On any thread."""
    with _one_line, contextlib.suppress(BrokenPipeError, OSError):
        sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
        sys.stdout.flush()


def log(text: str) -> None:
    emit("log", message=text)
