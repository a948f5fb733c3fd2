"""Pages and states out to files and back: what was written comes back, what is not what was written is told."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import random
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexgen_lite.memory.park_file import ParkFile
from flexgen_lite.wire.kv_on_disk import (
    BlockOnDisk,
    FetchBlocks,
    FetchKv,
    KvDiskSpec,
    KvMoved,
    ParkKv,
    PrefixesOpened,
    StoreBlocks,
)
from flexgen_lite.workers.loader import direct_file, kv_disk
from flexgen_lite.workers.loader.kv_disk import KvDisk
from flexgen_lite.workers.loader.prefix_file import RECORD_BYTES

PAGES, STATES, STATE_BYTES = 40, 6, 9000
BLOCK = 4096


def arena(num_bytes: int, seed: int) -> mmap.mmap:
    memory = mmap.mmap(-1, num_bytes)
    memory[:] = random.Random(seed).randbytes(num_bytes)
    return memory


class Loader:
    """The part of a loader that has to do with KV on disk, with arenas of its own."""

    def __init__(self, folder: Path, page_bytes: int, identity: str = "model", prefix_slots: int = 8) -> None:
        slot = -(-page_bytes // BLOCK) * BLOCK
        self.page_bytes = page_bytes
        self.kv, self.states = arena(PAGES * page_bytes, 1), arena(STATES * STATE_BYTES, 2)
        self.spec = KvDiskSpec(
            page_bytes, len(self.kv), STATE_BYTES, len(self.states), slot, str(folder), identity, prefix_slots, 2
        )
        self.file = ParkFile(folder)
        self.said: list[KvMoved | PrefixesOpened] = []
        self._opened = threading.Event()
        self.disk = KvDisk(self.spec, self.kv, self.states, self.file.fd, self._post)
        assert self._opened.wait(30)

    def _post(self, message: KvMoved | PrefixesOpened) -> None:
        self.said.append(message)
        self._opened.set()

    def close(self) -> None:
        self.disk.close()
        self.file.close()

    def page(self, number: int) -> bytes:
        return self.kv[number * self.page_bytes : (number + 1) * self.page_bytes]

    def wipe(self) -> None:
        self.kv[:], self.states[:] = bytes(len(self.kv)), bytes(len(self.states))


@pytest.fixture(params=[8192, 5000, 64])
def loader(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Loader]:
    found = Loader(tmp_path / "kv", request.param)
    yield found
    found.close()


def park(loader: Loader, pages: tuple[int, ...], first_slot: int = 0, state: int = -1) -> ParkKv:
    states = -(-STATE_BYTES // loader.spec.slot_bytes) if state >= 0 else 0
    return ParkKv(1, pages, state, tuple(range(first_slot, first_slot + len(pages) + states)))


def test_what_was_written_comes_back_to_other_pages(loader: Loader) -> None:
    order = park(loader, (3, 30, 4, 17, 5), 2, state=4)
    expected = [loader.page(page) for page in order.pages], loader.states[4 * STATE_BYTES : 5 * STATE_BYTES]
    written = loader.disk.carry_out(order)
    assert written.error == "" and len(written.checksums) == len(order.slots)
    assert written.num_bytes == len(order.slots) * loader.spec.slot_bytes
    loader.wipe()
    fetch = FetchKv(2, (9, 8, 7, 6, 0), 1, order.slots, written.checksums)
    assert loader.disk.carry_out(fetch).error == ""
    found = [loader.page(page) for page in fetch.pages], loader.states[STATE_BYTES : 2 * STATE_BYTES]
    assert found == expected
    assert not any(loader.page(3)) and not any(loader.states[:STATE_BYTES]), "and nothing else is touched"


def test_more_than_the_buffer_has_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_disk, "BOUNCE_BYTES", 3 * BLOCK)
    loader = Loader(tmp_path, 4000)
    pages = tuple(range(20))
    expected = [loader.page(page) for page in pages]
    order = ParkKv(1, pages, -1, (*range(5), *range(9, 24)))
    written = loader.disk.carry_out(order)
    loader.wipe()
    assert loader.disk.carry_out(FetchKv(2, pages, -1, order.slots, written.checksums)).error == ""
    assert [loader.page(page) for page in pages] == expected
    loader.close()


def test_bytes_that_changed_on_disk_are_noticed(loader: Loader) -> None:
    order = park(loader, (3, 4, 5))
    written = loader.disk.carry_out(order)
    os.pwrite(loader.file.fd, bytes(BLOCK), loader.spec.slot_bytes) if not direct(loader.file.fd) else flip(
        f"/proc/self/fd/{loader.file.fd}", loader.spec.slot_bytes
    )
    loader.wipe()
    found = loader.disk.carry_out(FetchKv(2, order.pages, -1, order.slots, written.checksums))
    assert "is not what was written" in found.error
    assert not any(loader.page(4)), "what is wrong stays out of the arena"


def test_a_file_that_is_too_short_is_noticed(loader: Loader) -> None:
    order = park(loader, (3, 4, 5))
    written = loader.disk.carry_out(order)
    os.ftruncate(loader.file.fd, loader.spec.slot_bytes)
    found = loader.disk.carry_out(FetchKv(2, order.pages, -1, order.slots, written.checksums))
    assert "ends at byte" in found.error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_takes_no_more(loader: Loader, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(direct_file, "PAUSE", 0.0)
    monkeypatch.setattr(os, "pwritev", fail)
    for order in (park(loader, (3,)), StoreBlocks(2, (BlockOnDisk(b"k" * 16, 0, (1, 2)),))):
        assert loader.disk.carry_out(order).error == os.strerror(number)


def test_a_full_disk_is_met_in_the_middle(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a part of what it is given, then nothing."""
    write, left = os.pwritev, [BLOCK]

    def some(descriptor: int, data: list[memoryview], offset: int) -> int:
        size = min(left[0], len(data[0]))
        left[0] -= size
        return write(descriptor, [data[0][:size]], offset) if size else 0

    monkeypatch.setattr(os, "pwritev", some)
    assert loader.disk.carry_out(park(loader, (3, 4, 5))).error == os.strerror(errno.ENOSPC)


def test_parts_of_reads_and_writes(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pwritev", "preadv"):
        whole = getattr(os, name)
        monkeypatch.setattr(os, name, lambda fd, data, at, whole=whole: whole(fd, [data[0][:BLOCK]], at))
    test_what_was_written_comes_back_to_other_pages(loader)


def test_a_file_system_without_direct_reads(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has opened the file so, and refuses the first read or write."""
    for name in ("pwritev", "preadv"):
        whole = getattr(os, name)

        def picky(fd: int, data: list[memoryview], at: int, whole: object = whole) -> int:
            if direct(fd):
                raise OSError(errno.EINVAL, "no")
            return whole(fd, data, at)  # type: ignore[operator, no-any-return]

        monkeypatch.setattr(os, name, picky)
    test_what_was_written_comes_back_to_other_pages(loader)


def test_the_file_of_parked_sequences_has_no_name(loader: Loader, tmp_path: Path) -> None:
    assert [path.suffix for path in (tmp_path / "kv").iterdir()] in ([], [".prefixes"])
    assert stat.S_IMODE((tmp_path / "kv").stat().st_mode) == 0o700


def test_a_file_system_without_nameless_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_TMPFILE")
    file = ParkFile(tmp_path)
    os.pwrite(file.fd, b"x", 0)
    assert os.listdir(tmp_path) == []
    file.close()


# ------------------------------------------------------------------------------------------------ stored prefixes

KEYS = [bytes([n]) * 16 for n in range(5)]
BLOCKS = tuple(BlockOnDisk(key, slot, (2 * slot, 2 * slot + 1)) for slot, key in enumerate(KEYS[:4]))


def opened(loader: Loader) -> PrefixesOpened:
    """What it said of the file, once it has opened it."""
    loader.disk.close()
    (said,) = [message for message in loader.said if isinstance(message, PrefixesOpened)]
    return said


def run_once(folder: Path, **changes: object) -> tuple[list[bytes], Path]:
    """An engine stores four blocks. Returns their pages."""
    loader = Loader(folder, 5000, **changes)  # type: ignore[arg-type]
    pages = [loader.page(page) for page in range(8)]
    loader.disk.order(StoreBlocks(1, BLOCKS))
    said = opened(loader)
    assert said.usable and loader.said[-1].error == ""  # type: ignore[union-attr]
    (path,) = folder.glob("*.prefixes")
    loader.file.close()
    return pages, path


class Again:
    """The next engine on the same folder: what it finds, and what it can read of it."""

    def __init__(self, folder: Path, **changes: object) -> None:
        loader = Loader(folder, 5000, **changes)  # type: ignore[arg-type]
        loader.wipe()
        for ticket, block in enumerate(BLOCKS):
            loader.disk.order(FetchBlocks(ticket, (block,)))
        said = opened(loader)
        self.note, self.usable = said.note, said.usable
        self.found = {(block.key, block.slot) for block in said.blocks}
        moved = [message for message in loader.said if isinstance(message, KvMoved)]
        self.readable = [not message.error for message in moved]
        self.pages = [loader.page(page) for page in range(8)]
        loader.file.close()


ALL = {(block.key, block.slot) for block in BLOCKS}


def test_the_next_engine_has_what_one_has_stored(tmp_path: Path) -> None:
    pages, path = run_once(tmp_path)
    again = Again(tmp_path)
    assert (again.note, again.found, again.readable, again.pages) == ("", ALL, [True] * 4, pages)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_only_what_is_wanted_of_a_block_is_touched(tmp_path: Path) -> None:
    run_once(tmp_path)
    loader = Loader(tmp_path, 5000)
    loader.wipe()
    loader.disk.order(FetchBlocks(1, (BlockOnDisk(KEYS[0], 0, (-1, 7)),)))
    opened(loader)
    assert any(loader.page(7)) and not any(loader.page(0)) and not any(loader.page(1))
    loader.file.close()


@pytest.mark.parametrize("change", [{"identity": "another model"}, {"prefix_slots": 9}])
def test_another_model_or_size_takes_nothing_of_it(change: dict[str, object], tmp_path: Path) -> None:
    run_once(tmp_path)
    again = Again(tmp_path, **change)
    assert again.usable and not again.found and again.readable == [False] * 4


def flip(path: str | Path, offset: int, count: int = 1) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        old = file.read(count)
        file.seek(offset)
        file.write(bytes(byte ^ 0xFF for byte in old))


def direct(descriptor: int) -> bool:
    import fcntl

    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


def test_bytes_of_a_block_that_changed(tmp_path: Path) -> None:
    pages, path = run_once(tmp_path)
    flip(path, BLOCK + BLOCK + 2 * 2 * 8192 + 8192 + 4999)  # the last byte of the second page of slot 2
    again = Again(tmp_path)
    assert again.found == ALL and again.readable == [True, True, False, True]
    assert again.pages[:4] == pages[:4]
    assert Again(tmp_path).found == ALL - {(KEYS[2], 2)}, "and it is forgotten"


def test_a_record_that_is_torn(tmp_path: Path) -> None:
    _, path = run_once(tmp_path)
    flip(path, BLOCK + 1 * RECORD_BYTES + 3, 20)
    again = Again(tmp_path)
    assert again.found == ALL - {(KEYS[1], 1)} and "damaged" in again.note
    assert again.readable == [True, False, True, True]


def test_a_slot_that_was_half_written_when_its_engine_died(tmp_path: Path) -> None:
    """Its record is that of what was there before, or none."""
    _, path = run_once(tmp_path)
    flip(path, 2 * BLOCK + 2 * 8192, 8192)
    assert Again(tmp_path).readable == [True, False, True, True]


@pytest.mark.parametrize("size", [0, 100, BLOCK, BLOCK + 70, 2 * BLOCK, 2 * BLOCK + 8192 * 5])
def test_a_file_that_was_cut_off(size: int, tmp_path: Path) -> None:
    _, path = run_once(tmp_path)
    os.truncate(path, size)
    again = Again(tmp_path)
    whole = max(0, size - 2 * BLOCK) // (2 * 8192)
    assert again.usable and again.readable == [slot < whole for slot in range(4)]
    assert bool(again.note) == bool(size)
    assert run_once(tmp_path) and Again(tmp_path).readable == [True] * 4, "and it is stored anew"


@pytest.mark.parametrize("content", [b"a letter to somebody\n", bytes(100_000), os.urandom(100_000)])
def test_a_foreign_file(content: bytes, tmp_path: Path) -> None:
    _, path = run_once(tmp_path)
    path.write_bytes(content)
    again = Again(tmp_path)
    assert again.usable and not again.found and "begun anew" in again.note


@pytest.mark.parametrize("kind", ["link", "directory"])
def test_something_that_is_no_file(kind: str, tmp_path: Path) -> None:
    _, path = run_once(tmp_path)
    path.unlink()
    other = tmp_path / "precious"
    other.write_text("mine")
    path.symlink_to(other) if kind == "link" else path.mkdir()
    again = Again(tmp_path)
    assert not again.usable and "no prefixes are stored" in again.note
    assert other.read_text() == "mine"


def test_two_engines_on_one_folder(tmp_path: Path) -> None:
    run_once(tmp_path)
    first = Loader(tmp_path, 5000)
    again = Again(tmp_path)
    assert not again.usable and "another engine" in again.note and again.readable == [False] * 4
    first.close()
    assert Again(tmp_path).usable


def test_a_slot_that_is_used_again(tmp_path: Path) -> None:
    run_once(tmp_path)
    loader = Loader(tmp_path, 5000)
    loader.disk.order(StoreBlocks(1, (BlockOnDisk(KEYS[4], 1, (20, 21)),)))
    loader.disk.order(FetchBlocks(2, (BlockOnDisk(KEYS[1], 1, (2, 3)),)))
    opened(loader)
    assert [bool(m.error) for m in loader.said if isinstance(m, KvMoved)] == [False, True]
    loader.file.close()
    again = Again(tmp_path)
    assert again.found == ALL - {(KEYS[1], 1)} | {(KEYS[4], 1)}


@pytest.mark.parametrize("how", ["readable", "linked", "elsewhere"])
def test_a_file_of_prefixes_that_is_not_ones_own_is_not_used(tmp_path: Path, how: str) -> None:
    digest = hashlib.blake2b(b"model", digest_size=32).digest().hex()[:24]
    path = tmp_path / f"{digest}.prefixes"
    other = tmp_path / "other"
    other.write_bytes(b"")
    other.chmod(0o600)
    if how == "readable":
        path.write_bytes(b"")
        path.chmod(0o644)
    elif how == "linked":
        os.link(other, path)
    else:
        path.symlink_to(other)
    loader = Loader(tmp_path, 4096)
    (said,) = loader.said
    assert isinstance(said, PrefixesOpened) and not said.usable
    assert ("not this user's alone" in said.note) is (how != "elsewhere") and "no prefixes are stored" in said.note
    assert other.read_bytes() == b""
    loader.disk.close()
    loader.file.close()
