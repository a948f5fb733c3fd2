"""Busy shares of the last seconds."""

from __future__ import annotations

import pytest

from flexgen_lite.engine import stats
from flexgen_lite.engine.lanes import Lanes
from flexgen_lite.engine.stats import EngineStats
from flexgen_lite.memory.usage import MemoryUse

SECOND = 1_000_000_000


def test_an_idle_time_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100 * SECOND
    monkeypatch.setattr(stats.time, "monotonic_ns", lambda: now)
    found = EngineStats(Lanes(None, print), MemoryUse([]))
    for idle in (0, 3600):
        now += idle * SECOND
        for number in range(3):
            found.pass_begins()
            found.lanes.add("compute", "compute", "segment", now, now + SECOND // 2)
            now += SECOND
            found.pass_ends(f"pass {number}")
        assert found.status(0, 0, {}, 0).lanes["compute"] == pytest.approx(0.5, abs=0.01)
