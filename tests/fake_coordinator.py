"""A coordinator's start-up protocol without an engine behind it: python fake_coordinator.py MODE."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def emit(**event: object) -> None:
    print(json.dumps(event), flush=True)


def main(mode: str) -> int:
    if mode == "dies at once":
        return 3
    order = json.loads(sys.stdin.buffer.readline())
    run_dir = Path(order["run_dir"])
    (run_dir / "order.json").write_text(json.dumps(order))
    emit(event="log", message=f"hello from {os.getpid()}")
    if mode == "user error":
        emit(event="failed", message="model has no config.json", user_error=True, details="")
        return 2
    if mode == "failure":
        emit(event="failed", message="the loader died", user_error=False, details="Traceback ...")
        return 1
    if mode == "dies by signal":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "never ready":
        sys.stdin.buffer.read()
        return 0
    emit(event="plan", text="weights: 1.0 GiB\nkv: 2.0 GiB")
    print("a library prints this")
    if mode in ("serves", "dies on the way"):
        return serve(run_dir / "clients", die_after=200 if mode == "dies on the way" else None)
    emit(event="ready", endpoint=f"ipc://{run_dir}/clients")
    if mode == "talks a lot":
        for number in range(20_000):
            emit(event="log", message=f"line {number}")
        (run_dir / "talked").touch()
    if mode == "ignores SIGTERM":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        emit(event="log", message="ignoring")
        time.sleep(600)
    sys.stdin.buffer.read()
    return 0


def serve(path: Path, die_after: int | None) -> int:
    """Answer requests; after so many, be killed."""
    from fake_engine import FakeEngine

    from flexgen_lite.client_messages import EngineFailed, Submit

    def stop(*_: object) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)
    num_seen = 0

    def count(submit: Submit) -> None:
        nonlocal num_seen
        num_seen += len(submit.requests)
        if die_after is not None and num_seen > die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    with FakeEngine(path, window=64, on_submit=count) as engine:
        emit(event="ready", endpoint=engine.endpoint)
        try:
            sys.stdin.buffer.read()
        finally:
            engine.broadcast(EngineFailed("the engine was stopped"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
