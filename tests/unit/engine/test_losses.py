"""When requests that make workers fail are told so: not before another pass, without them, has gone well, or no pass is
to come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from flexgen_lite.engine.losses import MOST_GUILTY, Losses
from flexgen_lite.engine.worker_process import WorkerDied
from flexgen_lite.queue.poison_requests import TRIES, PoisonRequests

WORKER: Any = SimpleNamespace(name="attention worker 0", kind="attention", index=0)


class Workers:
    not_ready = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def did_something(self, worker: object) -> None: ...


class Requests:
    """`to_come`: what each of the next passes holds."""

    def __init__(self, *to_come: int) -> None:
        self.to_come = list(to_come)
        self.waits_for_disk = False
        self.aside: list[int] = []

    def set_aside(self, guilty: int) -> None:
        self.aside.append(guilty)

    def fail(self, request: int, text: str) -> list[int]:
        assert "computed this request alone" in text
        return [request]


class Passes:
    """Of one request each, while nothing is awaited from the disk."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self.poison = PoisonRequests()
        self.suspended = False
        self.begin_at = None
        self.running: list[Any] = []
        self.on_end = lambda: None
        self.schedule = SimpleNamespace(suspend=lambda: None, abandon_pass=list)
        self.weights = SimpleNamespace(is_quiet=True, carry_out=lambda orders: None)

    def begin(self) -> None:
        if self._requests.to_come and not self._requests.waits_for_disk:
            piece = SimpleNamespace(request=SimpleNamespace(id=self._requests.to_come.pop(0)))
            self.running = [SimpleNamespace(pieces=[piece], num_rows=1)]

    def start(self) -> None: ...

    def drop(self) -> None:
        self.running = []

    def end_well(self) -> None:
        self.running = []
        self.poison.passed()
        self.on_end()
        self.begin()


class Engine:
    def __init__(self, *to_come: int) -> None:
        self.told: list[int] = []
        self.requests = Requests(*to_come)
        self.passes = Passes(self.requests)
        parts: Any = self.passes, self.requests, Workers()
        self.losses = Losses(*parts, self.tell)
        self.losses.go_on()

    def tell(self, answers: Iterable[Any]) -> None:
        self.told += answers

    def lose(self) -> None:
        """The pass, as often as it takes to find its request guilty."""
        for _ in range(TRIES):
            assert self.passes.running
            self.losses.lost(WORKER, WorkerDied("it died"))
            self.losses.go_on()


def test_the_guilty_are_told_when_another_pass_has_gone_well() -> None:
    engine = Engine(1, 2, 3)
    engine.lose()
    engine.lose()
    assert engine.requests.aside == [1, 2] and engine.passes.running and engine.told == []
    engine.passes.end_well()
    assert engine.told == [1, 2]


def test_where_no_pass_is_to_come_they_are_told_at_once() -> None:
    engine = Engine(1)
    engine.lose()
    assert engine.told == [1]


@pytest.mark.parametrize("to_come", [(1, 2), (1,)])
def test_a_pass_that_waits_for_the_disk_is_still_to_come(to_come: tuple[int, ...]) -> None:
    engine = Engine(*to_come)
    engine.requests.waits_for_disk = True
    engine.lose()
    assert not engine.passes.running and engine.told == [], "others may fail as well when they are read"
    engine.losses.go_on()
    assert engine.told == []
    engine.requests.waits_for_disk = False
    engine.losses.go_on()
    assert engine.told == ([1] if len(to_come) == 1 else []), "nobody is left, or somebody runs"
    if len(to_come) > 1:
        engine.passes.end_well()
        assert engine.told == [1]


def test_where_all_make_workers_fail_nobody_is_blamed() -> None:
    """Also if one of them had to be read from disk first."""
    engine = Engine(*range(MOST_GUILTY))
    for _ in range(MOST_GUILTY - 2):
        engine.lose()
    engine.requests.waits_for_disk = True
    engine.lose()
    engine.requests.waits_for_disk = False
    engine.losses.go_on()
    with pytest.raises(WorkerDied, match="it is not the requests"):
        engine.lose()
    assert engine.told == []
