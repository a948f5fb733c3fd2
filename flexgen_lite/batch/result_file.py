"""The output file of a batch: locked, gone on with, each row whole."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from flexgen_lite.batch.file import BadLine, BatchRequest
from flexgen_lite.batch.result_row import RowsThere, encode_row
from flexgen_lite.client.completion import Completion
from flexgen_lite.openai.response_body import response_body

SYNC_SECONDS = 3.0  # a power cut loses about as much
RETRY_SECONDS = 3.0  # while the disk is full


class ResultWriter:
    """Appends result rows to a file. May be used by several threads.

    The file is locked and read when this is made, and not changed before `begin()`. Rows go to the system at once, so
    that a crash of this process loses none, and to the disk every few seconds. While the disk is full, writing waits.

    Args:
        path: the output file; it is made if it is not there.
        overwrite: pass over what is in it, and cut that off in `begin()`.
        warn: is given what a user should know, on any thread.

    Attributes:
        there: what the rows in the file answer.

    Raises:
        FileExistsError: another run writes to the file, or it has lines that are no rows of a run.
        OSError: it cannot be opened, read or, later, written.
    """

    def __init__(self, path: Path, *, overwrite: bool = False, warn: Callable[[str], None] = lambda _: None) -> None:
        self._path, self._warn = path, warn
        self._is_new = not path.exists()
        self._fd, self._is_regular = _open(path, warn)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._syncing: threading.Thread | None = None
        self._unsynced = False
        self._sync_failure: OSError | None = None
        self._run_id, self._num_rows = os.urandom(8).hex(), 0
        try:
            self.there = self._read_rows() if self._is_regular and not overwrite else RowsThere(path)
        except BaseException:
            os.close(self._fd)
            raise
        self._end = self.there.num_bytes

    def begin(self, model: str) -> None:
        """Cut off what is no whole row, or all if it is to be overwritten. Rows may be written from now on.

        Args:
            model: the rows name it as the one that answered.
        """
        self._model = model
        if self._is_regular:
            os.ftruncate(self._fd, self._end)
            self._sync_directory()
            self._syncing = threading.Thread(target=self._sync, args=(self._fd,), name="flexgen-lite sync", daemon=True)
            self._syncing.start()
        self._is_new = False

    def write(self, request: BatchRequest, request_id: str, completion: Completion) -> None:
        """The result of a request, good or failed; `request_id` is that of its line."""
        body = None if completion.error is not None else response_body(request, completion, self._model)
        row = encode_row(self._next_id(), request.custom_id, request_id, body, completion.error)
        self._append(row)

    def write_bad_line(self, line: BadLine, request_id: str) -> None:
        """Why a line is no request; `request_id` is that of the line."""
        self._append(encode_row(self._next_id(), line.custom_id, request_id, None, line.message))

    def close(self) -> None:
        """No further row is written; those that were are on the disk. Safe to call twice."""
        self._closing.set()
        with self._lock:
            fd, self._fd = self._fd, -1
        if fd < 0:
            return
        try:
            if self._syncing is not None:
                self._syncing.join()
                self._sync_once(fd)
            if self._is_new:
                self._path.resolve().unlink(missing_ok=True)  # while it is locked: nobody else has written to it
        finally:
            os.close(fd)
        if self._sync_failure is not None:
            raise self._sync_failure

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next_id(self) -> str:
        with self._lock:
            self._num_rows += 1
            return f"{self._run_id}{self._num_rows:08x}"

    def _read_rows(self) -> RowsThere:
        with open(self._fd, "rb", closefd=False) as lines:
            return RowsThere(self._path, lines)

    def _append(self, row: bytes) -> None:
        with self._lock:
            if self._closing.is_set():
                return
            if self._sync_failure is not None:
                raise self._sync_failure
            if self._put(row):
                self._end += len(row)
                self._unsynced = True

    def _put(self, row: bytes) -> bool:
        """Write it as a whole, waiting for room if need be; False if the wait ended with `close()`."""
        rest, has_waited = memoryview(row), False
        while rest:
            try:
                rest = rest[os.write(self._fd, rest) :]
            except OSError as error:
                self._cut_torn_row()
                if not self._is_regular or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise self._named(error) from None
                if not has_waited:
                    self._warn(f"{self._path}: {error.strerror}; waiting for room, no row is lost")
                rest, has_waited = memoryview(row), True
                if self._closing.wait(RETRY_SECONDS):
                    return False
        if has_waited:
            self._warn(f"{self._path}: there is room again, going on")
        return True

    def _cut_torn_row(self) -> None:
        if self._is_regular:
            os.ftruncate(self._fd, self._end)

    def _sync(self, fd: int) -> None:
        while not self._closing.wait(SYNC_SECONDS):
            self._sync_once(fd)

    def _sync_once(self, fd: int) -> None:
        if not self._unsynced or self._sync_failure is not None:
            return
        self._unsynced = False  # before, for rows may come meanwhile
        try:
            os.fsync(fd)
        except OSError as error:
            self._sync_failure = self._named(error)

    def _sync_directory(self) -> None:
        """A new file's name is in its directory: it goes to the disk too."""
        with contextlib.suppress(OSError):  # some file systems have no such thing
            fd = os.open(self._path.resolve().parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def _named(self, error: OSError) -> OSError:
        return OSError(error.errno, error.strerror, str(self._path))


def _open(path: Path, warn: Callable[[str], None]) -> tuple[int, bool]:
    """A file descriptor, and whether it is that of a regular file, which is then locked."""
    while True:
        is_special = path.exists() and not path.is_file()
        flags = os.O_WRONLY if is_special else os.O_RDWR | os.O_CREAT
        fd = os.open(path, flags | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            is_regular = stat.S_ISREG(os.fstat(fd).st_mode)
            if is_regular:
                _take_lock(fd, path, warn)
            with contextlib.suppress(FileNotFoundError):
                if not is_regular or os.path.samestat(os.fstat(fd), os.stat(path)):
                    return fd, is_regular
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # another run has removed it between opening and locking


def _take_lock(fd: int, path: Path, warn: Callable[[str], None]) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FileExistsError(
            f"{path} is being written by another run: wait for its end, or give another output file"
        ) from None
    except OSError as error:  # a network file system
        warn(f"{path} cannot be locked ({error.strerror}): start no second run on it meanwhile")
