"""Where, and how readily, the system runs an actor's process and what it starts: all threads that there are."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

NORMAL = 0  # niceness


def bind_process(cpus: Sequence[int]) -> None:
    """On these processors alone."""
    for thread in _threads():
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(thread, cpus)


def at_normal_priority() -> bool:
    """As programs usually run: Ray gives its workers the niceness of 15, and whatever else wakes up for a moment holds
    up a pass. False where the system does not allow it."""
    with contextlib.suppress(PermissionError):
        for thread in _threads():
            with contextlib.suppress(ProcessLookupError):
                if os.getpriority(os.PRIO_PROCESS, thread) > NORMAL:
                    os.setpriority(os.PRIO_PROCESS, thread, NORMAL)
        return True
    return False


def _threads() -> Iterator[int]:
    return map(int, os.listdir("/proc/self/task"))
