"""Shared memory without a name: nothing can leak, and it vanishes with the last process that maps it."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

from flexgen_lite.wire.arena_specs import SharedPart

Memory = memoryview | mmap.mmap
LARGE_PAGE = 2 << 20
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000  # of Linux
_MADV_POPULATE_WRITE, _MADV_COLLAPSE = 23, 25  # since 5.14, and 6.1
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


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

    @classmethod
    def inherited(cls, name: str, fd: int) -> Self:
        """That of another process, which sees to its size."""
        arena = cls.__new__(cls)
        arena.name, arena.size, arena.fd = name, os.fstat(fd).st_size, fd
        os.set_inheritable(fd, False)
        return arena

    def resize(self, size: int) -> None:
        os.ftruncate(self.fd, size)
        self.size = size

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@dataclass(frozen=True, slots=True)
class ArenaPart:
    """`size` bytes of an inherited arena, from its beginning. Where it is not writable, a write ends the process."""

    fd: int
    size: int
    writable: bool = True


def map_arena(fd: int, size: int) -> memoryview:
    """Maps `size` bytes of an inherited arena, shared and writable; its pages are taken when they are first touched.
    It begins at a multiple of LARGE_PAGE where that can be had."""
    if sys.platform != "linux" or size < LARGE_PAGE:
        _check_size(fd, size)
        return memoryview(mmap.mmap(fd, size or mmap.PAGESIZE, mmap.MAP_SHARED, _READ_WRITE))
    return map_parts(ArenaPart(fd, size))


def map_weights(arenas: Mapping[str, int], size: int, shared: SharedPart | None) -> memoryview:
    """The weights, `size` bytes in all: what engines share, where there is such a part, and this engine's own behind
    it. `arenas`: descriptors."""
    if shared is None:
        return map_arena(arenas["weights"], size)
    first = ArenaPart(arenas["shared"], shared.num_bytes, shared.writable)
    return map_parts(first, ArenaPart(arenas["weights"], size - shared.num_bytes))


def map_parts(*parts: ArenaPart) -> memoryview:
    """Maps arenas one behind the other, as one range that begins at a multiple of LARGE_PAGE. All but the last are
    multiples of it; those of no bytes are left out. On Linux."""
    *whole, _ = parts
    assert not any(part.size % LARGE_PAGE for part in whole), f"parts that are no multiples of {LARGE_PAGE}: {whole}"
    for part in parts:
        _check_size(part.fd, part.size)
    memory = _aligned(sum(part.size for part in parts), _MAP_NORESERVE)
    begin = _address(memory)
    for part, offset in zip(parts, accumulate((part.size for part in parts), initial=0), strict=False):
        access = _READ_WRITE if part.writable else mmap.PROT_READ
        place = begin + offset
        if part.size and _libc.mmap(place, part.size, access, mmap.MAP_SHARED | _MAP_FIXED, part.fd, 0) != place:
            code = ctypes.get_errno()
            raise OSError(code, f"mapping {part.size} bytes of an arena: {os.strerror(code)}")
    return memory


def _check_size(fd: int, size: int) -> None:
    actual = os.fstat(fd).st_size
    if actual < size:
        raise ValueError(f"arena has {actual} bytes, {size} expected")


def make_buffer(num_bytes: int) -> memoryview:
    """Memory of this process alone, for reads past the page cache: in large pages, if there are any."""
    memory = _aligned(num_bytes)
    take_pages(memory, 0, num_bytes)
    return memory


def _aligned(num_bytes: int, flags: int = 0) -> memoryview:
    """Memory of this process that begins at a multiple of LARGE_PAGE, in a mapping that is so much larger."""
    flags |= mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    room = mmap.mmap(-1, num_bytes + LARGE_PAGE, flags, _READ_WRITE)
    start = -_address(room) % LARGE_PAGE
    return memoryview(room)[start : start + num_bytes]


def take_large_pages(memory: Memory, offset: int, num_bytes: int) -> bool:
    """Has the memory that these bytes are in consist of large pages, as far as the system has any; whether it has.

    It is taken by that. Processors find their way in it faster, and disks write to it in fewer pieces: a virtual disk
    up to a third faster than to small pages that lie scattered.
    """
    if sys.platform != "linux":
        return False
    begin, end = _address(memory), _address(memory) + len(memory)
    first, last = begin + offset, begin + offset + num_bytes
    first, last = first - first % LARGE_PAGE, last + -last % LARGE_PAGE
    first, last = max(first, begin + -begin % LARGE_PAGE), min(last, end - end % LARGE_PAGE)
    if first >= last:
        return False
    for place in range(first - begin, last - begin, LARGE_PAGE):
        memory[place]  # what is to become large has to have something
    return bool(_libc.madvise(first, last - first, _MADV_COLLAPSE) == 0)


def take_pages(memory: Memory, offset: int, num_bytes: int) -> None:
    """Has the memory taken, in large pages if there are any: a first touch costs several times what a copy does."""
    if not take_large_pages(memory, offset, num_bytes) and sys.platform == "linux":
        first = _address(memory) + offset
        first -= first % mmap.PAGESIZE
        _libc.madvise(first, _address(memory) + offset + num_bytes - first, _MADV_POPULATE_WRITE)


def _address(memory: Memory) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
