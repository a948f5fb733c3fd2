"""How fast files are read now: past the page cache where the file system can, into memory such as weights lie in."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flexgen_lite.memory.arena import map_arena, take_pages

READ_BYTES = 8 << 20
READS = 4  # in flight, as the loader has them


def read_rate(files: Sequence[Path], seconds: float, reads: int = READS) -> tuple[float, int, bool]:
    """Bytes per second of pieces from everywhere in the files, the bytes that were read, and whether past the cache."""
    direct = hasattr(os, "O_DIRECT")
    descriptors: list[int] = []
    memory: int | None = None
    try:
        for file in files:
            try:
                descriptors.append(os.open(file, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)))
            except OSError:
                direct = False
                descriptors.append(os.open(file, os.O_RDONLY | os.O_CLOEXEC))
        pieces = [(one, at) for one in descriptors for at in range(0, os.fstat(one).st_size, READ_BYTES)]
        random.Random(0).shuffle(pieces)
        memory, buffers = _buffers(2 * reads)
        start = time.perf_counter()

        def read(number: int) -> int:
            """Every so many pieces, until there is no more time."""
            num_bytes = 0
            for turn, (descriptor, at) in enumerate(pieces[number::reads]):
                if time.perf_counter() - start >= seconds:
                    break
                num_bytes += os.preadv(descriptor, [buffers[2 * number + turn % 2]], at)
            return num_bytes

        with ThreadPoolExecutor(reads) as pool:
            num_bytes = sum(pool.map(read, range(reads)))
        return num_bytes / max(time.perf_counter() - start, 1e-9), num_bytes, direct
    finally:
        for descriptor in (*descriptors, *([] if memory is None else [memory])):
            os.close(descriptor)


def _buffers(count: int) -> tuple[int, list[memoryview]]:
    """Of READ_BYTES each, in a memfd in large pages, as slots of weights are: what a read costs differs with that."""
    descriptor = os.memfd_create("flexgen-lite reads", os.MFD_CLOEXEC)
    os.truncate(descriptor, count * READ_BYTES)
    memory = map_arena(descriptor, count * READ_BYTES)
    take_pages(memory, 0, len(memory))
    return descriptor, [memory[at : at + READ_BYTES] for at in range(0, len(memory), READ_BYTES)]
