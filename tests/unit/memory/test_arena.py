"""Arenas as processes map them, in pages that may be large."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexgen_lite.memory import arena as arenas
from flexgen_lite.memory.arena import (
    LARGE_PAGE,
    Arena,
    ArenaPart,
    map_arena,
    map_parts,
    map_weights,
    take_large_pages,
    take_pages,
)
from flexgen_lite.wire.arena_specs import SharedPart

SIZE = 3 * LARGE_PAGE + 5 * mmap.PAGESIZE
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for as Linux has it")


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena("test")
    made.resize(SIZE)
    yield made
    made.close()


def _has_large_pages() -> bool:
    """Asked of the system itself, for shared memory of four of them."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.memfd_create("probe")
    os.truncate(fd, 4 * LARGE_PAGE)
    place = mmap.mmap(-1, 5 * LARGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(place))
    start += -start % LARGE_PAGE
    libc.mmap.restype = ctypes.c_void_p
    fixed = mmap.MAP_SHARED | 0x10
    both = mmap.PROT_READ | mmap.PROT_WRITE
    found = libc.mmap(ctypes.c_void_p(start), ctypes.c_size_t(4 * LARGE_PAGE), both, fixed, fd, ctypes.c_long(0))
    os.close(fd)
    assert found == start
    ctypes.memset(start, 1, 4 * LARGE_PAGE)
    return bool(libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(4 * LARGE_PAGE), 25) == 0)


def address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


@pytest.mark.parametrize("size", [0, mmap.PAGESIZE, LARGE_PAGE - 1, LARGE_PAGE, SIZE - 1, SIZE])
def test_what_one_writes_the_other_reads(arena: Arena, size: int) -> None:
    one, other = map_arena(arena.fd, size), map_arena(arena.fd, size)
    assert len(one) == max(size, 1) or (size == 0 and len(one) == mmap.PAGESIZE)
    for place in {0, size // 2, size - 1} if size else set():
        one[place] = 7
        assert other[place] == 7
    if size >= LARGE_PAGE and sys.platform == "linux":
        assert address(one) % LARGE_PAGE == address(other) % LARGE_PAGE == 0


def test_more_than_there_is(arena: Arena) -> None:
    with pytest.raises(ValueError, match=f"arena has {SIZE} bytes, {SIZE + 1} expected"):
        map_arena(arena.fd, SIZE + 1)


@on_linux
def test_a_mapping_goes_with_the_last_that_looks_at_it(arena: Arena) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text(encoding="ascii").count("memfd:flexgen-lite-test")

    memory = map_arena(arena.fd, SIZE)
    part = memory[LARGE_PAGE:]
    del memory
    assert mapped() == 1
    part[0] = 1
    del part
    assert mapped() == 0


@pytest.mark.parametrize(
    ("offset", "num_bytes"),
    [
        (0, SIZE),
        (0, 1),
        (SIZE - 1, 1),
        (LARGE_PAGE - 1, 2),
        (mmap.PAGESIZE, LARGE_PAGE),
        (2 * LARGE_PAGE + 1, LARGE_PAGE),
    ],
)
@pytest.mark.parametrize("take", [take_large_pages, take_pages])
def test_contents_stay(arena: Arena, offset: int, num_bytes: int, take: object) -> None:
    memory, other = map_arena(arena.fd, SIZE), map_arena(arena.fd, SIZE)
    content = bytes(range(251)) * (SIZE // 251 + 1)
    memory[:] = content[:SIZE]
    take(memory, offset, num_bytes)  # type: ignore[operator]
    assert bytes(other) == content[:SIZE]
    other[offset] = 255 - other[offset]
    assert memory[offset] == 255 - content[offset]


@on_linux
def test_where_the_system_has_none(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is taken all the same, in small pages."""
    asked, real = [], arenas._libc.madvise

    def madvise(place: int, size: int, advice: int) -> int:
        asked.append(advice)
        return -1 if advice == arenas._MADV_COLLAPSE else int(real(place, size, advice))

    monkeypatch.setattr(arenas._libc, "madvise", madvise)
    memory = map_arena(arena.fd, SIZE)
    assert not take_large_pages(memory, 0, SIZE)
    take_pages(memory, 0, SIZE)
    assert asked == [arenas._MADV_COLLAPSE, arenas._MADV_COLLAPSE, arenas._MADV_POPULATE_WRITE]
    assert bytes(memory) == bytes(SIZE)


@on_linux
def test_pages_are_large_where_the_system_has_any(arena: Arena) -> None:
    if not _has_large_pages():
        pytest.skip("the system has no large pages for shared memory, or none that are free")
    memory = map_arena(arena.fd, SIZE)
    assert take_large_pages(memory, 0, SIZE)
    lines = Path("/proc/self/smaps").read_text(encoding="ascii").split("memfd:flexgen-lite-test")[1].splitlines()
    large = next(int(line.split()[1]) for line in lines if line.startswith("ShmemPmdMapped"))
    assert large << 10 == 3 * LARGE_PAGE


@pytest.fixture
def other() -> Iterator[Arena]:
    made = Arena("other")
    made.resize(SIZE)
    yield made
    made.close()


@on_linux
@pytest.mark.parametrize("own", [0, mmap.PAGESIZE, SIZE])
def test_what_engines_share_and_what_is_ones_own_are_one_range(arena: Arena, other: Arena, own: int) -> None:
    shared = SharedPart(2 * LARGE_PAGE, True)
    arenas = {"shared": arena.fd, "weights": other.fd}
    memory = map_weights(arenas, shared.num_bytes + own, shared)
    assert len(memory) == shared.num_bytes + own and address(memory) % LARGE_PAGE == 0
    in_own = [0, own - 1] if own else []
    for file, begin, offsets in ((arena, 0, [0, shared.num_bytes - 1]), (other, shared.num_bytes, in_own)):
        for offset in offsets:
            memory[begin + offset] = 1 + offset % 250
            assert os.pread(file.fd, 1, offset) == bytes([1 + offset % 250])
    begin, end = address(memory), address(memory) + len(memory)

    def files() -> list[str]:
        """In the range."""
        lines = [line.split() for line in Path("/proc/self/maps").read_text(encoding="ascii").splitlines()]
        return [line[5] for line in lines if begin <= int(line[0].split("-")[0], 16) < end and len(line) > 5]

    assert files() == ["/memfd:flexgen-lite-test", "/memfd:flexgen-lite-other"][: 1 + (own > 0)]
    del memory
    assert files() == []


def test_without_a_shared_part_weights_are_an_arena_like_others(arena: Arena) -> None:
    memory = map_weights({"weights": arena.fd}, SIZE, None)
    memory[SIZE - 1] = 3
    assert os.pread(arena.fd, 1, SIZE - 1) == b"\3"


@on_linux
def test_a_part_that_is_too_small_is_told_of(arena: Arena, other: Arena) -> None:
    with pytest.raises(ValueError, match=f"arena has {SIZE} bytes, {4 * LARGE_PAGE} expected"):
        map_parts(ArenaPart(arena.fd, 4 * LARGE_PAGE), ArenaPart(other.fd, SIZE))


WRITES = """
import sys
from flexgen_lite.memory.arena import LARGE_PAGE, map_weights
from flexgen_lite.wire.arena_specs import SharedPart
arenas = {"shared": int(sys.argv[1]), "weights": int(sys.argv[2])}
memory = map_weights(arenas, 2 * LARGE_PAGE, SharedPart(LARGE_PAGE, writable=sys.argv[3] == "writable"))
assert memory[7] == 5
memory[LARGE_PAGE] = 1
print("its own", flush=True)
memory[7] = 6
print("of all", flush=True)
"""


@on_linux
@pytest.mark.parametrize("access", ["writable", "read-only"])
def test_who_writes_to_a_part_that_is_not_writable_ends(arena: Arena, other: Arena, access: str) -> None:
    os.pwrite(arena.fd, b"\5", 7)
    command = [sys.executable, "-c", WRITES, str(arena.fd), str(other.fd), access]
    found = subprocess.run(
        command, pass_fds=(arena.fd, other.fd), stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
    )
    if access == "writable":
        assert (found.returncode, found.stdout) == (0, "its own\nof all\n")
    else:
        assert (found.returncode, found.stdout) == (-signal.SIGSEGV, "its own\n")
    assert os.pread(arena.fd, 1, 7) == (b"\6" if access == "writable" else b"\5")
    assert os.pread(other.fd, 1, 0) == b"\1"
