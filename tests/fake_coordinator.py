"""A coordinator's start-up protocol without an engine behind it: python fake_coordinator.py MODE[,MODE...].

Of several modes the first is for the first start, and so on, the last for all that follow; starts are counted in the
file that FAKE_COORDINATOR_STARTS names.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path


def emit(**event: object) -> None:
    print(json.dumps(event), flush=True)


DECIDED = {"ram": 2 << 30, "dtype": "bfloat16", "device": "cpu", "files": "the same"}


def main(modes: str) -> int:
    mode = mode_of_this_start(modes.split(","))
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
    decided = {**DECIDED, "files": "others"} if mode == "serves another model" else DECIDED
    emit(event="plan", text="weights: 1.0 GiB\nkv: 2.0 GiB", decided=decided)
    print("a library prints this")
    if mode in SERVING:
        emit(event="log", message=f"config: {json.dumps(order['config'])}")
        return serve(run_dir / "clients", *SERVING[mode])
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


def mode_of_this_start(modes: list[str]) -> str:
    if len(modes) == 1:
        return modes[0]
    starts = Path(os.environ["FAKE_COORDINATOR_STARTS"])
    with starts.open("a") as file:
        file.write("x")
    return modes[min(starts.stat().st_size, len(modes)) - 1]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(3600)  # another thread may be the first that is stopped


def fail(message: str, user_error: bool = False, comes_again: bool = False) -> None:
    emit(event="failed", message=message, user_error=user_error, details="", comes_again=comes_again)
    os._exit(2 if user_error else 1)


SERVING: dict[str, tuple[int, Callable[[], None]]] = {
    "serves": (1 << 62, die),
    "serves another model": (1 << 62, die),
    "dies on the way": (200, die),
    "dies when asked": (0, die),
    "hangs when asked": (0, hang),
    "fails when asked": (0, lambda: fail("the loader died")),
    "user error when asked": (0, lambda: fail("the model changed", user_error=True)),
    "fails for good when asked": (0, lambda: fail("a file changed", comes_again=True)),
}


def serve(path: Path, num_good: int, end: Callable[[], None]) -> int:
    """Answer so many requests; then come to an end."""
    from fake_engine import FakeEngine

    from flexgen_lite.wire.client_messages import EngineFailed, Submit

    def stop(*_: object) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)
    num_seen = 0

    def count(submit: Submit) -> None:
        nonlocal num_seen
        num_seen += len(submit.requests)
        if num_seen > num_good:
            end()

    with FakeEngine(path, window=64, on_submit=count) as engine:
        emit(event="ready", endpoint=engine.endpoint)
        try:
            sys.stdin.buffer.read()
        finally:
            engine.broadcast(EngineFailed("the engine was stopped"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
