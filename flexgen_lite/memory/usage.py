"""How much main memory the engine's processes and arenas take, and how much of it was planned.

It is watched, and told: nobody is held back. `EngineStats.warn_of_memory` warns of a process beyond its part.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flexgen_lite.memory.arena import Arena

INTERVAL_SECONDS = 0.2
ZYGOTE_SAMPLES = 10  # it sleeps, and to look at all its pages takes milliseconds
COORDINATOR, COMPUTE, ZYGOTE = "coordinator", "compute worker", "zygote"
TELL_AGAIN_BEYOND = 1.25  # times what was told of a process


def resident_bytes(pid: int | str = "self") -> tuple[int, int]:
    """(anonymous, file-backed) resident memory of a process, shared arenas left out; zeros where it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0, 0
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    anonymous, files = (int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    return anonymous, files


def private_bytes(pid: int) -> int:
    """Of the memory that a process has written to, what it shares with no other; 0 where it is gone."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Private_Dirty:"))


def give_back_memory() -> None:
    """Free memory that the allocator of this process keeps goes to the system, wherever it lies on the heap."""
    with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


@dataclass(slots=True)
class ProcessMemory:
    """Bytes. `planned` is 0 until there is a plan; `peak` is the most since then."""

    planned: int = 0
    used: int = 0
    peak: int = 0
    told: int = 0  # the peak that was told last


class MemoryUse:
    """Anonymous memory of the watched processes and of this one, the arenas' pages once, and the mapped files of the
    process that maps most (the others map the same libraries). It is read every INTERVAL_SECONDS by a thread.

    Attributes:
        processes: by name; mapped files are counted for the compute worker.
        peak: most bytes that all of it took at once.
    """

    def __init__(self, arenas: Iterable[Arena]) -> None:
        self._arenas = list(arenas)
        self._names = {os.getpid(): COORDINATOR}
        self.processes = {COORDINATOR: ProcessMemory()}
        self.used = self.peak = 0
        self._samples = 0  # of a zygote
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flexgen-lite memory", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()

    def watch(self, pid: int, name: str) -> None:
        with self._lock:
            self._names[pid] = name
            self.processes.setdefault(name, ProcessMemory())

    def forget(self, pid: int) -> None:
        with self._lock:
            if self._names.pop(pid, None) == ZYGOTE:
                self.processes[ZYGOTE].used = 0

    def plan(self, planned: Mapping[str, int]) -> None:
        """What each process may take. Peaks count from now on: what it takes to start is over."""
        self.sample()
        with self._lock:
            for name, num_bytes in planned.items():
                process = self.processes.setdefault(name, ProcessMemory())
                process.planned, process.peak = num_bytes, 0

    def sample(self) -> int:
        """Reads it now; returns the bytes in use."""
        with self._lock:
            shared = sum(os.fstat(arena.fd).st_blocks * 512 for arena in self._arenas if arena.fd >= 0)
            most_files, total = 0, shared
            for pid, name in self._names.items():
                if name == ZYGOTE:
                    total += self._private_bytes_of_zygote(pid)
                    continue
                anonymous, files = resident_bytes(pid)
                total, most_files = total + anonymous, max(most_files, files)
                process = self.processes[name]
                process.used = anonymous + (files if name == COMPUTE else 0)
                process.peak = max(process.peak, process.used)
            self.used = total + most_files
            self.peak = max(self.peak, self.used)
            return self.used

    def _private_bytes_of_zygote(self, pid: int) -> int:
        """What it shares with the compute worker is counted there; while there is none, it is what the next one has."""
        process = self.processes[ZYGOTE]
        self._samples += 1
        if self._samples % ZYGOTE_SAMPLES == 0:
            private = private_bytes(pid)
            if any(name == COMPUTE and sum(resident_bytes(worker)) for worker, name in self._names.items()):
                process.used = private
                process.peak = max(process.peak, private)
        return process.used

    def beyond_plan(self) -> list[tuple[str, int, int]]:
        """(process, most it took, planned) of those that took more than planned: once, and again where it has grown by
        much."""
        found = []
        for name, process in self.processes.items():
            if process.peak > max(process.planned, process.told * TELL_AGAIN_BEYOND) > 0:
                process.told = process.peak
                found.append((name, process.peak, process.planned))
        return found

    def _run(self) -> None:
        while not self._closing.wait(INTERVAL_SECONDS):
            with contextlib.suppress(OSError):  # an arena was closed meanwhile: the engine ends
                self.sample()
