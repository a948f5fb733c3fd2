"""Busy shares, and the time between the lanes' work."""

from __future__ import annotations

import json
from pathlib import Path

from flexgen_lite.engine.lanes import Lanes


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


def test_the_trace_has_a_process_for_each_process(tmp_path: Path) -> None:
    lanes = Lanes(tmp_path / "trace.json")
    lanes.add("disk", "disk", "load 1", 1000, 3000)
    lanes.add("compute", "compute", "layer 0", 2000, 4000)
    lanes.add("host-to-device", "host-to-device", "upload 0", 2000, 2500)
    lanes.add("attention", "attention worker 1", "layer 0", 2500, 4500)
    lanes.end_pass("pass 1", 0, 5000)
    lanes.close()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    spans = [
        (names[event["pid"]], tracks[event["tid"]], event["name"], event["ts"], event["dur"])
        for event in events
        if event["ph"] == "X"
    ]
    assert spans == [
        ("disk loader", "disk", "load 1", 1.0, 2.0),
        ("compute worker", "compute", "layer 0", 2.0, 2.0),
        ("compute worker", "host-to-device", "upload 0", 2.0, 0.5),
        ("attention worker 1", "attention", "layer 0", 2.5, 2.0),
        ("coordinator", "pass", "pass 1", 0.0, 5.0),
    ]
