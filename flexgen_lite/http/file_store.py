"""Files that clients upload, and that batches write: /v1/files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from flexgen_lite.http.errors import ApiError
from flexgen_lite.text.shown import shown

_ID = re.compile(r"file-[0-9a-f]{24}")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file, as the API describes it."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str

    def to_json(self) -> dict[str, object]:
        return {"object": "file", **asdict(self), "status": "processed"}


class FileStore:
    """Files in a folder, each beside a small one that describes it. May be used by several threads.

    Args:
        folder: is made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        for part in (*folder.glob("file-*.part"), *folder.glob("file-*.tmp")):  # a server before this one was killed
            part.unlink()

    def add(self, source: BinaryIO, filename: str, purpose: str) -> StoredFile:
        """A copy of what is in `source`, from where it stands."""
        file_id = new_id("file")
        part = self._folder / f"{file_id}.part"
        try:
            with part.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            return self._describe(part, file_id, filename, purpose)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def adopt(self, path: Path, filename: str, purpose: str) -> StoredFile:
        """A file that is moved into the store. The same name takes the place of the file that had it: who was
        interrupted may do it again."""
        file_id = f"file-{hashlib.blake2b(filename.encode(), digest_size=12).hexdigest()}"
        return self._describe(path, file_id, filename, purpose)

    def get(self, file_id: str) -> StoredFile:
        """
        Raises:
            ApiError: there is no such file.
        """
        try:
            return StoredFile(**json.loads(self._about(file_id).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise ApiError(404, f"there is no file {shown(file_id)}", "file_id") from None

    def path(self, file_id: str) -> Path:
        """Where its content is. Raises as `get` does."""
        self.get(file_id)
        return self._folder / file_id

    def list(self) -> list[StoredFile]:
        """The newest first."""
        found = []
        for path in self._folder.glob("file-*.json"):
            with contextlib.suppress(ApiError):  # it was deleted meanwhile
                found.append(self.get(path.stem))
        return sorted(found, key=lambda file: (file.created_at, file.id), reverse=True)

    def delete(self, file_id: str) -> None:
        """Raises as `get` does."""
        with self._lock:
            self.get(file_id)
            self._about(file_id).unlink(missing_ok=True)
            (self._folder / file_id).unlink(missing_ok=True)

    def _describe(self, part: Path, file_id: str, filename: str, purpose: str) -> StoredFile:
        stored = StoredFile(file_id, part.stat().st_size, int(time.time()), filename, purpose)
        with self._lock:
            part.replace(self._folder / file_id)
            write_json(self._about(file_id), asdict(stored))
        return stored

    def _about(self, file_id: str) -> Path:
        if not _ID.fullmatch(file_id):
            raise ApiError(404, f"there is no file {shown(file_id)}", "file_id")
        return self._folder / f"{file_id}.json"


def new_id(kind: str) -> str:
    return f"{kind}-{os.urandom(12).hex()}"


def write_json(path: Path, values: dict[str, object]) -> None:
    """Replaces the file as a whole: a crash leaves the old one or the new one."""
    part = path.with_suffix(".tmp")
    with part.open("w", encoding="utf-8") as file:
        json.dump(values, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
