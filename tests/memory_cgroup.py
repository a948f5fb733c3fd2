"""A memory cgroup for a test, version 1 or 2; skips the test where none can be made."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")


class MemoryCgroup:
    def __init__(self, folder: Path, limit_file: str, peak_file: str) -> None:
        self.procs = folder / "cgroup.procs"
        self._folder, self._limit_file, self._peak_file = folder, limit_file, peak_file

    def limit(self, num_bytes: int) -> None:
        (self._folder / self._limit_file).write_text(str(num_bytes))

    def peak(self) -> int:
        return int((self._folder / self._peak_file).read_text())


@contextlib.contextmanager
def memory_cgroup(num_bytes: int) -> Iterator[MemoryCgroup]:
    """Whoever writes its process id to `procs` is held to `num_bytes`, and its children with it."""
    name = f"flexgen-lite-test-{os.getpid()}"
    if (ROOT / "cgroup.controllers").exists():
        group = MemoryCgroup(ROOT / name, "memory.max", "memory.peak")
    else:
        group = MemoryCgroup(ROOT / "memory" / name, "memory.limit_in_bytes", "memory.max_usage_in_bytes")
    try:
        group._folder.mkdir()
        group.limit(num_bytes)
    except OSError as error:
        with contextlib.suppress(OSError):
            group._folder.rmdir()
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        yield group
    finally:
        deadline = time.monotonic() + 20  # a cgroup goes once its last process has gone
        while group._folder.exists() and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                group._folder.rmdir()
