"""Whole blocks of a file written and read past the page cache, where its file system can."""

from __future__ import annotations

import errno
import fcntl
import os
import time

from flexgen_lite.memory.kv_layout import BLOCK_BYTES
from flexgen_lite.memory.park_file import O_DIRECT

TRIES, PAUSE = 4, 0.25  # of one read or write, seconds between them


class DirectFile:
    """Memory, offsets and lengths are multiples of 4096. Where the file system has no direct reads and writes, they go
    through the page cache, which is dropped behind them.

    Args:
        descriptor: open for reading and writing; it stays the caller's.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        self._is_direct = bool(flags & O_DIRECT)

    def write(self, data: memoryview, offset: int) -> None:
        """All of it. Raises OSError: the disk is full, or broken."""
        done = 0
        while done < len(data):
            count = self._try(os.pwritev, data[done:], offset + done)
            if count == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done += self._whole(count, len(data) - done)
        if not self._is_direct:
            os.fdatasync(self._descriptor)  # else nothing of it can be dropped
            os.posix_fadvise(self._descriptor, offset, len(data), os.POSIX_FADV_DONTNEED)

    def read(self, target: memoryview, offset: int) -> None:
        """All of it. Raises OSError, EOFError where the file is shorter."""
        done = 0
        while done < len(target):
            count = self._try(os.preadv, target[done:], offset + done)
            if count == 0:
                raise EOFError(f"the file ends at byte {offset + done}")
            done += self._whole(count, len(target) - done)
        if not self._is_direct:
            os.posix_fadvise(self._descriptor, offset, len(target), os.POSIX_FADV_DONTNEED)

    def _whole(self, count: int, wanted: int) -> int:
        """The next direct read or write starts on a whole block."""
        whole = count // BLOCK_BYTES * BLOCK_BYTES if self._is_direct and count < wanted else count
        if whole == 0:
            raise OSError(errno.EIO, "a part of a block at a time")
        return whole

    def _try(self, call: object, part: memoryview, offset: int) -> int:
        tries = 0
        while True:
            try:
                return call(self._descriptor, [part], offset)  # type: ignore[operator, no-any-return]
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno == errno.EINVAL and self._is_direct:
                    self._go_through_cache()
                    continue
                tries += 1
                if error.errno != errno.EIO or tries == TRIES:
                    raise
                time.sleep(PAUSE)  # a disk may find its way after all

    def _go_through_cache(self) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~O_DIRECT)
        self._is_direct = False
