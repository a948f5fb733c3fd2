"""How fast files are read now: past the page cache where the file system can."""

from __future__ import annotations

import mmap
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

READ_BYTES = 8 << 20
READS = 4  # in flight, as the loader has them


def read_rate(files: Sequence[Path], seconds: float, reads: int = READS) -> tuple[float, int, bool]:
    """Bytes per second of pieces from everywhere in the files, the bytes that were read, and whether past the cache."""
    direct = hasattr(os, "O_DIRECT")
    descriptors = []
    try:
        for file in files:
            try:
                descriptors.append(os.open(file, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)))
            except OSError:
                direct = False
                descriptors.append(os.open(file, os.O_RDONLY | os.O_CLOEXEC))
        pieces = [(one, at) for one in descriptors for at in range(0, os.fstat(one).st_size, READ_BYTES)]
        random.Random(0).shuffle(pieces)
        buffers = [mmap.mmap(-1, READ_BYTES) for _ in range(reads)]  # at the start of a page, as direct reads ask for
        start = time.perf_counter()

        def read(number: int) -> int:
            """Every so many pieces, until there is no more time."""
            num_bytes = 0
            for descriptor, at in pieces[number::reads]:
                if time.perf_counter() - start >= seconds:
                    break
                num_bytes += os.preadv(descriptor, [buffers[number]], at)
            return num_bytes

        with ThreadPoolExecutor(reads) as pool:
            num_bytes = sum(pool.map(read, range(reads)))
        return num_bytes / max(time.perf_counter() - start, 1e-9), num_bytes, direct
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
