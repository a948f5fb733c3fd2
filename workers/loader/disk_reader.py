"""Positioned reads past the page cache, many in flight, into memory that is there already."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flexgen_lite.model.checkpoint import stamp
from flexgen_lite.model.files import CheckpointError
from flexgen_lite.model.spec import FileStamp, SmallSource
from flexgen_lite.workers.loader.checksums import Checksums

READ_BYTES = 8 << 20  # of one read: large enough for full speed, small enough to keep every thread busy
BLOCK_BYTES = 4096
IO_TRIES, IO_PAUSE = 4, 0.25  # of one read, seconds between them

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReadOrder:
    """Bytes of a file and where they go: file offset, length and memory address are multiples of 4096.

    The last block may reach past the end of the file; what lies there is left as it is in memory.
    """

    file: int
    file_offset: int
    num_bytes: int
    target: memoryview


@dataclass(slots=True)
class _OpenFile:
    path: str
    descriptor: int
    stamp: FileStamp
    direct: bool


class DiskReader:
    """The checkpoint's files, opened at first use. `read` may be called from several threads at once.

    Args:
        stamps: of the files; they must still be the same.
        checksums: that what is read is compared with, where given.
    """

    def __init__(self, files: Sequence[str], stamps: Sequence[FileStamp], checksums: Checksums | None = None) -> None:
        self._paths = tuple(files)
        self._stamps = tuple(stamps)
        self._checksums = checksums
        self._open: dict[int, _OpenFile] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        with self._lock:
            for opened in self._open.values():
                os.close(opened.descriptor)
            self._open.clear()

    def check_unchanged(self, files: Iterable[int]) -> None:
        """Raises CheckpointError if one of `files` is no longer what it was when it was opened."""
        for file in files:
            opened = self._file(file)
            _check_stamp(opened)

    def read(self, order: ReadOrder) -> int:
        """Read until the order is full or the file ends; the number of bytes. Raises CheckpointError."""
        opened = self._file(order.file)
        wanted = min(order.num_bytes, opened.stamp.size - order.file_offset)
        if wanted <= 0:
            raise CheckpointError(
                f"{opened.path} has {opened.stamp.size} bytes, but weights are expected at "
                f"{order.file_offset}: download it again"
            )
        done = 0
        while done < wanted:
            got = self._read_some(opened, order, done)
            if got == 0:
                raise CheckpointError(
                    f"{opened.path} ends at byte {order.file_offset + done}, "
                    f"{order.file_offset + wanted} expected: it was "
                    "cut off while in use; download it again"
                )
            before, done = done, done + got
            if done < wanted and opened.direct:
                done = done // BLOCK_BYTES * BLOCK_BYTES  # the next direct read starts on a whole block
                if done == before:
                    self._read_buffered(opened)
        if not opened.direct:
            os.posix_fadvise(opened.descriptor, order.file_offset, order.num_bytes, os.POSIX_FADV_DONTNEED)
        if self._checksums is not None:
            self._checksums.check(order.file, order.file_offset, order.target[:wanted])
        return wanted

    def read_small(self, source: SmallSource) -> bytes:
        """Through the page cache, whatever it is. Raises CheckpointError."""
        opened = self._file(source.file)
        try:
            with open(f"/proc/self/fd/{opened.descriptor}", "rb") as file:  # one that may be read at any place
                file.seek(source.offset)
                found = file.read(source.num_bytes)
        except OSError as error:
            raise CheckpointError(
                f"{opened.path}: reading {source.num_bytes} bytes at {source.offset} failed: {error.strerror}; check "
                "the disk"
            ) from error
        if len(found) != source.num_bytes:
            raise CheckpointError(
                f"{opened.path} ends before byte {source.offset + source.num_bytes}: download it again"
            )
        return found

    def _read_some(self, opened: _OpenFile, order: ReadOrder, done: int) -> int:
        position = order.file_offset + done
        target = order.target[done : order.num_bytes]
        tries = 0
        while True:
            direct = opened.direct  # another thread may change it meanwhile
            try:
                return os.preadv(opened.descriptor, [target], position)
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno == errno.EINVAL and direct:
                    self._read_buffered(opened)
                    continue
                tries += 1
                if error.errno == errno.EIO and tries < IO_TRIES:  # a disk may find its way after all
                    time.sleep(IO_PAUSE)
                    continue
                raise CheckpointError(
                    f"{opened.path}: reading {len(target)} bytes at {position} failed: {error.strerror}; check the disk"
                ) from error

    def _file(self, file: int) -> _OpenFile:
        opened = self._open.get(file)
        if opened is None:
            with self._lock:
                opened = self._open.get(file)
                if opened is None:
                    opened = self._open[file] = _open(self._paths[file], self._stamps[file])
        return opened

    def _read_buffered(self, opened: _OpenFile) -> None:
        """The file system opened the file with O_DIRECT but does not read so. It is not opened anew: there may be
        another file of its name by now."""
        with self._lock:
            if opened.direct:
                flags = fcntl.fcntl(opened.descriptor, fcntl.F_GETFL)
                fcntl.fcntl(opened.descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
                opened.direct = False
                _say_buffered(opened.path)


def _open(path: str, expected: FileStamp) -> _OpenFile:
    direct = hasattr(os, "O_DIRECT")
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # there may be a pipe by now, which would be waited for
    try:
        try:
            descriptor = os.open(path, flags | os.O_DIRECT if direct else flags)
        except OSError as error:
            if error.errno != errno.EINVAL or not direct:
                raise
            direct = False
            descriptor = os.open(path, flags)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened ({error.strerror}): restore it and start again") from error
    if not direct:
        _say_buffered(path)
    opened = _OpenFile(path, descriptor, expected, direct)
    _check_stamp(opened)
    return opened


def _check_stamp(opened: _OpenFile) -> None:
    now = stamp(os.fstat(opened.descriptor))
    if now != opened.stamp:
        raise CheckpointError(
            f"{opened.path} changed while it was in use ({opened.stamp.size} bytes at the start, {now.size} now): "
            "leave the model's files alone and start again"
        )


_said_buffered = False


def _say_buffered(path: str) -> None:
    global _said_buffered
    if not _said_buffered:
        _said_buffered = True
        logger.warning("%s: its file system has no direct reads; reading through the page cache, which is slower", path)


def split_order(order: ReadOrder, num_bytes: int = READ_BYTES) -> list[ReadOrder]:
    """The order in parts of at most `num_bytes`, a multiple of 4096."""
    return [
        ReadOrder(
            order.file,
            order.file_offset + start,
            min(num_bytes, order.num_bytes - start),
            order.target[start : start + num_bytes],
        )
        for start in range(0, order.num_bytes, num_bytes)
    ]
