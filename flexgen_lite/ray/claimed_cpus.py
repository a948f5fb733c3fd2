"""Processors that an actor has to itself where several share a machine."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from flexgen_lite.plan.machine import CPUS


class ClaimedCpus:
    """Holds a lock for each of them, in a directory that all actors of this user on this machine have in common: they
    are free again when the process ends, however it ends.

    Attributes:
        cpus: those claimed; fewer than wanted where others have the rest.
    """

    def __init__(self, wanted: int, among: Sequence[int], directory: Path | None = None) -> None:
        folder = directory or Path(tempfile.gettempdir(), f"flexgen-lite-cpus-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        self._locks: list[int] = []
        found: list[int] = []
        for cpu in by_core(among):
            if len(found) < wanted and (lock := _lock(folder / f"cpu-{cpu}")) is not None:
                self._locks.append(lock)
                found.append(cpu)
        self.cpus = tuple(sorted(found))

    def release(self) -> None:
        """Safe to call twice."""
        while self._locks:
            os.close(self._locks.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def by_core(cpus: Sequence[int], folder: Path = CPUS) -> list[int]:
    """Those of a physical core one after the other."""

    def first_of_core(cpu: int) -> int:
        with contextlib.suppress(OSError, ValueError):
            text = (folder / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text()
            return int(text.replace("-", ",").split(",")[0])
        return cpu

    return sorted(cpus, key=lambda cpu: (first_of_core(cpu), cpu))


def _lock(path: Path) -> int | None:
    """A descriptor that holds it; None where somebody else does."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
