"""The lines of a batch file, or a sentence about a file that cannot be one: told once, not line by line."""

from __future__ import annotations

import contextlib
import io
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from flexgen_lite.text.json_text import BOM, JsonError, parse_json
from flexgen_lite.text.shown import shown_path

HEAD_BYTES = 1 << 16  # that a file is judged by; of a pipe what has come of them
_UNPACK = "unpack it first"
_EXPORT = "export it as JSON, one object a line"
_FORMATS = (
    (b"\x1f\x8b", "is compressed with gzip", _UNPACK),
    (b"BZh", "is compressed with bzip2", _UNPACK),
    (b"\xfd7zXZ\0", "is compressed with xz", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd", _UNPACK),
    (b"\x04\x22\x4d\x18", "is compressed with lz4", _UNPACK),
    (b"PK\x03\x04", "is a ZIP archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive", _UNPACK),
    (b"PAR1", "is a Parquet file", _EXPORT),
    (b"ARROW1", "is an Arrow file", _EXPORT),
    (b"Obj\x01", "is an Avro file", _EXPORT),
    (b"ORC", "is an ORC file", _EXPORT),
    (b"\x89HDF", "is an HDF5 file", _EXPORT),
    (b"SQLite format 3\0", "is a SQLite database", _EXPORT),
    (b"%PDF-", "is a PDF file", _EXPORT),
)
_ENCODINGS = (  # with a byte order mark, and as "{" or a line's end looks without
    (re.compile(rb"\xff\xfe\0\0|[^\0]\0\0\0", re.DOTALL), "UTF-32"),
    (re.compile(rb"\0\0\xfe\xff|\0\0\0[^\0]", re.DOTALL), "UTF-32"),
    (re.compile(rb"\xff\xfe|[^\0]\0", re.DOTALL), "UTF-16"),
    (re.compile(rb"\xfe\xff|\0[^\0]", re.DOTALL), "UTF-16"),
)
_CR_ALONE = re.compile(rb"\}\s*\r\s*\{")


class BatchFileError(ValueError):
    """A file that holds no requests, one a line.

    Attributes:
        problem: what is wrong with it, without its name.
    """

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{shown_path(path)} {problem}")
        self.problem = problem


@contextlib.contextmanager
def open_lines(path: Path) -> Iterator[BinaryIO]:
    """The lines of a batch file, which may be a pipe: it is read once, from its beginning to its end.

    Raises:
        BatchFileError: it holds something else.
        OSError: it cannot be opened.
    """
    with path.open("rb", buffering=0) as raw, io.BufferedReader(raw, HEAD_BYTES) as file:
        head = file.peek(HEAD_BYTES)
        problem = _problem(head)
        if problem is not None:
            raise BatchFileError(path, problem)
        yield file


def check_lines(path: Path) -> None:
    """Raises as `open_lines` does. A pipe, or a device, is not opened: that would use it up."""
    mode = path.stat().st_mode
    if not stat.S_ISFIFO(mode) and not stat.S_ISCHR(mode):
        with open_lines(path):
            pass


def is_blank(line: bytes) -> bool:
    return not line.removeprefix(BOM).strip()


def _problem(head: bytes) -> str | None:
    """What is wrong with a file that begins so; None where its lines may be judged one by one."""
    text = head.removeprefix(BOM).lstrip()
    for magic, what, remedy in _FORMATS:
        if head.startswith(magic):
            return f"{what}: {remedy}"
    if head[257:262] == b"ustar":
        return f"is a tar archive: {_UNPACK}"
    for pattern, encoding in _ENCODINGS:
        if pattern.match(head):
            return f"is in {encoding}: save it as UTF-8"
    if text[:1] not in (b"{", b"[") and b"\0" in head:
        return "is no text, for it has NUL bytes: give JSON in UTF-8, one object a line"
    first, end, rest = text.partition(b"\n")
    if _CR_ALONE.search(first):
        return "ends its lines with CR alone: save it with LF or CRLF at their ends"
    if text.startswith(b"[") and not (end and rest.strip() and _is_json(first)):
        return "is a JSON array: write each of its objects on a line of its own (jq -c '.[]')"
    if first.strip() == b"{" and rest.lstrip().startswith(b'"'):
        return "has a JSON object on several lines: write each on a line of its own (jq -c .)"
    return None


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line)
    except JsonError:
        return False
    return True
