"""Checksums of what was read from the checkpoint's files: recorded when a part is read for the first time, compared
when the user asks for it.

They are kept in the user's cache, a file for each file of weights as it was when it was opened (path, size, time of
last change): CRC-32 of every part that is read in one go. A changed file has another record.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path

from flexgen_lite.model.files import CheckpointError
from flexgen_lite.model.spec import FileStamp

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flexgen-lite" / "checksums"


class Checksums:
    """Of `paths`, whose state at opening is in `stamps`. `check` may be called from several threads.

    Args:
        verify: compare every part that is read with its record; else parts without a record are recorded only.
    """

    def __init__(self, paths: Sequence[str], stamps: Sequence[FileStamp], verify: bool, folder: Path) -> None:
        self._paths = tuple(paths)
        self._verify = verify
        self._lock = threading.Lock()
        self._records = [
            folder
            / f"{hashlib.blake2b(repr((path, stamp.size, stamp.mtime_ns)).encode(), digest_size=16).hexdigest()}.json"
            for path, stamp in zip(paths, stamps, strict=True)
        ]
        self._known = [_read(record) for record in self._records]
        self._changed: set[int] = set()

    def check(self, file: int, offset: int, data: memoryview) -> None:
        """`data` was read from `offset` of the file. Raises CheckpointError where it is not what it was."""
        part = f"{offset}+{len(data)}"
        known = self._known[file].get(part)
        if known is not None and not self._verify:
            return
        checksum = zlib.crc32(data)
        if known is None:
            with self._lock:
                self._known[file][part] = checksum
                self._changed.add(file)
        elif known != checksum:
            raise CheckpointError(
                f"{self._paths[file]}: the {len(data)} bytes from {offset} on are not what they were when they were "
                "first loaded, though the file's size and date are the same: check the disk and download the file again"
            )

    def save(self) -> None:
        """Writes what is new. A cache that cannot be written is no error."""
        with self._lock:
            changed, self._changed = self._changed, set()
            texts = {file: json.dumps(self._known[file]) for file in changed}
        for file, text in texts.items():
            record = self._records[file]
            try:
                record.parent.mkdir(parents=True, exist_ok=True)
                draft = record.with_suffix(f".{os.getpid()}")
                draft.write_text(text, encoding="ascii")
                draft.replace(record)
            except OSError as error:
                logger.warning("checksums are not recorded: %s: %s", record, error.strerror)


def _read(record: Path) -> dict[str, int]:
    try:
        found = json.loads(record.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return {}
    good = isinstance(found, dict) and all(type(value) is int for value in found.values())
    return found if good else {}
