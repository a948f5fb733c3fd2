"""KV on disk: pages and states out to files, and back, by a thread beside the one that loads weights."""

from __future__ import annotations

import queue
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexgen_lite.memory.arena import Memory, make_buffer
from flexgen_lite.memory.kv_layout import BLOCK_BYTES, BOUNCE_BYTES
from flexgen_lite.wire.kv_on_disk import (
    BlockOnDisk,
    FetchBlocks,
    FetchKv,
    KvDiskSpec,
    KvMoved,
    MoveKv,
    ParkKv,
    PrefixesOpened,
    StoreBlocks,
    StoredBlock,
)
from flexgen_lite.workers.loader.direct_file import DirectFile
from flexgen_lite.workers.loader.prefix_file import PrefixFile

LOCK_SECONDS = 2.0  # that another process may hold the file of prefixes and still be ending


class WrongBytes(Exception):
    """What was read is not what was written."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes of an arena (None: of none) and where they are in a file."""

    memory: memoryview | None
    offset: int


class KvDisk:
    """Takes orders one after the other. Everything goes through one buffer of BOUNCE_BYTES, or of one slot if that is
    larger: pages need not begin where a direct read could put them. What is read is compared with its checksum; nobody
    uses pages of an order that has failed.

    Args:
        kv, states: the arenas; `states` is None where the model has none.
        parked: descriptor of the file of parked sequences, which the coordinator keeps open.
        post: sends a message to the coordinator; from any thread.
    """

    def __init__(
        self,
        spec: KvDiskSpec,
        kv: Memory,
        states: Memory | None,
        parked: int,
        post: Callable[[KvMoved | PrefixesOpened], None],
    ) -> None:
        if spec.slot_bytes % BLOCK_BYTES or spec.slot_bytes < spec.page_bytes:
            raise ValueError(f"slots of {spec.slot_bytes} bytes for pages of {spec.page_bytes}")
        self._spec = spec
        self._kv = memoryview(kv)
        self._states = None if states is None else memoryview(states)
        self._parked = DirectFile(parked)
        self._prefixes: PrefixFile | None = None
        self._post = post
        self._bounce = make_buffer(max(BOUNCE_BYTES // spec.slot_bytes, 1) * spec.slot_bytes)
        self._orders: queue.SimpleQueue[MoveKv | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="KV on disk", daemon=True)
        self._thread.start()

    def order(self, order: MoveKv) -> None:
        self._orders.put(order)

    def close(self) -> None:
        """When what was ordered is done."""
        self._orders.put(None)
        self._thread.join()
        if self._prefixes is not None:
            self._prefixes.close()

    def _work(self) -> None:
        if self._spec.identity:
            self._post(self._open_prefixes())
        while (order := self._orders.get()) is not None:
            self._post(self.carry_out(order))

    def _open_prefixes(self) -> PrefixesOpened:
        spec = self._spec
        block_bytes = spec.slot_bytes * spec.pages_of_block
        try:
            self._prefixes = self._open_when_free(block_bytes)
        except BlockingIOError:
            note = (
                f"kv_disk_dir={spec.folder}: another engine of this model stores its prefixes there, this one does "
                "not: give it a kv_disk_dir of its own"
            )
            return PrefixesOpened((), False, note)
        except OSError as error:
            return PrefixesOpened((), False, f"kv_disk_dir={spec.folder}: no prefixes are stored: {error.strerror}")
        blocks = tuple(StoredBlock(key, slot) for key, slot in self._prefixes.blocks)
        return PrefixesOpened(blocks, True, self._prefixes.note)

    def _open_when_free(self, block_bytes: int) -> PrefixFile:
        """The process before this one may not have ended yet."""
        spec, until = self._spec, time.monotonic() + LOCK_SECONDS
        while True:
            try:
                return PrefixFile(Path(spec.folder), spec.identity, block_bytes, spec.prefix_slots)
            except BlockingIOError:
                if time.monotonic() > until:
                    raise
            time.sleep(LOCK_SECONDS / 20)

    def carry_out(self, order: MoveKv) -> KvMoved:
        """Never raises what a disk may be to blame for."""
        start_ns = time.monotonic_ns()
        checksums: tuple[int, ...] = ()
        error = ""
        try:
            match order:
                case ParkKv():
                    num_bytes = len(order.slots) * self._spec.slot_bytes
                    checksums = self._write(self._parked, self._pieces(order))
                case FetchKv():
                    num_bytes = len(order.slots) * self._spec.slot_bytes
                    if self._read(self._parked, self._pieces(order), order.checksums) != order.checksums:
                        raise WrongBytes("what was read of a parked sequence is not what was written")
                case StoreBlocks():
                    num_bytes = sum(map(self._store, order.blocks))
                case FetchBlocks():
                    num_bytes = sum(map(self._fetch, order.blocks))
        except OSError as failure:
            num_bytes, error = 0, failure.strerror or str(failure)
        except (EOFError, WrongBytes) as failure:
            num_bytes, error = 0, str(failure)
        return KvMoved(order.ticket, checksums, num_bytes, start_ns, time.monotonic_ns(), error)

    # ------------------------------------------------------------------------------------------------ what goes where

    def _page(self, page: int) -> memoryview:
        size = self._spec.page_bytes
        if not 0 <= page * size <= len(self._kv) - size:
            raise ValueError(f"page {page} is not in a KV arena of {len(self._kv)} bytes")
        return self._kv[page * size : (page + 1) * size]

    def _pieces(self, order: ParkKv | FetchKv) -> list[_Piece]:
        parts = [self._page(page) for page in order.pages]
        if order.state >= 0:
            size = self._spec.state_bytes
            assert self._states is not None and (order.state + 1) * size <= len(self._states), "no such state"
            begin, end = order.state * size, (order.state + 1) * size
            step = self._spec.slot_bytes
            parts += [self._states[at : min(at + step, end)] for at in range(begin, end, step)]
        if len(parts) != len(order.slots):
            raise ValueError(f"{len(order.slots)} slots for {len(parts)} parts")
        return [_Piece(part, slot * self._spec.slot_bytes) for part, slot in zip(parts, order.slots, strict=True)]

    def _file_of_prefixes(self) -> PrefixFile:
        if self._prefixes is None:
            raise OSError("there is no file of prefixes")
        return self._prefixes

    def _store(self, block: BlockOnDisk) -> int:
        prefixes = self._file_of_prefixes()
        offset, step = prefixes.offset(block.slot), self._spec.slot_bytes
        prefixes.forget(block.slot)
        pieces = [_Piece(self._page(page), offset + number * step) for number, page in enumerate(block.pages)]
        checksums = self._write(prefixes.file, pieces)
        prefixes.record(block.key, block.slot, _joined(checksums))
        return len(pieces) * step

    def _fetch(self, block: BlockOnDisk) -> int:
        prefixes = self._file_of_prefixes()
        offset, step = prefixes.offset(block.slot), self._spec.slot_bytes
        pieces = [
            _Piece(self._page(page) if page >= 0 else None, offset + number * step)
            for number, page in enumerate(block.pages)
        ]
        checksum = prefixes.checksum(block.key, block.slot)
        if checksum is None:
            raise WrongBytes("a stored prefix is not there any more")
        if _joined(self._read(prefixes.file, pieces)) != checksum:
            prefixes.forget(block.slot)
            raise WrongBytes("a stored prefix is not what was written")
        return len(pieces) * step

    # ------------------------------------------------------------------------------------------------ bytes

    def _write(self, file: DirectFile, pieces: Sequence[_Piece]) -> tuple[int, ...]:
        """Checksums of the pieces."""
        checksums: list[int] = []
        step = self._spec.slot_bytes
        for run in self._runs(pieces):
            for number, piece in enumerate(run):
                assert piece.memory is not None
                into = self._bounce[number * step : number * step + len(piece.memory)]
                into[:] = piece.memory
                checksums.append(zlib.crc32(into))
            file.write(self._bounce[: len(run) * step], run[0].offset)
        return tuple(checksums)

    def _read(
        self, file: DirectFile, pieces: Sequence[_Piece], expected: Sequence[int] | None = None
    ) -> tuple[int, ...]:
        """Checksums of what was read. With `expected`, pieces that have another are left out."""
        checksums: list[int] = []
        step = self._spec.slot_bytes
        for run in self._runs(pieces):
            file.read(self._bounce[: len(run) * step], run[0].offset)
            for number, piece in enumerate(run):
                size = self._spec.page_bytes if piece.memory is None else len(piece.memory)
                found = self._bounce[number * step : number * step + size]
                checksum = zlib.crc32(found)
                is_good = expected is None or expected[len(checksums)] == checksum
                checksums.append(checksum)
                if piece.memory is not None and is_good:
                    piece.memory[:] = found
        return tuple(checksums)

    def _runs(self, pieces: Iterable[_Piece]) -> list[list[_Piece]]:
        """Pieces that lie one behind the other in the file, as many as the buffer has room for."""
        runs: list[list[_Piece]] = []
        most = len(self._bounce) // self._spec.slot_bytes
        for piece in pieces:
            if runs and len(runs[-1]) < most and runs[-1][-1].offset + self._spec.slot_bytes == piece.offset:
                runs[-1].append(piece)
            else:
                runs.append([piece])
        return runs


def _joined(checksums: Sequence[int]) -> int:
    """One for all of them."""
    return zlib.crc32(struct.pack(f"<{len(checksums)}I", *checksums))
