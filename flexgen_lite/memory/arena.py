"""Shared memory without a name: nothing can leak, and it vanishes with the last process that maps it."""

from __future__ import annotations

import mmap
import os
import tempfile


class Arena:
    """An anonymous shared file. The coordinator creates it empty, hands its descriptor to the workers when they start,
    and sets its size when the plan is known; each process then maps it.

    On systems without `memfd_create` it is an unlinked temporary file.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.size = 0
        if hasattr(os, "memfd_create"):
            self.fd = os.memfd_create(f"flexgen-lite-{name}", os.MFD_CLOEXEC)
        else:
            with tempfile.TemporaryFile() as file:
                self.fd = os.dup(file.fileno())

    def resize(self, size: int) -> None:
        os.ftruncate(self.fd, size)
        self.size = size

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def map_arena(fd: int, size: int) -> mmap.mmap:
    """Maps `size` bytes of an inherited arena, shared and writable; its pages are taken when they are first touched."""
    actual = os.fstat(fd).st_size
    if actual < size:
        raise ValueError(f"arena has {actual} bytes, {size} expected")
    return mmap.mmap(
        fd, max(size, mmap.PAGESIZE) if size == 0 else size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE
    )
