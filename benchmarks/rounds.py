"""Contestants in rounds, so that what else the machine does meets them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def seconds_per_call(
    contestants: Mapping[str, Callable[[int], object]], seconds: float, least: int = 5
) -> dict[str, float]:
    """The median over rounds of some `seconds` in all, and `least` rounds.

    Args:
        contestants: what to call with a round's number; the first round, -1, does not count.
    """
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    end, i = time.perf_counter() + seconds, -1
    while i < least or time.perf_counter() < end:
        for name, call in contestants.items():
            start = time.perf_counter()
            call(i)
            if i >= 0:
                taken[name].append(time.perf_counter() - start)
        i += 1
    return {name: statistics.median(times) for name, times in taken.items()}
