"""The processes that an engine consists of, once it does not end them itself."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path


def kill_all(leader: int) -> None:
    """All processes of its group, and those of its session: engines behind one queue have groups of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
    killed: set[int] = set()
    while fresh := members(leader) - killed:  # one may have started another before it was killed
        for pid in fresh:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed |= fresh


def wait_until_gone(leader: int, seconds: float) -> None:
    """Until no process of its group and session holds memory, or the time is over."""
    deadline = time.monotonic() + seconds
    while members(leader) and time.monotonic() < deadline:
        time.sleep(0.02)


def members(leader: int) -> set[int]:
    """Processes of its group and session that have not ended. One that nobody waits for holds nothing, once all its
    threads have ended."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            state, group, session, num_threads = fields[0], int(fields[2]), int(fields[3]), int(fields[17])
            if leader in (group, session) and (state not in "ZX" or num_threads > 1):
                found.add(int(path.parent.name))
    return found
