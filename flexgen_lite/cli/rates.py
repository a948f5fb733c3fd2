"""How fast things go now, and how long they will take. Pure logic."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

WINDOW_SECONDS = 30.0  # passes may take seconds, and results come in bursts
LEAST_SECONDS = 5.0  # before anything is foretold
TRUSTED_SHARE = 0.2  # of a job, whose pace is that of the rest
MOST_OFF = 4.0  # times as long or as short as predicted, of what is believed


class Window:
    """Rates of growing counters over the last seconds.

    Args:
        seconds: how far it looks back.
    """

    def __init__(self, seconds: float = WINDOW_SECONDS) -> None:
        self._seconds = seconds
        self._points: deque[tuple[float, dict[str, float]]] = deque()

    def add(self, time: float, counters: dict[str, float]) -> None:
        """Counters as they are at a time, seconds; times rise."""
        self._points.append((time, counters))
        while len(self._points) > 2 and time - self._points[1][0] >= self._seconds:
            self._points.popleft()

    def rate(self, name: str) -> float:
        """Per second; 0 before there are two points."""
        if len(self._points) < 2:
            return 0.0
        (start, before), (end, now) = self._points[0], self._points[-1]
        return max(0.0, now.get(name, 0.0) - before.get(name, 0.0)) / (end - start) if end > start else 0.0


def seconds_left(done: float, total: float | None, elapsed: float, rate_now: float) -> float | None:
    """How long the rest will take; None where that cannot be said yet.

    The mean of the rate of the whole run and of the last seconds: the former is steady, the latter knows of changes.

    Args:
        done: in this run.
        total: of this run.
        elapsed: seconds of this run.
        rate_now: per second, lately.
    """
    if total is None or elapsed < LEAST_SECONDS or done <= 0:
        return None
    overall = done / elapsed
    rate = (overall + rate_now) / 2 if rate_now > 0 else overall
    return max(0.0, total - done) / rate


class Expected:
    """How long a job will take by a prediction, corrected by what is seen of it.

    Args:
        done_at: seconds by which equal parts of the requests were to be done, the first of which are none.
    """

    def __init__(self, done_at: Sequence[float]) -> None:
        self._done_at = tuple(done_at)

    @property
    def seconds(self) -> float:
        """Of the whole job."""
        return self._done_at[-1]

    def seconds_left(self, done: float, total: float, elapsed: float) -> float:
        """As the prediction has it behind so many requests; the pace until now counts as far as the job is."""
        share = min(1.0, done / total) if total > 0 else 0.0
        place = share * (len(self._done_at) - 1)
        index = min(int(place), len(self._done_at) - 2)
        until_now = self._done_at[index] + (place - index) * (self._done_at[index + 1] - self._done_at[index])
        left = self._done_at[-1] - until_now
        if not done:
            return max(0.0, self._done_at[-1] - elapsed)
        pace = min(MOST_OFF, max(1 / MOST_OFF, elapsed / max(until_now, 1e-9)))
        return left * (1 + (pace - 1) * min(1.0, share / TRUSTED_SHARE))


def clock(seconds: float | None) -> str:
    """As people read it: 0:07, 12:30, 3:05:00, 2d 4h."""
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24}h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
