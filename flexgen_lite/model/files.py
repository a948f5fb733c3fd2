"""Single files of a model directory, whatever is there in their place: opened, and read as JSON."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from flexgen_lite.text.shown import shown_path

MAX_JSON_BYTES = 500_000_000
OFFLINE = {"HF_HUB_OFFLINE": "1"}
"""Environment of a process that opens a model again: it is there, and may be a newer one elsewhere."""
_AGAIN = "download it again"
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISCHR, "a device"),
)


class CheckpointError(ValueError):
    """The model directory cannot be used; the message names the file or tensor and what to do."""


def is_there(path: Path) -> bool:
    """Whether there is anything of that name, be it a link that leads nowhere.

    Raises:
        CheckpointError: the name is none that a file can have, or the directory cannot be looked into.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    return True


def open_file(path: Path) -> BinaryIO:
    """A file's bytes, from the start. Does not wait for anybody to write to a pipe.

    Raises:
        CheckpointError: it is no file, or cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise CheckpointError(f"{shown_path(path)} is {_kind(mode)}, not a file: {_AGAIN}")
    return os.fdopen(descriptor, "rb")


def check_files(directory: Path, names: Iterable[str]) -> None:
    """Raises CheckpointError for one of `names` that is there, and no file that can be opened."""
    for name in names:
        if is_there(directory / name):
            open_file(directory / name).close()


def check_contents(directory: Path, names: Iterable[str]) -> None:
    """Raises CheckpointError for one of `names` that is there, and not the JSON object or the text that it is to be."""
    for name in names:
        path = directory / name
        if not is_there(path):
            continue
        if path.suffix == ".json":
            read_json(path)
            continue
        with open_file(path) as file:
            _text(path, read(file, path))


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object, in UTF-8.

    Raises:
        CheckpointError: it has none, or cannot be read.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{shown_path(path)} has {size} bytes, {MAX_JSON_BYTES} allowed: {_AGAIN}")
        return parse_object(path, read(file, path))


def read(file: BinaryIO, path: Path, num_bytes: int = -1) -> bytes:
    """The next bytes of a file, or all that are left. Raises CheckpointError where the disk fails."""
    try:
        return file.read(num_bytes)
    except OSError as error:
        raise CheckpointError(f"{shown_path(path)} cannot be read: {error.strerror}: check the disk") from error


def parse_object(path: Path, data: bytes) -> dict[str, Any]:
    """The JSON object that `data`, from the file at `path`, is. Raises CheckpointError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("the same key twice")
        return result

    try:
        value = json.loads(_text(path, data), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        reason = shown_path(error) if data else "it is empty"
        raise CheckpointError(f"{shown_path(path)}: its JSON cannot be read ({reason}); {_AGAIN}") from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise CheckpointError(f"{shown_path(path)}: a JSON object is expected, not {kind}; {_AGAIN}")
    return value


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    """What to say where the system refuses a file."""
    if not isinstance(error, OSError):  # a name with a NUL in it
        return CheckpointError(f"{shown_path(path)} is no name of a file: {_AGAIN}")
    if isinstance(error, FileNotFoundError) and path.is_symlink():
        return CheckpointError(f"{path} is a link to {shown_path(os.readlink(path))}, which is not there: {_AGAIN}")
    if error.errno == errno.ENXIO:
        return CheckpointError(f"{shown_path(path)} is a socket or a device, not a file: {_AGAIN}")
    remedy = "let this user read it" if isinstance(error, PermissionError) else _AGAIN
    return CheckpointError(f"{shown_path(path)} cannot be opened: {error.strerror}: {remedy}")


def _text(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte {error.start + 1} (0x{data[error.start]:02x})"
        raise CheckpointError(f"{shown_path(path)}: {where} is not UTF-8; {_AGAIN}") from None


def _kind(mode: int) -> str:
    return next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
