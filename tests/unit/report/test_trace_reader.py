"""Traces: written, read back, cut off, and made into a page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flexgen_lite.cli.main import app
from flexgen_lite.cost.comparison import Prediction
from flexgen_lite.engine.lanes import Lanes
from flexgen_lite.engine.trace_file import TRAFFIC, TraceFile
from flexgen_lite.report.bottleneck import verdict
from flexgen_lite.report.page import choose_passes, lane_shares, lane_traffic, rates, write_report
from flexgen_lite.report.trace_reader import MOST_POINTS, Series, TraceError, look_closer, read_events, summarise

SECOND = 1_000_000_000  # nanoseconds
DISK, COMPUTE, ATTENTION = ("disk loader", "disk"), ("compute worker", "compute"), ("attention worker 0", "attention")


def write_trace(path: Path, passes: int = 3, close: bool = True) -> Path:
    """Passes of a second: the disk works for 0.2 s, products for 0.8, attention for 0.4 beside them."""
    trace = TraceFile(path)
    trace.about({"model": "a/<model>", "class": "C", "dtype": "float32", "plan": "the <plan>", "ram_bytes": 1 << 30})
    for number in range(passes):
        start = 10 * SECOND + number * SECOND
        trace.span(*DISK, "load 1", start, start + SECOND // 5)
        trace.span(*COMPUTE, "layer 0", start + SECOND // 5, start + SECOND)
        trace.span(*ATTENTION, "layer 0", start + SECOND // 5, start + 3 * SECOND // 5)
        trace.span("coordinator", "pass", f"pass {number + 1}", start, start + SECOND)
        trace.counter("tokens", start + SECOND, {"generated": 10 * (number + 1), "prompt": 100})
        trace.counter("memory, bytes", start + SECOND, {"used": 1 << 20})
        trace.counter("sequences", start + SECOND, {"running": 5, "waiting": 2 - number})
        trace.counter("requests", start + SECOND, {"done": number})
    trace.instant("disk loader", "lost: killed", 11 * SECOND)
    if close:
        trace.close()
    else:
        trace._file.flush()
    return path


def test_a_summary_has_what_was_written(tmp_path: Path) -> None:
    found = summarise(read_events(write_trace(tmp_path / "t.json")))
    assert found.num_passes == 3 and found.is_whole
    assert (found.begin, found.end, found.pass_time) == (10e6, 13e6, 3e6)
    assert found.busy == {DISK: pytest.approx(6e5), COMPUTE: pytest.approx(24e5), ATTENTION: pytest.approx(12e5)}
    assert found.losses == [(11e6, "disk loader", "lost: killed")]
    assert found.about["plan"] == "the <plan>"
    shares = lane_shares(found)
    assert shares == pytest.approx(
        {"disk": 0.2, "host-to-device": 0, "compute": 0.8, "attention": 0.4, "device-to-host": 0}
    )
    assert rates(found.counters["tokens"], "generated", found) == [(11e6, 10), (12e6, 10), (13e6, 10)]
    assert [name for name, _, _ in choose_passes(found.passes)] == ["pass 1", "pass 2"]


def test_shares_of_equal_parts_of_the_time(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t.json")
    detail = look_closer(read_events(path), 10e6, 13e6, 6, [(11e6, 12e6)], 100)
    assert detail.utilisation[DISK] == pytest.approx([0.4, 0, 0.4, 0, 0.4, 0])
    assert detail.utilisation[COMPUTE] == pytest.approx([0.6, 1, 0.6, 1, 0.6, 1])
    assert detail.utilisation[ATTENTION] == pytest.approx([0.6, 0.2, 0.6, 0.2, 0.6, 0.2])
    assert [(span.track, span.start, span.end) for span in detail.windows[0]] == [
        (DISK, 11e6, 11.2e6), (COMPUTE, 11.2e6, 12e6), (ATTENTION, 11.2e6, 11.6e6),
        (("coordinator", "pass"), 11e6, 12e6),
    ]  # fmt: skip
    few = look_closer(read_events(path), 10e6, 13e6, 6, [(11e6, 12e6)], 1)
    assert len(few.windows[0]) == 1 and few.left_out == [3]


def test_loading_before_the_first_pass_and_work_between_passes_do_not_count(tmp_path: Path) -> None:
    """A load that reaches into a pass, and is told of only after it, counts with the part that lies in it."""
    trace = TraceFile(tmp_path / "t.json")
    trace.span(*DISK, "load 0", 0, 10 * SECOND)
    trace.span(*COMPUTE, "layer 0", 10 * SECOND, 11 * SECOND)
    trace.span("coordinator", "pass", "pass 1", 10 * SECOND, 11 * SECOND)
    trace.span(*DISK, "load 1", 10 * SECOND + SECOND // 2, 15 * SECOND)  # ends in the idle time behind the pass
    trace.span(*DISK, "load 2", 29 * SECOND, 31 * SECOND)
    trace.span("coordinator", "pass", "pass 2", 30 * SECOND, 32 * SECOND)
    trace.close()
    found = summarise(read_events(tmp_path / "t.json"))
    assert found.busy == {DISK: pytest.approx(1.5e6), COMPUTE: pytest.approx(1e6)}
    assert lane_shares(found)["disk"] == pytest.approx(0.5)
    assert "3.0 s, 19.0 s between" in _page(tmp_path / "t.json")


def test_what_lanes_move_counts_from_the_first_pass_on(tmp_path: Path) -> None:
    """1 GB is loaded before it."""
    path = tmp_path / "t.json"
    trace = TraceFile(path)
    for number in range(3):
        start = (10 + number) * SECOND
        trace.span(*DISK, "load 1", start, start + SECOND // 5)
        trace.span(*COMPUTE, "layer 0", start, start + SECOND // 2)
        for passes, time in [(0, start)] * (number == 0) + [(number + 1, start + SECOND)]:
            moved = {"disk_read_bytes": 10**9 * (1 + passes), "kv_read_bytes": 0, "state_bytes": (2 << 30) * passes}
            trace.counter(TRAFFIC, time, moved)
        trace.span("coordinator", "pass", f"pass {number + 1}", start, start + SECOND)
    trace.close()
    assert lane_traffic(summarise(read_events(path))) == {
        "disk": "weights: 953.7 MiB a pass, 5.0 GB/s",
        "compute": "states, read and written: 2.0 GiB a pass, 4.3 GB/s",
    }
    assert "states, read and written: 2.0 GiB a pass" in _page(path)
    assert lane_traffic(summarise(read_events(write_trace(tmp_path / "older.json")))) == {}


def test_a_killed_engine_leaves_what_it_was_and_all_passes(tmp_path: Path) -> None:
    lanes = Lanes(tmp_path / "t.json")
    assert lanes.trace is not None
    lanes.trace.about({"model": "m"})
    assert summarise(read_events(tmp_path / "t.json")).about == {"model": "m"}
    lanes.end_pass("pass 1", 0, SECOND)
    assert summarise(read_events(tmp_path / "t.json")).num_passes == 1


def test_a_full_disk_ends_the_trace_and_not_the_run() -> None:
    warnings: list[str] = []
    lanes = Lanes(Path("/dev/full"), warnings.append)
    for number in range(3):
        lanes.add("disk", "disk", "load", number * SECOND, (number + 1) * SECOND)
        lanes.end_pass("pass", number * SECOND, (number + 1) * SECOND)
    lanes.close()
    assert warnings == ["the trace /dev/full ends here: No space left on device"]
    assert lanes.busy_ns["disk"] == 3 * SECOND


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_trace_that_a_crash_has_cut_off_is_read(tmp_path: Path, cut: int) -> None:
    path = write_trace(tmp_path / "t.json", passes=5, close=False)
    path.write_bytes(path.read_bytes()[:-cut])
    found = summarise(read_events(path))
    assert not found.is_whole and found.num_passes == 5
    assert "killed, or still runs" in _page(path)


def _page(trace: Path) -> str:
    page = trace.with_suffix(".html")
    write_report(trace, page)
    return page.read_text(encoding="utf-8")


def test_the_page_stands_alone_and_shows_names_as_they_are(tmp_path: Path) -> None:
    page = _page(write_trace(tmp_path / "t.json"))
    assert "The bottleneck is compute, busy 80% of the time (attention 40%, disk 20%)" in page
    assert "&lt;model&gt;" in page and "the &lt;plan&gt;" in page and "<plan>" not in page
    assert not re.search(r"""(src|href)=|@import|url\(|https?://(?!www\.w3\.org/2000/svg)""", page)
    data = json.loads(re.findall(r'id="data">(.*?)</script>', page, re.S)[0])
    assert [one["name"] for one in data["passes"]] == ["pass 1", "pass 2"]
    assert [row["row"] for row in data["passes"][0]["rows"]] == ["pass", "disk", "compute", "attention"]
    assert data["running"][0] == [11e6, 5] and data["waiting"][0] == [11e6, 2]
    assert data["budget"] == 1 << 30 and data["losses"] == [[11e6, "disk loader lost: killed"]]


def test_the_page_has_what_was_predicted(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.json")
    summary = summarise(read_events(trace))
    seconds = summary.pass_time / 1e6
    predicted = Prediction(seconds / 2, {"compute": 0.1}, (("twice the RAM", 1.6),))
    text = trace.read_text(encoding="utf-8").replace(
        '"ram_bytes"', f'"predicted": {json.dumps(predicted.to_dict())}, "ram_bytes"'
    )
    trace.write_text(text, encoding="utf-8")
    sentence = write_report(trace, tmp_path / "r.html")
    assert "twice the RAM would give 1.6 x" in sentence and "were predicted, +100%: they part at" in sentence
    assert "0.1 s predicted" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_the_trace_opens_as_json_too(tmp_path: Path) -> None:
    events = json.loads(write_trace(tmp_path / "t.json").read_text(encoding="utf-8"))["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert sorted(names.values()) == ["attention worker 0", "compute worker", "coordinator", "disk loader"]


def test_a_long_run_is_thinned_out() -> None:
    series = Series()
    for number in range(50_000):
        series.add(number, {"value": number})
    assert MOST_POINTS // 2 <= len(series.points) <= MOST_POINTS
    steps = {after[0] - before[0] for before, after in zip(series.points, series.points[1:], strict=False)}
    assert len(steps) == 1, "evenly"
    assert series.last == series.most == {"value": 49_999}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not a trace"),
        (b'{"a": 1}\n', "is not a trace"),
        (b"\x00\xff" * 5000, "is not a trace"),
        (b'{"traceEvents": [\n{"name"\n{}\n', "is damaged"),
        (b'{"traceEvents": [\n{"what": 1}\n]}\n', "is damaged, or another program's"),
        (b'{"traceEvents": [\n[]\n]}\n', "is damaged, or another program's"),
        (b'{"traceEvents": [\n]}\n', "no finished pass"),
    ],
)
def test_what_is_no_trace(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=words):
        write_report(path, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_the_command(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.json")
    runner = CliRunner()
    done = runner.invoke(app, ["report", str(trace), "-o", str(tmp_path / "r.html")])
    assert done.exit_code == 0 and "The bottleneck is compute" in done.output
    assert (tmp_path / "r.html").stat().st_size > 5000
    for arguments, words in (
        (["report", str(tmp_path / "none.json")], "No such file"),
        (["report", str(trace), "-o", str(tmp_path / "none" / "r.html")], "No such file"),
        (["report", str(trace), "-o", str(tmp_path)], "Is a directory"),
        (["report", __file__, "-o", str(tmp_path / "other.html")], "is not a trace of flexgen-lite"),
        (["report", str(trace), "-o", str(trace)], "is the trace: give another file"),
    ):
        done = runner.invoke(app, arguments)
        assert done.exit_code == 2 and words in done.output, done.output


def test_the_sentence() -> None:
    one, none = verdict({"compute": 0.95, "disk": 0.4}), verdict({"compute": 0.5, "disk": 0.45})
    assert one.startswith("The bottleneck is compute, busy 95% of the time (disk 40%)")
    assert none.startswith("No lane is the bottleneck: the busiest, compute, worked 50%")
    changes = [("twice the RAM", 1.62), ("a faster disk", 1.2), ("half the RAM", 0.7)]
    helped = verdict({"disk": 0.85}, changes)
    assert helped.endswith("disk, busy 85% of the time: twice the RAM would give 1.6 x, a faster disk 1.2 x.")
    assert "none of half the RAM would help much" in verdict({"disk": 0.85}, changes[2:])
    assert "wait for each other: twice the RAM would give 1.6 x" in verdict({"disk": 0.5}, changes)
    assert verdict({"compute": 0.0}) == "No pass has ended in this trace."
