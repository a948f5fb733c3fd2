"""A memory cgroup, version 1 or 2, that holds a measuring process and its children to a budget; needs root."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


class MemoryGroup:
    """Attributes: `procs`: whoever writes its process id here is held to the limit, and its children with it."""

    def __init__(self, num_bytes: int) -> None:
        unified = (ROOT / "cgroup.controllers").exists()
        self.folder = (ROOT if unified else ROOT / "memory") / f"flexgen-lite-bench-{os.getpid()}"
        self.procs = self.folder / "cgroup.procs"
        self._limit = self.folder / ("memory.max" if unified else "memory.limit_in_bytes")
        self._peak = self.folder / ("memory.peak" if unified else "memory.max_usage_in_bytes")
        self._events = self.folder / ("memory.events" if unified else "memory.oom_control")
        self.num_bytes = num_bytes

    def make(self) -> None:
        self.folder.mkdir()
        self._limit.write_text(str(self.num_bytes))

    def remove(self) -> None:
        """With what is left in it: a cgroup goes once its last process has gone."""
        for process in self.procs.read_text().split() if self.procs.exists() else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        deadline = time.monotonic() + 20
        while self.folder.exists() and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                self.folder.rmdir()
                return
            time.sleep(0.05)

    def peak_bytes(self) -> int:
        """Most memory in use so far; pages of files that were read count until the kernel needs them back."""
        return int(self._peak.read_text())

    def held_bytes(self) -> int:
        """Memory in use now without pages of files: what the kernel cannot have back."""
        values = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        return int(values.get("anon", values.get("rss", 0))) + int(values.get("shmem", 0))

    def out_of_memory(self) -> bool:
        """Whether the kernel has killed a process for lack of memory."""
        events = dict(line.split() for line in self._events.read_text().splitlines())
        return int(events.get("oom_kill", 0)) > 0


@contextlib.contextmanager
def memory_group(num_bytes: int) -> Iterator[MemoryGroup]:
    """Raises OSError where no memory cgroup can be made."""
    group = MemoryGroup(num_bytes)
    try:
        group.make()
        yield group
    finally:
        group.remove()


def forget_pages(path: Path) -> None:
    """Drop a file or a folder's files from the page cache.

    Pages that somebody outside a cgroup has read are not charged to it, and would make its budget larger than it is.
    """
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
