"""Busy shares, and the time between the lanes' work."""

from __future__ import annotations

import json
from pathlib import Path

from flexgen_lite.lanes import Lanes


def test_time_without_a_busy_lane_is_overhead() -> None:
    lanes = Lanes(None)
    lanes.add("compute", "compute", "a", 10, 40)
    lanes.add("attention", "attention worker 0", "a", 45, 60)
    lanes.add("compute", "compute", "b", 50, 80)
    lanes.end_pass("pass 1", 0, 100)
    assert lanes.overhead_ns == 10 + 5 + 20
    assert lanes.busy_ns["compute"] == 60 and lanes.busy_ns["attention"] == 15
    lanes.end_pass("pass 2", 100, 130)
    assert lanes.overhead_ns == 35 + 30, "the spans of a pass count once"


def test_a_lane_is_as_busy_as_its_busiest_track_whatever_the_order_of_reports() -> None:
    lanes = Lanes(None)
    lanes.add("attention", "attention worker 0", "a", 0, 30)
    lanes.add("attention", "attention worker 1", "a", 0, 50)
    lanes.add("attention", "attention worker 0", "b", 30, 40)
    assert lanes.busy_ns["attention"] == 50


def test_spans_that_overlap_on_a_track_count_once() -> None:
    lanes = Lanes(None)
    lanes.add("compute", "compute", "a", 0, 30)
    lanes.add("compute", "compute", "b", 20, 50)
    assert lanes.busy_ns["compute"] == 50


def test_the_trace_is_json(tmp_path: Path) -> None:
    lanes = Lanes(tmp_path / "trace.json")
    lanes.add("disk", "disk", "load 1", 1000, 3000)
    lanes.end_pass("pass 1", 0, 5000)
    lanes.close()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [(event["name"], event["ts"], event["dur"]) for event in events if event["ph"] == "X"]
    assert spans == [("load 1", 1.0, 2.0), ("pass 1", 0.0, 5.0)]
