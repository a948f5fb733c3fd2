"""`flexgen-lite report`: a trace as one page of HTML that needs nothing else."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from flexgen_lite.cost.comparison import Prediction, where_they_part
from flexgen_lite.engine.lanes import LANES, TRAFFIC_LANES
from flexgen_lite.engine.trace_file import TRAFFIC
from flexgen_lite.report.bottleneck import verdict
from flexgen_lite.report.trace_reader import Series, Summary, TraceError, Track, look_closer, read_events, summarise
from flexgen_lite.text.sizes import format_size

PARTS = 240  # of the time, in charts
WINDOW_SPANS = 3000  # that are drawn of a pass
RATE_POINTS = 240
MOVED = {
    "disk_read_bytes": "weights",
    "uploaded_bytes": "weights",
    "kv_read_bytes": "KV cache",
    "state_bytes": "states, read and written",
}


def write_report(trace: Path, page: Path) -> str:
    """Writes the page; returns what it says of the bottleneck.

    Raises:
        TraceError: the trace is none, or has no pass.
        ValueError: the page would take the place of the trace.
        OSError: one of the files cannot be read or written.
    """
    if page.exists() and page.samefile(trace):
        raise ValueError(f"{page} is the trace: give another file for the page")
    try:
        summary = summarise(read_events(trace))
        if not summary.num_passes:
            raise TraceError(f"{trace} has no finished pass: the run ended before")
        chosen = choose_passes(summary.passes)
        windows = [(start, end) for _, start, end in chosen]
        detail = look_closer(read_events(trace), summary.begin, summary.end, PARTS, windows, WINDOW_SPANS)
    except (KeyError, TypeError, AttributeError) as error:
        raise TraceError(f"{trace} is damaged, or another program's: an event is not as ours are ({error})") from None
    shares = lane_shares(summary)
    predicted = Prediction.from_dict(summary.about.get("predicted"))
    sentence = verdict(shares, predicted.changes if predicted else ())
    if predicted is not None:
        seconds = summary.pass_time / 1e6
        busy = {lane: share * seconds for lane, share in shares.items()}
        if parted := where_they_part(predicted, seconds, busy):
            sentence += f" The run took {parted}."
    data = {
        "begin": summary.begin,
        "end": summary.end,
        "lanes": _lanes_over_time(detail.utilisation),
        "rates": {
            name: rates(summary.counters.get("tokens", Series()), name, summary) for name in ("generated", "prompt")
        },
        "memory": [(time, values["used"]) for time, values in _points(summary, "memory, bytes")],
        "budget": summary.about.get("ram_bytes", 0),
        "running": [(time, values["running"]) for time, values in _points(summary, "sequences")],
        "waiting": [(time, values["waiting"]) for time, values in _points(summary, "sequences")],
        "losses": [(time, f"{process} {what}") for time, process, what in summary.losses],
        "passes": [
            {"name": name, "start": start, "end": end, "left_out": left_out, "rows": _rows(spans)}
            for (name, start, end), spans, left_out in zip(chosen, detail.windows, detail.left_out, strict=True)
        ],
    }
    template = Template(files("flexgen_lite.report").joinpath("page.html").read_text(encoding="utf-8"))
    text = template.substitute(
        title=html.escape(Path(str(summary.about.get("model", trace.name))).name),
        verdict=html.escape(sentence),
        facts=_facts(summary, shares, predicted),
        plan=html.escape(str(summary.about.get("plan", "not in this trace"))),
        note=""
        if summary.is_whole
        else "<p class=note>The trace has no end: its engine was killed, or still runs.</p>",
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    )
    page.write_text(text, encoding="utf-8")
    return sentence


def choose_passes(passes: Series) -> list[tuple[str, float, float]]:
    """(name, beginning, end) of the first pass, which computes prompts, one of the middle, and the last but one."""
    points = passes.points
    indices = sorted({0, len(points) // 2, max(0, len(points) - 2)})
    return [(f"pass {int(points[i][1]['number'])}", points[i][0], points[i][1]["end"]) for i in indices]


def lane_shares(summary: Summary) -> dict[str, float]:
    """Share of the passes' time in which each lane was busy: that of its busiest row."""
    time = max(summary.pass_time, 1e-9)
    return {
        lane: min(1.0, max((busy for (_, row), busy in summary.busy.items() if row == lane), default=0.0) / time)
        for lane in LANES
    }


def lane_traffic(summary: Summary) -> dict[str, str]:
    """What each lane moved in passes, and at what rate while it was busy."""
    shares, counter = lane_shares(summary), summary.counters.get(TRAFFIC, Series())
    found = {}
    for name, lane in TRAFFIC_LANES.items():
        moved = counter.last.get(name, 0) - counter.first.get(name, 0)
        busy = shares[lane] * summary.pass_time / 1e6
        if moved > 0 and busy > 0:
            each = format_size(int(moved / summary.num_passes))
            found[lane] = f"{MOVED[name]}: {each} a pass, {moved / busy / 1e9:,.1f} GB/s"
    return found


def rates(tokens: Series, name: str, summary: Summary) -> list[tuple[float, float]]:
    """(time, tokens per second) over stretches long enough to be smooth."""
    least = (summary.end - summary.begin) / RATE_POINTS
    found, (before, count) = [], (summary.begin, 0.0)
    for time, values in tokens.points:
        if time - before >= least and time > before:
            found.append((time, (values[name] - count) / (time - before) * 1e6))
            before, count = time, values[name]
    return found


def _points(summary: Summary, name: str) -> Sequence[tuple[float, dict[str, float]]]:
    return summary.counters.get(name, Series()).points


def _lanes_over_time(utilisation: dict[Track, list[float]]) -> dict[str, list[float]]:
    """Of each lane that worked, that of its busiest row in each part of the time."""
    lanes = {}
    for lane in LANES:
        rows = [shares for (_, row), shares in utilisation.items() if row == lane]
        if rows:
            lanes[lane] = [round(max(parts), 4) for parts in zip(*rows, strict=True)]
    return lanes


def _rows(spans: Iterable[Any]) -> list[dict[str, Any]]:
    """Spans by process and row, lanes in their order."""
    rows: dict[Track, list[tuple[str, float, float]]] = {}
    for span in spans:
        rows.setdefault(span.track, []).append((span.name, span.start, span.end))
    order = {lane: number for number, lane in enumerate(LANES)}
    ranked = sorted(rows, key=lambda track: (order.get(track[1], -1), track[0]))
    return [{"process": process, "row": row, "spans": rows[process, row]} for process, row in ranked]


def _facts(summary: Summary, shares: dict[str, float], predicted: Prediction | None) -> str:
    """The numbers at the top."""
    seconds, between = summary.pass_time / 1e6, (summary.end - summary.begin - summary.pass_time) / 1e6
    counters = {name: summary.counters.get(name, Series()) for name in ("tokens", "requests", "memory, bytes")}
    tokens, budget = counters["tokens"].last, int(summary.about.get("ram_bytes", 0))
    peak = int(counters["memory, bytes"].most.get("used", 0))
    facts = {
        "time in passes": f"{seconds:,.1f} s" + (f", {between:,.1f} s between" if between >= 0.05 * seconds else ""),
        "passes": f"{summary.num_passes:,}",
        "generated": f"{tokens.get('generated', 0) / max(seconds, 1e-9):,.1f} tok/s",
        "prompts": f"{tokens.get('prompt', 0) / max(seconds, 1e-9):,.1f} tok/s",
        "requests": f"{counters['requests'].last.get('done', 0):,.0f}",
        "peak memory": f"{format_size(peak)} of {format_size(budget)}",
        "workers lost": str(len(summary.losses)),
        "model": f"{summary.about.get('class', '?')}, {summary.about.get('dtype', '?')}",
        "device": str(summary.about.get("device", "?")),
        "version": str(summary.about.get("version", "?")),
    }
    cells = [f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts.items()]
    traffic = lane_traffic(summary)
    foretold = {} if predicted is None else {lane: f"{time:,.1f} s predicted" for lane, time in predicted.lanes.items()}
    bars = [
        f"<tr><th>{lane}</th><td><div class=bar><i style='width:{share:.1%};background:var(--{lane})'></i></div></td>"
        f"<td class=num>{share:.0%}</td><td class=num>{share * seconds:,.1f} s</td>"
        f"<td class=moved>{foretold.get(lane, '')}</td><td class=moved>{html.escape(traffic.get(lane, ''))}</td></tr>"
        for lane, share in shares.items()
    ]
    return f"<dl>{''.join(cells)}</dl><table class=bars>{''.join(bars)}</table>"
