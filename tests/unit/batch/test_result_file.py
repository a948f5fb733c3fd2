"""The output file: rows are whole, locked, synced, and wait for room."""

from __future__ import annotations

import errno
import json
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexgen_lite.batch import result_file
from flexgen_lite.batch.file import BadLine, BatchRequest
from flexgen_lite.batch.result_file import ResultWriter
from flexgen_lite.client.completion import Completion, CompletionOutput
from flexgen_lite.client.sampling_params import SamplingParams

ANSWERS = "req_" + "0" * 16
DONE = Completion(0, "hi", [CompletionOutput("grüß", [5, 6], "stop")], 2)


def request(custom_id: str = "a") -> BatchRequest:
    return BatchRequest(custom_id, "hi", SamplingParams(), True, None)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_bytes().splitlines()]


def ids(path: Path) -> list[str]:
    return [row["custom_id"] for row in rows(path)]


def begun(path: Path, **options: Any) -> ResultWriter:
    writer = ResultWriter(path, **options)
    writer.begin("m")
    return writer


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "o"
    with begun(path) as writer:
        for name in "ab":
            writer.write(request(name), ANSWERS, DONE)
    return path


def test_a_result_row(tmp_path: Path) -> None:
    writer = begun(tmp_path / "o")
    writer.write(request(), ANSWERS, DONE)
    (row,) = rows(tmp_path / "o")  # it is there at once
    writer.close()
    body = row["response"].pop("body")
    assert isinstance(body.pop("created"), int)
    assert body.pop("id").startswith("cmpl-")
    assert row.pop("id").startswith("batch_req_")
    assert row == {"custom_id": "a", "response": {"status_code": 200, "request_id": ANSWERS}, "error": None}
    assert body == {
        "object": "text_completion",
        "model": "m",
        "choices": [{"index": 0, "text": "grüß", "finish_reason": "stop", "logprobs": None, "token_ids": [5, 6]}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4},
    }


def test_rows_of_errors(tmp_path: Path) -> None:
    writer = begun(tmp_path / "o")
    writer.write(request("\ud800"), ANSWERS, Completion(0, "hi", [], 0, "the prompt is too long"))
    bad = BadLine(None, "line 2: not JSON", "1" * 16)
    writer.write_bad_line(bad, "line_" + bad.digest)
    writer.close()
    writer.write_bad_line(bad, "after the end")
    first, second = rows(tmp_path / "o")
    assert first["custom_id"] == "\ud800"
    assert (first["response"]["status_code"], first["response"]["body"]) == (400, None)
    assert first["error"] == {"message": "the prompt is too long", "type": "BadRequestError", "code": 400}
    assert second["custom_id"] is None
    assert second["response"]["request_id"] == "line_" + "1" * 16
    assert first["id"] != second["id"]


def test_rows_are_appended_behind_the_last_whole_one(out: Path) -> None:
    whole = out.read_bytes()
    for tail in (b"", whole[:30], whole[:-1].splitlines()[0]):
        out.write_bytes(whole + tail)
        with ResultWriter(out) as writer:
            assert writer.there.num_rows == 2
            assert out.read_bytes() == whole + tail, "nothing is changed before it begins"
            writer.begin("m")
            writer.write(request("c"), ANSWERS, DONE)
        assert ids(out) == ["a", "b", "c"]
        assert out.read_bytes().startswith(whole)


def test_overwriting_starts_when_it_begins(out: Path) -> None:
    whole = out.read_bytes()
    with ResultWriter(out, overwrite=True) as writer:
        assert writer.there.num_rows == 0
    assert out.read_bytes() == whole
    out.write_bytes(b"a note")
    begun(out, overwrite=True).close()
    assert out.read_bytes() == b""
    begun(out).close()  # an empty file has no foreign row


def test_a_file_that_was_not_begun_is_not_left_behind(tmp_path: Path) -> None:
    ResultWriter(tmp_path / "o").close()
    assert list(tmp_path.iterdir()) == []


def test_only_one_writes(out: Path) -> None:
    with ResultWriter(out):
        for overwrite in (False, True):
            with pytest.raises(FileExistsError, match="is being written by another run: wait"):
                ResultWriter(out, overwrite=overwrite)
    ResultWriter(out).close()


def test_a_foreign_file_is_left_alone_and_unlocked(tmp_path: Path) -> None:
    (tmp_path / "o").write_text("a note")
    for _ in range(2):
        with pytest.raises(FileExistsError, match="line 1 is not a result row"):
            ResultWriter(tmp_path / "o")
    assert (tmp_path / "o").read_text() == "a note"


def test_special_files_are_just_written(tmp_path: Path) -> None:
    begun(Path("/dev/null")).close()
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with begun(tmp_path / "pipe") as writer:
        writer.write(request(), ANSWERS, DONE)
    assert json.loads(os.read(reader, 10_000))["custom_id"] == "a"
    os.close(reader)
    with begun(Path("/dev/full")) as writer, pytest.raises(OSError, match="No space left") as failure:
        writer.write(request(), ANSWERS, DONE)
    assert failure.value.filename == "/dev/full"


class Disk:
    """Stands before os.write: has room for so many bytes, then fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int, number: int = errno.ENOSPC) -> None:
        self.room, self._number, self._write = room, number, os.write
        monkeypatch.setattr(os, "write", self.write)

    def write(self, fd: int, data: bytes) -> int:
        if self.room == 0:
            raise OSError(self._number, os.strerror(self._number))
        count = self._write(fd, data[: self.room])
        self.room -= count
        return count


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("room", [0, 1, 200])
def test_a_full_disk_is_waited_for(out: Path, monkeypatch: pytest.MonkeyPatch, number: int, room: int) -> None:
    monkeypatch.setattr(result_file, "RETRY_SECONDS", 0.001)
    disk, before, words = Disk(monkeypatch, room, number), out.read_bytes(), list[str]()
    tries = []

    def truncate(fd: int, size: int, really: Callable[[int, int], None] = os.ftruncate) -> None:
        really(fd, size)
        assert out.read_bytes() == before, "nothing of the row is left while it waits"
        tries.append(size)
        if len(tries) == 5:
            disk.room = 1 << 20

    writer = begun(out, warn=words.append)
    monkeypatch.setattr(os, "ftruncate", truncate)
    writer.write(request("c"), ANSWERS, DONE)
    writer.write(request("d"), ANSWERS, DONE)
    writer.close()
    assert ids(out) == ["a", "b", "c", "d"]
    assert words == [
        f"{out}: {os.strerror(number)}; waiting for room, no row is lost",
        f"{out}: there is room again, going on",
    ]


def test_closing_ends_the_wait_for_room(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = threading.Event()
    writer = begun(out, warn=lambda _: waits.set())
    Disk(monkeypatch, 10)
    thread = threading.Thread(target=writer.write, args=(request("c"), ANSWERS, DONE))
    thread.start()
    assert waits.wait(10)
    writer.close()
    thread.join(10)
    assert not thread.is_alive()
    assert ids(out) == ["a", "b"]


def test_another_error_names_the_file_and_leaves_no_torn_row(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with begun(out) as writer:
        Disk(monkeypatch, 10, errno.EIO)
        with pytest.raises(OSError, match="Input/output error") as failure:
            writer.write(request("c"), ANSWERS, DONE)
    assert failure.value.filename == str(out)
    assert ids(out) == ["a", "b"]


def test_rows_go_to_the_disk_soon_without_another_row(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_file, "SYNC_SECONDS", 0.001)
    synced: queue.Queue[int] = queue.Queue()
    with begun(out) as writer:
        monkeypatch.setattr(os, "fsync", lambda fd: synced.put(os.fstat(fd).st_size))
        for name in "cd":
            writer.write(request(name), ANSWERS, DONE)
            assert synced.get(timeout=10) == out.stat().st_size
    assert synced.empty(), "there was nothing new"


def test_closing_puts_the_last_rows_on_the_disk(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_file, "SYNC_SECONDS", 1000.0)
    synced: list[int] = []
    with begun(out) as writer:
        monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
        writer.write(request("c"), ANSWERS, DONE)
        assert synced == []
    assert synced == [out.stat().st_size]


def test_a_disk_that_loses_rows_ends_the_run(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_file, "SYNC_SECONDS", 0.001)
    failed = threading.Event()
    writer = begun(out)

    def fsync(_: int) -> None:
        failed.set()
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    writer.write(request("c"), ANSWERS, DONE)
    assert failed.wait(10)
    with pytest.raises(OSError, match="Input/output error") as failure:
        writer.close()
    assert failure.value.filename == str(out)
