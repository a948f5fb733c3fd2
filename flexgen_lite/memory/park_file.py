"""The file of parked sequences: it has no name, so nothing is left of it when the last process that has it ends."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

O_DIRECT = getattr(os, "O_DIRECT", 0)


class ParkFile:
    """Opened by the coordinator, which hands its descriptor to each disk loader: what is in it outlives these.

    Args:
        folder: made where it is not there.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.fd = _open_without_name(folder)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _open_without_name(folder: Path) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC | getattr(os, "O_TMPFILE", 0)
    if hasattr(os, "O_TMPFILE"):
        for more in (O_DIRECT, 0):  # there are file systems without direct writes, and such without nameless files
            try:
                return os.open(folder, flags | more, 0o600)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
                    raise
    descriptor, name = tempfile.mkstemp(prefix=".parked-", dir=folder)
    os.unlink(name)
    return descriptor
