"""What a trace says, read line by line: it may be larger than memory, and its end may be cut off.

Times are microseconds of the traced machine's monotonic clock.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexgen_lite.engine.trace_file import ABOUT, COORDINATOR

MOST_POINTS = 2000  # that are kept of a counter
MOST_INSTANTS = 200
RECENT_PASSES = 8  # that a span told of late may lie in
PASS_TRACK = "pass"
Track = tuple[str, str]  # process, row


class TraceError(ValueError):
    """A file that is no trace."""


@dataclass(frozen=True, slots=True)
class Span:
    track: Track
    name: str
    start: float
    end: float


@dataclass(slots=True)
class Series:
    """A counter over time, thinned out evenly as it grows.

    Attributes:
        points: (time, values).
        first, last: values, thinned out or not.
        most: the largest of each.
    """

    points: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    most: dict[str, float] = field(default_factory=dict)
    _every: int = 1
    _seen: int = 0

    def add(self, time: float, values: dict[str, float]) -> None:
        self.first, self.last = self.first or values, values
        for name, value in values.items():
            self.most[name] = max(value, self.most.get(name, value))
        if self._seen % self._every == 0:
            self.points.append((time, values))
            if len(self.points) > MOST_POINTS:
                self.points = self.points[::2]
                self._every *= 2
        self._seen += 1


@dataclass(slots=True)
class Summary:
    """
    Attributes:
        about: what was traced.
        busy: microseconds of work on each track within passes: not the first loading, and nothing between jobs.
        passes: beginnings, ends and names; thinned out like counters.
        num_passes: of all.
        pass_time: microseconds in which passes ran.
        counters: by name.
        losses: (time, process, what was said) of workers that were lost; the first ones.
        begin, end: of the first and last pass.
        is_whole: the file has its end.
    """

    about: dict[str, Any] = field(default_factory=dict)
    busy: dict[Track, float] = field(default_factory=dict)
    passes: Series = field(default_factory=Series)
    num_passes: int = 0
    pass_time: float = 0.0
    counters: dict[str, Series] = field(default_factory=dict)
    losses: list[tuple[float, str, str]] = field(default_factory=list)
    begin: float = float("inf")
    end: float = float("-inf")
    is_whole: bool = False


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a trace, in the order in which they were written.

    Raises:
        TraceError: it is none of ours.
        OSError: it cannot be read.
    """
    with path.open("rb") as lines:
        first = lines.readline(1 << 16)
        if b'"traceEvents": [' not in first:
            raise TraceError(f"{path} is not a trace of flexgen-lite: give a file that --trace has written")
        for line in lines:
            text = line.strip().rstrip(b",")
            if text in (b"]}", b""):
                if text:
                    yield {"ph": "end"}
                continue
            try:
                event = json.loads(text)
            except ValueError:
                if line.endswith(b"\n"):
                    raise TraceError(f"{path} is damaged: {text[:60]!r} is no event") from None
                return  # a crash has cut it off
            yield event


class _Names:
    """Which process and row the numbers of an event stand for."""

    def __init__(self) -> None:
        self._processes: dict[int, str] = {}
        self._tracks: dict[int, Track] = {}

    def learn(self, event: dict[str, Any]) -> None:
        if event["name"] == "process_name":
            self._processes[event["pid"]] = event["args"]["name"]
        elif event["name"] == "thread_name":
            self._tracks[event["tid"]] = self.process(event), event["args"]["name"]

    def process(self, event: dict[str, Any]) -> str:
        return self._processes.get(event["pid"], "?")

    def track(self, event: dict[str, Any]) -> Track:
        return self._tracks.get(event["tid"], ("?", "?"))


class _BusyInPasses:
    """Adds up the time of spans that lies in passes. A pass is told of when it is over, a span too: either may come
    first. Memory: the spans since the last pass."""

    def __init__(self) -> None:
        self.busy: dict[Track, float] = {}
        self._ends: dict[Track, float] = {}
        self._passes: deque[tuple[float, float]] = deque(maxlen=RECENT_PASSES)
        self._open: list[tuple[Track, float, float]] = []  # spans that may reach into the next pass

    def span(self, track: Track, start: float, end: float) -> None:
        begin = max(start, self._ends.get(track, start))  # what overlaps on a track counts once
        self._ends[track] = max(end, self._ends.get(track, end))
        self.busy.setdefault(track, 0.0)
        if begin < end:
            for one in self._passes:
                self._add(track, begin, end, one)
            self._open.append((track, begin, end))

    def pass_over(self, start: float, end: float) -> None:
        for track, begin, stop in self._open:
            self._add(track, begin, stop, (start, end))
        self._open = [span for span in self._open if span[2] > end]
        self._passes.append((start, end))

    def _add(self, track: Track, begin: float, end: float, within: tuple[float, float]) -> None:
        self.busy[track] += max(0.0, min(end, within[1]) - max(begin, within[0]))


def summarise(events: Iterable[dict[str, Any]]) -> Summary:
    """One run through all events."""
    found, names, busy = Summary(), _Names(), _BusyInPasses()
    for event in events:
        match event["ph"]:
            case "M" if event["name"] == ABOUT:
                found.about = event["args"]
            case "M":
                names.learn(event)
            case "X":
                track, start, end = names.track(event), event["ts"], event["ts"] + event["dur"]
                if track == (COORDINATOR, PASS_TRACK):
                    found.num_passes += 1
                    found.pass_time += end - start
                    found.passes.add(start, {"end": end, "number": found.num_passes})
                    found.begin, found.end = min(found.begin, start), max(found.end, end)
                    busy.pass_over(start, end)
                else:
                    busy.span(track, start, end)
            case "C":
                found.counters.setdefault(event["name"], Series()).add(event["ts"], event["args"])
            case "i":
                if len(found.losses) < MOST_INSTANTS:
                    found.losses.append((event["ts"], names.process(event), event["name"]))
            case "end":
                found.is_whole = True
    found.busy = busy.busy
    return found


@dataclass(frozen=True, slots=True)
class Detail:
    """
    Attributes:
        utilisation: for each track, the busy share of each of the equal parts of the time.
        windows: spans that lie in each of the windows asked for.
        left_out: of each window, how many more there are.
    """

    utilisation: dict[Track, list[float]]
    windows: list[list[Span]]
    left_out: list[int]


def look_closer(
    events: Iterable[dict[str, Any]],
    begin: float,
    end: float,
    parts: int,
    windows: list[tuple[float, float]],
    most_spans: int,
) -> Detail:
    """A second run through all events, for the time from `begin` to `end` in `parts`."""
    names = _Names()
    width = max(end - begin, 1e-9) / parts
    utilisation: dict[Track, list[float]] = {}
    inside: list[list[Span]] = [[] for _ in windows]
    left_out = [0] * len(windows)
    reached: dict[Track, float] = {}
    for event in events:
        if event["ph"] == "M":
            names.learn(event)
        if event["ph"] != "X":
            continue
        track, start, stop = names.track(event), event["ts"], event["ts"] + event["dur"]
        if track != (COORDINATOR, PASS_TRACK):
            shares = utilisation.setdefault(track, [0.0] * parts)
            _spread(shares, max(start, reached.get(track, start)) - begin, stop - begin, width)
            reached[track] = max(stop, reached.get(track, stop))
        for index, (low, high) in enumerate(windows):
            if start < high and stop > low:
                if len(inside[index]) < most_spans:
                    inside[index].append(Span(track, event["name"], start, stop))
                else:
                    left_out[index] += 1
    for shares in utilisation.values():
        shares[:] = [min(1.0, share / width) for share in shares]
    return Detail(utilisation, inside, left_out)


def _spread(shares: list[float], start: float, stop: float, width: float) -> None:
    """Adds a span's time to the parts that it lies in."""
    start, stop = max(0.0, start), min(stop, width * len(shares))
    part = int(start / width)
    while start < stop and part < len(shares):
        edge = min(stop, (part + 1) * width)
        shares[part] += edge - start
        start, part = edge, part + 1
