"""Counters over several engines go on, and never back."""

from __future__ import annotations

from flexgen_lite.client.status_sum import StatusSum
from flexgen_lite.wire.client_messages import Status


def status(done: int, busy: float, peak: int, **more: float) -> Status:
    totals = {"busy_seconds": busy, "compute_seconds": busy / 2, **more}
    return Status(1, 2, done, {"compute": 0.5}, totals, {"budget": 100, "used": 7, "peak": peak})


def test_counters_of_several_engines() -> None:
    sum_ = StatusSum()
    assert sum_.of(status(1, 1.0, 50), 0).totals["engine_restarts"] == 0
    first = sum_.of(status(5, 4.0, 90, restarts=2.0), 0)
    assert (first.done, first.totals["busy_seconds"], first.memory["peak"]) == (5, 4.0, 90)
    sum_.engine_lost()
    second = sum_.of(status(0, 0.0, 10), 1)
    assert (second.done, second.totals["busy_seconds"], second.memory["peak"]) == (5, 4.0, 90)
    assert (second.totals["engine_restarts"], second.totals["restarts"]) == (1.0, 2.0)
    third = sum_.of(status(3, 2.0, 95, restarts=1.0), 1)
    assert (third.done, third.totals["compute_seconds"], third.totals["restarts"]) == (8, 3.0, 3.0)
    assert third.memory == {"budget": 100, "used": 7, "peak": 95}
    assert (third.running, third.waiting, third.lanes) == (1, 2, {"compute": 0.5})


def test_engines_that_never_told_their_status() -> None:
    sum_ = StatusSum()
    for _ in range(3):
        sum_.engine_lost()
    assert sum_.of(status(1, 1.0, 5), 3).totals == {
        "busy_seconds": 1.0, "compute_seconds": 0.5, "engine_restarts": 3.0,
    }  # fmt: skip


def test_the_peak_of_a_gpu() -> None:
    sum_ = StatusSum()
    one = status(0, 0.0, 1)
    sum_.of(Status(0, 0, 0, {}, {}, {**one.memory, "gpu_peak": 8}), 0)
    sum_.engine_lost()
    assert sum_.of(one, 1).memory["gpu_peak"] == 8


def test_engines_behind_one_queue_have_restarts_of_their_own() -> None:
    total = StatusSum()
    some = status(0, 0.0, 10, engine_restarts=2.0)
    assert total.of(some, 0).totals["engine_restarts"] == 2
    total.engine_lost()
    assert total.of(status(0, 0.0, 10, engine_restarts=1.0), 1).totals["engine_restarts"] == 2 + 1 + 1
