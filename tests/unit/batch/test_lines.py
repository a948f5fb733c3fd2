"""Files that cannot be batch files: one sentence, before anything is started."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import sqlite3
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from flexgen_lite.batch.file import BatchRequest, count_lines, read_requests
from flexgen_lite.batch.lines import BatchFileError, check_lines, open_lines
from flexgen_lite.batch.run import check_files
from flexgen_lite.batch.survey import survey

ROWS = [
    {"custom_id": f"id-{n}", "method": "POST", "url": "/v1/completions", "body": {"prompt": f"é \u2028 {n}"}}
    for n in range(3)
]
TEXT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
UTF8 = TEXT.encode()


def packed(pack: Callable[[io.BytesIO], None]) -> bytes:
    buffer = io.BytesIO()
    pack(buffer)
    return buffer.getvalue()


def zipped(buffer: io.BytesIO) -> None:
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("in.jsonl", UTF8)


def tarred(buffer: io.BytesIO) -> None:
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("in.jsonl")
        info.size = len(UTF8)
        archive.addfile(info, io.BytesIO(UTF8))


def database() -> bytes:
    with sqlite3.connect(":memory:") as connection:
        connection.execute("create table a (b)")
        return connection.serialize()


NO_BATCH_FILES = {
    "UTF-16": (TEXT.encode("utf-16"), "is in UTF-16: save it as UTF-8"),
    "UTF-16-LE": (TEXT.encode("utf-16-le"), "is in UTF-16"),
    "UTF-16-BE": (TEXT.encode("utf-16-be"), "is in UTF-16"),
    "UTF-16-BE with a mark": (b"\xfe\xff" + TEXT.encode("utf-16-be"), "is in UTF-16"),
    "UTF-16 after a blank line": (("\n" + TEXT).encode("utf-16-le"), "is in UTF-16"),
    "UTF-32": (TEXT.encode("utf-32"), "is in UTF-32: save it as UTF-8"),
    "UTF-32-LE": (TEXT.encode("utf-32-le"), "is in UTF-32"),
    "UTF-32-BE": (TEXT.encode("utf-32-be"), "is in UTF-32"),
    "UTF-32-BE with a mark": (b"\0\0\xfe\xff" + TEXT.encode("utf-32-be"), "is in UTF-32"),
    "gzip": (gzip.compress(UTF8, mtime=0), "is compressed with gzip: unpack it first"),
    "bzip2": (bz2.compress(UTF8), "is compressed with bzip2"),
    "xz": (lzma.compress(UTF8), "is compressed with xz"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x00", "is compressed with zstd"),
    "zip": (packed(zipped), "is a ZIP archive: unpack it first"),
    "tar": (packed(tarred), "is a tar archive"),
    "Parquet": (b"PAR1\x15\x04", "is a Parquet file: export it as JSON, one object a line"),
    "Arrow": (b"ARROW1\0\0", "is an Arrow file"),
    "SQLite": (database(), "is a SQLite database"),
    "PDF": (b"%PDF-1.7\n", "is a PDF file"),
    "zeros": (b"\0" * 5000, "is no text, for it has NUL bytes"),
    "binary": (os.urandom(3) + b"\x01\0\x02" * 1000, "NUL bytes"),
    "CR alone": (TEXT.replace("\n", "\r").encode(), "ends its lines with CR alone: save it with LF or CRLF"),
    "CR twice": (TEXT.replace("\n", "\r\r").encode(), "ends its lines with CR alone"),
    "an array": (json.dumps(ROWS).encode(), "is a JSON array: write each of its objects on a line of its own"),
    "an array over lines": (json.dumps(ROWS, indent=2).encode(), "is a JSON array"),
    "an array with a mark": (b"\xef\xbb\xbf\n " + json.dumps(ROWS).encode() + b"\n", "is a JSON array"),
    "a long array": (json.dumps(ROWS * 1000).encode(), "is a JSON array"),
    "an object over lines": (json.dumps(ROWS[0], indent=2).encode(), "has a JSON object on several lines"),
}


@pytest.mark.parametrize("name", NO_BATCH_FILES)
def test_one_sentence_about_the_whole_file(name: str, tmp_path: Path) -> None:
    data, words = NO_BATCH_FILES[name]
    path = tmp_path / "in.jsonl"
    path.write_bytes(data)
    for look in (check_lines, count_lines, survey, lambda path: check_files(path, tmp_path / "out")):
        with pytest.raises(BatchFileError) as caught:
            look(path)
        assert str(caught.value).startswith(f"{path} ") and words in str(caught.value)
        assert caught.value.problem in str(caught.value) and str(path) not in caught.value.problem


@pytest.mark.parametrize(
    "data",
    [
        UTF8,
        b"\xef\xbb\xbf" + UTF8,
        b"".join(b"\xef\xbb\xbf" + line for line in UTF8.splitlines(keepends=True)),  # files with marks, put together
        TEXT.replace("\n", "\r\n").encode(),
        b"\n \r\n\xef\xbb\xbf\n" + UTF8,
        UTF8.rstrip(),
        UTF8.rstrip() + b"\r",
    ],
)
def test_files_that_are_good(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(data)
    check_lines(path)
    with open_lines(path) as lines:
        found = list(read_requests(lines))
    assert [item.prompt for item in found if isinstance(item, BatchRequest)] == [row["body"]["prompt"] for row in ROWS]
    assert len(found) == count_lines(path) == 3


@pytest.mark.parametrize(
    "first", [b"[1]", b"[", b"{", b"nonsense", b"\xe9t\xe9", b'{"a": "b\0"}', b"null", b'{"a": 1}{"b": 2}']
)
def test_a_bad_first_line_is_a_bad_line(first: bytes, tmp_path: Path) -> None:
    """And the job goes on; but for a bracket alone, which begins an array."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(first + b"\n" + UTF8)
    if first == b"[":
        with pytest.raises(BatchFileError, match="is a JSON array"):
            check_lines(path)
        return
    with open_lines(path) as lines:
        assert sum(isinstance(item, BatchRequest) for item in read_requests(lines)) == 3


def test_an_empty_file_has_no_lines(tmp_path: Path) -> None:
    for data in (b"", b"\n", b"\xef\xbb\xbf"):
        (tmp_path / "in").write_bytes(data)
        assert count_lines(tmp_path / "in") == 0


@pytest.mark.parametrize(("data", "words"), [(UTF8, None), (TEXT.encode("utf-16"), "is in UTF-16")])
def test_a_pipe_is_read_once(data: bytes, words: str | None, tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    check_files(path, tmp_path / "out")  # does not wait, and takes nothing
    writer = threading.Thread(target=path.write_bytes, args=(data,), daemon=True)
    writer.start()
    refused = contextlib.nullcontext() if words is None else pytest.raises(BatchFileError, match=words)
    with refused, open_lines(path) as lines:
        assert len(list(read_requests(lines))) == 3
    writer.join(10)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        check_lines(tmp_path)
    with pytest.raises(FileNotFoundError):
        check_lines(tmp_path / "none")
