"""What several engines do at once, told as of one."""

from __future__ import annotations

import pytest

from flexgen_lite.dispatch.status_of_all import status_of_all, without_work
from flexgen_lite.wire.client_messages import Status


def status(number: int) -> Status:
    return Status(
        running=2 + number,
        waiting=3,
        done=10,
        lanes={"compute": 0.8, "disk": 0.2 * number},
        totals={
            "generated_tokens": 100.0,
            "busy_seconds": 4.0 + 2 * number,
            "compute_seconds": 3.0,
            "requests_done": 9.0,
        },
        memory={"budget": 1000, "used": 300, "peak": 400},
        processes={"loader": {"planned": 5, "used": 4, "peak": 5}},
    )


def test_sums_and_averages() -> None:
    own = {"planned": 60, "used": 50, "peak": 55}
    found = status_of_all({0: status(0), 1: status(1)}, 2, 7, {"requests_done": 18}, own, 4000)
    assert (found.running, found.waiting, found.done) == (5, 13, 18)
    assert found.lanes == pytest.approx({"compute": 0.8, "disk": 0.1})
    assert found.totals == {"generated_tokens": 200, "busy_seconds": 5, "compute_seconds": 3, "requests_done": 18}
    assert found.memory == {"budget": 4000, "used": 650}
    assert [*found.processes] == ["dispatcher", "engine 0 loader", "engine 1 loader"]


def test_an_engine_that_is_gone_did_what_it_did() -> None:
    own = {"planned": 60, "used": 50, "peak": 55}
    found = status_of_all({0: status(0), 1: without_work(status(1))}, 2, 0, {"requests_done": 18}, own, 4000)
    assert (found.running, found.waiting) == (2, 3)
    assert found.totals["generated_tokens"] == 200 and found.lanes["compute"] == pytest.approx(0.4)
    assert found.memory["used"] == 350
