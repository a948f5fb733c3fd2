"""How busy each lane is, and the trace of what each did when."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flexgen_lite.engine.trace_file import COORDINATOR, TraceFile

LANES = ("disk", "host-to-device", "compute", "attention", "device-to-host")
TRAFFIC_LANES = {
    "disk_read_bytes": "disk",
    "uploaded_bytes": "host-to-device",
    "kv_read_bytes": "attention",
    "state_bytes": "compute",
}
"""The lane that moves them, of counters of bytes."""
KV_TRACK = "KV on disk"  # beside that of the weights: they are read at the same time
PROCESSES = {
    "disk": "disk loader",
    "host-to-device": "compute worker",
    "compute": "compute worker",
    "device-to-host": "compute worker",
}


class Lanes:
    """Busy time per lane, and, where a trace was asked for, a file with every span.

    A lane with several tracks (attention workers) is as busy as the busiest of them.

    Attributes:
        trace: the file, or None.
    """

    def __init__(self, trace: Path | None, warn: Callable[[str], None] = lambda _: None) -> None:
        self.overhead_ns = 0  # of passes: time in which no lane was busy
        self._busy_ns: dict[str, dict[str, int]] = {lane: {} for lane in LANES}  # lane -> track -> time
        self._end_ns: dict[str, int] = {}  # of the last span on a track
        self._pass_spans: list[tuple[int, int]] = []
        self.trace = TraceFile(trace, warn) if trace is not None else None

    @property
    def busy_ns(self) -> dict[str, int]:
        return {lane: max(tracks.values(), default=0) for lane, tracks in self._busy_ns.items()}

    def add(self, lane: str, track: str, name: str, start_ns: int, end_ns: int) -> None:
        """One piece of work; `track` tells attention workers apart; on each, pieces come in order."""
        begin = max(start_ns, self._end_ns.get(track, 0))
        if end_ns > begin:
            busy = self._busy_ns[lane]
            busy[track] = busy.get(track, 0) + end_ns - begin
            self._end_ns[track] = end_ns
            self._pass_spans.append((begin, end_ns))
        row = track if track == KV_TRACK else lane
        self.span(PROCESSES.get(lane, track), row, name, start_ns, end_ns)

    def end_pass(self, name: str, start_ns: int, end_ns: int) -> None:
        """A pass is over, and its spans are in."""
        self.span(COORDINATOR, "pass", name, start_ns, end_ns)
        if self.trace is not None:
            self.trace.flush()
        spans, self._pass_spans = sorted(self._pass_spans), []
        reached = start_ns
        for begin, end in spans:
            self.overhead_ns += max(0, min(begin, end_ns) - reached)
            reached = max(reached, end)
        self.overhead_ns += max(0, end_ns - reached)

    def span(self, process: str, track: str, name: str, start_ns: int, end_ns: int) -> None:
        """A span for the trace alone."""
        if self.trace is not None:
            self.trace.span(process, track, name, start_ns, end_ns)

    def close(self) -> None:
        if self.trace is not None:
            self.trace.close()
            self.trace = None
