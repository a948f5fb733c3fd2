"""How fast a file is read now: past the page cache where the file system can."""

from __future__ import annotations

import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

READ_BYTES = 8 << 20
READS = 4  # in flight, as the loader has them


def read_rate(path: Path, seconds: float, reads: int = READS) -> tuple[float, int, bool]:
    """Bytes per second from the start of a file on, the bytes that were read, and whether past the cache."""
    direct = hasattr(os, "O_DIRECT")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
    except OSError:
        direct = False
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    buffers = [mmap.mmap(-1, READ_BYTES) for _ in range(reads)]  # at the start of a page, as direct reads ask for
    parts = -(-os.fstat(descriptor).st_size // READ_BYTES)
    start = time.perf_counter()

    def read(number: int) -> int:
        """Every so many parts of the file, until there is no more time."""
        num_bytes = 0
        for part in range(number, parts, reads):
            if time.perf_counter() - start >= seconds:
                break
            num_bytes += os.preadv(descriptor, [buffers[number]], part * READ_BYTES)
        return num_bytes

    try:
        with ThreadPoolExecutor(reads) as pool:
            num_bytes = sum(pool.map(read, range(reads)))
    finally:
        os.close(descriptor)
    return num_bytes / max(time.perf_counter() - start, 1e-9), num_bytes, direct
