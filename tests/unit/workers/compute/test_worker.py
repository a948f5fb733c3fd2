"""In which order a compute worker tells of segments and runs them."""

from __future__ import annotations

from typing import Any

import pytest

from flexgen_lite.schedule.segment_queue import SegmentQueue
from flexgen_lite.wire.worker_messages import SegmentDone
from flexgen_lite.workers.compute.worker import ComputeWorker

COLUMNS = 3


class Spec:
    columns = tuple(range(COLUMNS))
    stops = ()


class Opened:
    spec = Spec()


class Told:
    """A context that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int, bool]] = []

    def tell(self, item: SegmentDone, at_once: bool) -> None:
        self.events.append(("told", item.column, at_once))


@pytest.mark.parametrize(
    ("streaming", "column", "first", "second"),
    [
        (True, 0, [("told", 0, True)], [("ran", 1, True)]),
        (False, 0, [("told", 0, False), ("ran", 1, True)], []),
        (False, COLUMNS, [("told", COLUMNS, True)], [("ran", 1, True)]),
    ],
)
def test_what_is_waited_for_is_on_its_way_before_the_next_segment_runs(
    streaming: bool, column: int, first: list[Any], second: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    context: Any = Told()
    worker = ComputeWorker(context)
    queue = SegmentQueue([1], 1)
    queue.grant(0, 0, 0)
    assert queue.take() == (0, 0, 0)
    queue.grant(1, 0, 1)
    queue.attended(0, 0)
    monkeypatch.setattr(worker, "_opened", Opened())
    monkeypatch.setattr(worker, "_queue", queue)
    monkeypatch.setattr(worker, "_streaming", streaming)
    monkeypatch.setattr(worker, "_run", lambda column, *_: context.events.append(("ran", column, True)))
    worker._pass_id = 7
    worker._ended.append((7, SegmentDone(column, 0, False, 1, 2, 0, 0, (), (), (), 0)))
    assert worker.work(), "it is called again at once"
    assert context.events == first
    context.events.clear()
    worker.work()
    assert context.events == second
