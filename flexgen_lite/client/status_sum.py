"""What several engines did, one after the other, told as of one. Pure logic."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from flexgen_lite.wire.client_messages import Status

_PEAKS = ("peak", "gpu_peak")


class StatusSum:
    """Counters go on where an engine that was lost had them when it was last heard of, and never go back."""

    def __init__(self) -> None:
        self._last: Status | None = None  # of the present engine
        self._totals: defaultdict[str, float] = defaultdict(float)  # of those before it, as the next two
        self._done = 0
        self._peaks: dict[str, int] = {}
        self._process_peaks: dict[str, int] = {}

    def of(self, status: Status, restarts: int) -> Status:
        """The status of the present engine, with what those before it did. `engine_restarts` is among the totals: of
        engines behind one queue there were some before."""
        self._last = status
        totals = {name: value + self._totals[name] for name, value in status.totals.items()}
        peaks = {name: max(status.memory.get(name, 0), self._peaks[name]) for name in self._peaks}
        return replace(
            status,
            done=status.done + self._done,
            totals={**self._totals, **totals, "engine_restarts": restarts + totals.get("engine_restarts", 0.0)},
            memory={**status.memory, **peaks},
            processes={
                name: {**sizes, "peak": max(sizes["peak"], self._process_peaks.get(name, 0))}
                for name, sizes in status.processes.items()
            },
        )

    def engine_lost(self) -> None:
        """Another one follows."""
        if self._last is None:
            return
        last, self._last = self._last, None
        for name, value in last.totals.items():
            self._totals[name] += value
        self._done += last.done
        for name, sizes in last.processes.items():
            self._process_peaks[name] = max(self._process_peaks.get(name, 0), sizes["peak"])
        for name in _PEAKS:
            if name in last.memory:
                self._peaks[name] = max(self._peaks.get(name, 0), last.memory[name])
