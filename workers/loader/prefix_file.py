"""The file of stored prefixes: blocks of prompts by their keys, for this run of the engine and the next.

    header, 4096 bytes: magic, version, identity of model and layout, sizes, CRC-32
    table: a record of 64 bytes for each slot: key, checksum of the slot's data, number of the write, CRC-32
    slots

No order of writes is kept that a crash could break: a slot whose data is not what its record says is noticed when it
is read, a record that is torn when the file is opened.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import struct
import zlib
from pathlib import Path

from flexgen_lite.memory.kv_layout import BLOCK_BYTES
from flexgen_lite.memory.park_file import O_DIRECT
from flexgen_lite.text.sizes import format_size
from flexgen_lite.workers.loader.direct_file import DirectFile

MAGIC = b"flexgen-lite KV\n"
VERSION = 1
_HEADER = struct.Struct("<16sI32sQQ")  # magic, version, digest of the identity, bytes of a slot, slots
_RECORD = struct.Struct("<16sIQ")  # key, checksum of the data, number of the write
_CHECK = struct.Struct("<I")
RECORD_BYTES = 64


class PrefixFile:
    """Opened, and locked against other engines, as long as this object lives. What cannot be used of a file that is
    there is left out, or the file is begun anew.

    Args:
        folder: made where it is not there.
        identity: of the model and of how K and V lie in a page.
        slot_bytes: a multiple of 4096.

    Attributes:
        note: what people should know; "": nothing.

    Raises:
        OSError: it cannot be opened. BlockingIOError: another engine has it.
    """

    def __init__(self, folder: Path, identity: str, slot_bytes: int, num_slots: int) -> None:
        self.note = ""
        self._slot_bytes, self._num_slots = slot_bytes, num_slots
        digest = hashlib.blake2b(identity.encode(), digest_size=32).digest()
        self.path = folder / f"{digest.hex()[:24]}.prefixes"
        self._header = _HEADER.pack(MAGIC, VERSION, digest, slot_bytes, num_slots)
        self._data_offset = BLOCK_BYTES + -(-num_slots * RECORD_BYTES // BLOCK_BYTES) * BLOCK_BYTES
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._table = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._data = -1
        try:
            _check_own(self._table)
            fcntl.flock(self._table, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._data = _open_direct(self._table)
            self._file = DirectFile(self._data)
            self._records = self._read_all()
        except BaseException:
            self.close()
            raise
        numbers = (record[2] for slot in range(num_slots) if (record := self._record(slot)) is not None)
        self._num_writes = max(numbers, default=0)

    def close(self) -> None:
        for descriptor in (self._table, self._data):
            if descriptor >= 0:
                os.close(descriptor)
        self._table = self._data = -1

    @property
    def file(self) -> DirectFile:
        return self._file

    @property
    def blocks(self) -> list[tuple[bytes, int]]:
        """Keys and slots, those first that were written first."""
        found = ((slot, self._record(slot)) for slot in range(self._num_slots))
        there = sorted((record[2], record[0], slot) for slot, record in found if record is not None)
        return [(key, slot) for _, key, slot in there]

    def offset(self, slot: int) -> int:
        """Where a slot begins in the file. Raises ValueError: there is no such slot."""
        if not 0 <= slot < self._num_slots:
            raise ValueError(f"slot {slot} of a file of prefixes with {self._num_slots}")
        return self._data_offset + slot * self._slot_bytes

    def checksum(self, key: bytes, slot: int) -> int | None:
        """Of what a slot holds for `key`; None: it holds another's."""
        record = self._record(slot)
        return record[1] if record is not None and record[0] == key else None

    def forget(self, slot: int) -> None:
        """What is in a slot is no more to be read; also where this process does not live to write something else."""
        if self._record(slot) is not None:
            self._write(slot, bytes(RECORD_BYTES))

    def record(self, key: bytes, slot: int, checksum: int) -> None:
        """A slot holds the block of `key`."""
        self._num_writes += 1
        body = _RECORD.pack(key, checksum, self._num_writes).ljust(RECORD_BYTES - _CHECK.size, b"\0")
        self._write(slot, body + _CHECK.pack(zlib.crc32(body)))

    def _record(self, slot: int) -> tuple[bytes, int, int] | None:
        """Key, checksum and number of the write; None where the slot holds nothing."""
        key, checksum, number = _RECORD.unpack_from(self._records, slot * RECORD_BYTES)
        return (key, checksum, number) if number else None

    def _write(self, slot: int, record: bytes) -> None:
        self._records[slot * RECORD_BYTES : (slot + 1) * RECORD_BYTES] = record
        os.pwrite(self._table, record, BLOCK_BYTES + slot * RECORD_BYTES)

    def _read_all(self) -> bytearray:
        """The table, with nothing in it that is not good."""
        size, table_bytes = os.fstat(self._table).st_size, self._num_slots * RECORD_BYTES
        header = os.pread(self._table, BLOCK_BYTES, 0)
        wanted = (self._header + _CHECK.pack(zlib.crc32(self._header))).ljust(BLOCK_BYTES, b"\0")
        if header != wanted:
            if size:
                self.note = f"{self.path} is of another kind or size, or damaged: it is begun anew"
            os.ftruncate(self._table, 0)
            os.pwrite(self._table, wanted, 0)
            os.ftruncate(self._table, self._data_offset)
            return bytearray(table_bytes)
        found = bytearray(os.pread(self._table, table_bytes, BLOCK_BYTES))
        damaged, is_short, nothing = 0, len(found) < table_bytes, bytes(RECORD_BYTES)
        found += bytes(table_bytes - len(found))
        for slot in range(self._num_slots):
            record = found[slot * RECORD_BYTES : (slot + 1) * RECORD_BYTES]
            is_there = self.offset(slot) + self._slot_bytes <= size
            good = is_there and record.endswith(_CHECK.pack(zlib.crc32(record[: -_CHECK.size])))
            if record != nothing and not good:
                found[slot * RECORD_BYTES : (slot + 1) * RECORD_BYTES] = nothing
                damaged += 1
        if damaged or is_short:
            self.note = f"{self.path} ({format_size(size)}) is damaged: {damaged} of its blocks are computed again"
            os.ftruncate(self._table, max(size, self._data_offset))
        return found


def _check_own(descriptor: int) -> None:
    """Raises OSError where others could read or write what is in it: checksums are no protection from those."""
    status = os.fstat(descriptor)
    is_own = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink == 1
    if not is_own or status.st_mode & 0o077:
        raise PermissionError(errno.EPERM, "its file is not this user's alone: remove it, or give another kv_disk_dir")


def _open_direct(descriptor: int) -> int:
    """The same file once more."""
    path, flags = f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC
    with contextlib.suppress(OSError):
        return os.open(path, flags | O_DIRECT)
    return os.open(path, flags)
