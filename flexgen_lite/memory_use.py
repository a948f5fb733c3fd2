"""How much main memory the engine's processes and arenas take."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

from flexgen_lite.arena import Arena

INTERVAL_SECONDS = 1.0


def resident_bytes(pid: int | str = "self") -> tuple[int, int]:
    """(anonymous, file-backed) resident memory of a process, shared arenas left out; zeros where it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0, 0
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    anonymous, files = (int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    return anonymous, files


class MemoryUse:
    """Anonymous memory of the watched processes and of this one, the arenas' pages once, and the mapped files of the
    process that maps most (the others map the same libraries)."""

    def __init__(self, arenas: Iterable[Arena]) -> None:
        self._arenas = list(arenas)
        self._pids = [os.getpid()]
        self._sampled_at = 0.0
        self._used = 0
        self.peak = 0

    def watch(self, pid: int) -> None:
        self._pids.append(pid)

    def forget(self, pid: int) -> None:
        self._pids.remove(pid)

    def sample(self) -> int:
        """Bytes in use now (or up to a second ago: reading it is not free)."""
        now = time.monotonic()
        if now - self._sampled_at >= INTERVAL_SECONDS:
            self._sampled_at = now
            shared = sum(os.fstat(arena.fd).st_blocks * 512 for arena in self._arenas)
            resident = [resident_bytes(pid) for pid in self._pids]
            self._used = shared + sum(anonymous for anonymous, _ in resident) + max(files for _, files in resident)
            self.peak = max(self.peak, self._used)
        return self._used
