"""A heap that small blocks have cut up goes back to the system once it is larger than it may be."""

from __future__ import annotations

import subprocess
import sys

CHECK = """
import ctypes
from flexgen_lite.workers.compute.heap import Heap
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: large blocks come from the heap too
heap = Heap(10**12)
before = heap.anonymous_bytes()
large, small = [], []
for _ in range(100):
    large.append(libc.malloc(1 << 20)); ctypes.memset(large[-1], 1, 1 << 20)
    small.append(libc.malloc(2000))  # it stays
for block in large:
    libc.free(block)
heap.tidy()
assert heap.anonymous_bytes() > before + (90 << 20), "within the limit nothing is given back"
heap = Heap(before + (50 << 20))
heap.tidy()
assert heap.anonymous_bytes() < before + (10 << 20)
"""


def test_free_pages_between_blocks_go_back_beyond_the_limit() -> None:
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
