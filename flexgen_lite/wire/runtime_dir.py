"""The private directory of one engine: its sockets, gone when the engine is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
from pathlib import Path

_NAME = re.compile(r"flexgen-lite-(\d+)-[0-9a-f]{8}")
_LONGEST_FILE_NAME = 40  # of what lies in the directory


class RuntimeDir:
    """A directory of mode 0700 under XDG_RUNTIME_DIR or the temporary directory; directories of the dead are removed.

    Its owner holds a lock on the file `lock` in it. A directory is a dead one's if no process has the number in its
    name and nobody holds its lock (a process of another container may not be seen, its lock is).

    Args:
        outer: a directory of this kind that it is to lie in, and to be gone with.
    """

    def __init__(self, outer: Path | None = None) -> None:
        if outer is None:
            base = _base()
            _remove_stale(base)
            self.path = base / f"flexgen-lite-{os.getpid()}-{secrets.token_hex(4)}"
        else:
            self.path = outer / secrets.token_hex(3)
        self.path.mkdir(mode=0o700)
        self._lock = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Remove it with all that is in it. Safe to call twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _base() -> Path:
    for candidate in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"):
        if candidate is None or not os.path.isabs(candidate) or not os.access(candidate, os.W_OK | os.X_OK):
            continue
        longest = len(os.fsencode(candidate)) + len("/flexgen-lite-4194304-01234567/") + _LONGEST_FILE_NAME
        if longest <= 107:  # what a unix socket's path may have
            return Path(candidate)
    raise OSError("no directory for sockets: set XDG_RUNTIME_DIR or TMPDIR to a writable directory with a short path")


def _remove_stale(base: Path) -> None:
    with contextlib.suppress(OSError), os.scandir(base) as entries:
        for entry in entries:
            match = _NAME.fullmatch(entry.name)
            if match is not None and not _is_alive(int(match[1])):
                with contextlib.suppress(OSError):
                    _remove_if_unlocked(Path(entry.path))


def _remove_if_unlocked(path: Path) -> None:
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        return
    try:
        lock = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(lock)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
