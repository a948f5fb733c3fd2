"""How often a worker may be lost before the engine ends."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexgen_lite.engine import worker_supervisor as supervisor_module
from flexgen_lite.engine.worker_process import WorkerDied
from flexgen_lite.engine.worker_supervisor import FAILED_STARTS, IDLE_FAILURES, IDLE_LOSSES, WorkerSupervisor
from flexgen_lite.engine.zygote import SHARED

NAME = "attention worker 0"
KILLED = WorkerDied("attention worker 0 (process 7) was killed by SIGKILL")


class NoProcess:
    """Stands for a worker process."""

    def __init__(self, kind: str, name: str, number: int, *_: Any) -> None:
        self.kind, self.name, self.number = kind, name, number
        self.pid = self.socket = self.output = self.pidfd = 0

    def kill(self) -> None: ...

    def close(self) -> None: ...


class Nothing:
    """Takes every call."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> WorkerSupervisor:
    monkeypatch.setattr(supervisor_module, "WorkerProcess", NoProcess)
    monkeypatch.delenv(SHARED, raising=False)
    nothing: Any = Nothing()
    arenas: Any = {name: SimpleNamespace(fd=0) for name in ("weights", "kv", "exchange", "states")}
    workers = WorkerSupervisor(
        nothing,
        nothing,
        Path(),
        arenas,
        nothing,
        nothing.any,
        nothing.any,
        lambda worker, _: void(workers.start_again(worker)),
    )
    workers.start(1)
    return workers


def void(_: object) -> None: ...


def lose(workers: WorkerSupervisor, error: WorkerDied = KILLED) -> None:
    workers.lose(workers.attention(0), error)


def test_few_failed_starts(workers: WorkerSupervisor) -> None:
    for _ in range(FAILED_STARTS):
        lose(workers)
    with pytest.raises(WorkerDied, match=f"{NAME} was lost 4 times in a row before it had started; .* by SIGKILL"):
        lose(workers)


def test_a_good_start_forgives_failed_ones(workers: WorkerSupervisor) -> None:
    for _ in range(3):
        for _ in range(FAILED_STARTS):
            lose(workers)
        workers.ready(workers.attention(0))
        lose(workers)
    assert workers.restarts == 3 * (FAILED_STARTS + 1)


def test_many_losses_after_good_starts(workers: WorkerSupervisor) -> None:
    for _ in range(IDLE_LOSSES):
        workers.ready(workers.attention(0))
        lose(workers)
    workers.ready(workers.attention(0))
    with pytest.raises(WorkerDied, match=f"{NAME} was lost 16 times in a row with nothing done in between"):
        lose(workers)


def test_few_failures_of_its_own_after_good_starts(workers: WorkerSupervisor) -> None:
    failed = WorkerDied("attention worker 0 failed: RuntimeError: no", kind="RuntimeError")
    for _ in range(IDLE_FAILURES):
        workers.ready(workers.attention(0))
        lose(workers, failed)
    workers.ready(workers.attention(0))
    with pytest.raises(WorkerDied, match=f"{NAME} was lost 4 times in a row with nothing done in between"):
        lose(workers, failed)


def test_work_forgives_losses(workers: WorkerSupervisor) -> None:
    for _ in range(2 * IDLE_LOSSES):
        workers.ready(workers.attention(0))
        workers.did_something(workers.attention(0))
        lose(workers)
    assert workers.restarts == 2 * IDLE_LOSSES


@pytest.mark.parametrize("error", [WorkerDied("no", kind="CheckpointError"), WorkerDied("no", user_error=True)])
def test_failures_that_the_next_process_would_meet_too(workers: WorkerSupervisor, error: WorkerDied) -> None:
    workers.ready(workers.attention(0))
    with pytest.raises(WorkerDied, match="no"):
        lose(workers, error)


def test_an_exception_at_the_first_start(workers: WorkerSupervisor) -> None:
    with pytest.raises(WorkerDied, match="broken"):
        lose(workers, WorkerDied("broken", kind="RuntimeError"))
