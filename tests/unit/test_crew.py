"""How often a worker may be lost before the engine ends."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexgen_lite import crew as crew_module
from flexgen_lite.crew import FAILED_STARTS, IDLE_FAILURES, IDLE_LOSSES, Crew
from flexgen_lite.worker_process import WorkerDied

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
def crew(monkeypatch: pytest.MonkeyPatch) -> Crew:
    monkeypatch.setattr(crew_module, "WorkerProcess", NoProcess)
    nothing: Any = Nothing()
    arenas: Any = {name: SimpleNamespace(fd=0) for name in ("weights", "kv", "exchange")}
    crew = Crew(
        nothing,
        nothing,
        Path(),
        arenas,
        nothing,
        nothing.any,
        nothing.any,
        lambda worker, _: void(crew.start_again(worker)),
    )
    crew.start(1)
    return crew


def void(_: object) -> None: ...


def lose(crew: Crew, error: WorkerDied = KILLED) -> None:
    crew.lose(crew.attention(0), error)


def test_few_failed_starts(crew: Crew) -> None:
    for _ in range(FAILED_STARTS):
        lose(crew)
    with pytest.raises(WorkerDied, match=f"{NAME} was lost 4 times in a row before it had started; .* by SIGKILL"):
        lose(crew)


def test_a_good_start_forgives_failed_ones(crew: Crew) -> None:
    for _ in range(3):
        for _ in range(FAILED_STARTS):
            lose(crew)
        crew.ready(crew.attention(0))
        lose(crew)
    assert crew.restarts == 3 * (FAILED_STARTS + 1)


def test_many_losses_after_good_starts(crew: Crew) -> None:
    for _ in range(IDLE_LOSSES):
        crew.ready(crew.attention(0))
        lose(crew)
    crew.ready(crew.attention(0))
    with pytest.raises(WorkerDied, match=f"{NAME} was lost 16 times in a row with nothing done in between"):
        lose(crew)


def test_few_failures_of_its_own_after_good_starts(crew: Crew) -> None:
    failed = WorkerDied("attention worker 0 failed: RuntimeError: no", kind="RuntimeError")
    for _ in range(IDLE_FAILURES):
        crew.ready(crew.attention(0))
        lose(crew, failed)
    crew.ready(crew.attention(0))
    with pytest.raises(WorkerDied, match=f"{NAME} was lost 4 times in a row with nothing done in between"):
        lose(crew, failed)


def test_work_forgives_losses(crew: Crew) -> None:
    for _ in range(2 * IDLE_LOSSES):
        crew.ready(crew.attention(0))
        crew.did_something(crew.attention(0))
        lose(crew)
    assert crew.restarts == 2 * IDLE_LOSSES


@pytest.mark.parametrize("error", [WorkerDied("no", kind="CheckpointError"), WorkerDied("no", user_error=True)])
def test_failures_that_the_next_process_would_meet_too(crew: Crew, error: WorkerDied) -> None:
    crew.ready(crew.attention(0))
    with pytest.raises(WorkerDied, match="no"):
        lose(crew, error)


def test_an_exception_at_the_first_start(crew: Crew) -> None:
    with pytest.raises(WorkerDied, match="broken"):
        lose(crew, WorkerDied("broken", kind="RuntimeError"))
