"""How busy each lane is, and the trace of what each did when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TextIO

LANES = ("disk", "host-to-device", "compute", "attention", "device-to-host")


class Lanes:
    """Busy time per lane, and, where a trace was asked for, a file with every span.

    The trace is Chrome's trace event format (opens in Perfetto), written as it happens so that it takes no memory.
    A lane with several tracks (attention workers) is as busy as the busiest of them.
    """

    def __init__(self, trace: Path | None) -> None:
        self.overhead_ns = 0  # of passes: time in which no lane was busy
        self._busy_ns: dict[str, dict[str, int]] = {lane: {} for lane in LANES}  # lane -> track -> time
        self._end_ns: dict[str, int] = {}  # of the last span on a track
        self._pass_spans: list[tuple[int, int]] = []
        self._tracks: dict[str, int] = {}
        self._file: TextIO | None = None
        if trace is not None:
            self._file = trace.open("w", encoding="utf-8")
            self._file.write('{"traceEvents": [\n{"name": "process_name", "ph": "M", "pid": 1, ')
            self._file.write('"args": {"name": "flexgen-lite"}}')

    @property
    def busy_ns(self) -> dict[str, int]:
        return {lane: max(tracks.values(), default=0) for lane, tracks in self._busy_ns.items()}

    def add(self, lane: str, track: str, name: str, start_ns: int, end_ns: int) -> None:
        """One piece of work; `track` is its row in the trace, where pieces come in order."""
        begin = max(start_ns, self._end_ns.get(track, 0))
        if end_ns > begin:
            busy = self._busy_ns[lane]
            busy[track] = busy.get(track, 0) + end_ns - begin
            self._end_ns[track] = end_ns
            self._pass_spans.append((begin, end_ns))
        self.span(track, name, start_ns, end_ns)

    def end_pass(self, name: str, start_ns: int, end_ns: int) -> None:
        """A pass is over, and its spans are in."""
        self.span("pass", name, start_ns, end_ns)
        spans, self._pass_spans = sorted(self._pass_spans), []
        reached = start_ns
        for begin, end in spans:
            self.overhead_ns += max(0, min(begin, end_ns) - reached)
            reached = max(reached, end)
        self.overhead_ns += max(0, end_ns - reached)

    def span(self, track: str, name: str, start_ns: int, end_ns: int) -> None:
        """A span for the trace alone."""
        if self._file is None:
            return
        if track not in self._tracks:
            self._tracks[track] = len(self._tracks)
            self._event({"name": "thread_name", "ph": "M", "tid": self._tracks[track], "args": {"name": track}})
        times = {"ts": start_ns / 1000, "dur": (end_ns - start_ns) / 1000}
        self._event({"name": name, "ph": "X", "tid": self._tracks[track], **times})

    def close(self) -> None:
        if self._file is not None:
            self._file.write("\n]}\n")
            self._file.close()
            self._file = None

    def _event(self, event: dict[str, object]) -> None:
        assert self._file is not None
        self._file.write(",\n" + json.dumps({"pid": 1, **event}))
