"""Keeps a process's memory within its part of the plan: what the allocator has kept of it for too long goes back."""

from __future__ import annotations

import os

from flexgen_lite.memory.usage import give_back_memory

PAGE = os.sysconf("SC_PAGE_SIZE")
TRY_AGAIN_BEYOND = 1.05  # times what was in use after memory was given back: it is in use


class Heap:
    """The C library keeps what it was given back, in places that small blocks which stay have cut up, and takes more
    for hours. Here free pages go back to the system, wherever they lie, once it holds more than it may.

    Args:
        limit: anonymous memory of this process, bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = self._next = limit
        self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)

    def anonymous_bytes(self) -> int:
        """What this process has of its own; takes some microseconds."""
        _, resident, shared, *_ = os.pread(self._statm, 200, 0).split()
        return (int(resident) - int(shared)) * PAGE

    def tidy(self) -> None:
        """To be called where few temporaries are in use."""
        if self.anonymous_bytes() > self._next:
            give_back_memory()
            self._next = max(self._limit, int(self.anonymous_bytes() * TRY_AGAIN_BEYOND))
