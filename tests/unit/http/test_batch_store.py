"""Batches on the server's disk: what happens to them when things change at once, or end."""

from __future__ import annotations

import errno
import gzip
import io
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flexgen_lite.client.client import Client
from flexgen_lite.errors import EngineError
from flexgen_lite.http.batch_store import BatchStore
from flexgen_lite.http.file_store import FileStore
from tests.fake_engine import FakeEngine


class Engine:
    """Stands for one that is asked for clients; they wait until it ends."""

    def __init__(self) -> None:
        self.asked, self.ended = threading.Event(), threading.Event()

    def connect(self) -> Any:
        self.asked.set()
        self.ended.wait(20)
        raise EngineError("the engine is gone")


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.ended.set()


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "files")


def create(store: BatchStore, files: FileStore) -> str:
    source = files.add(io.BytesIO(b""), "in.jsonl", "batch")
    return store.create({"input_file_id": source.id, "endpoint": "/v1/completions"}).id


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}\n".encode("utf-16"), "the input file is in UTF-16: save it as UTF-8"),
        (gzip.compress(b"{}\n", mtime=0), "the input file is compressed with gzip: unpack it first"),
        (b"[{}]", "the input file is a JSON array: write each of its objects on a line of its own (jq -c '.[]')"),
    ],
)
def test_an_input_that_is_no_batch_file_fails_as_a_whole(
    content: bytes, words: str, tmp_path: Path, files: FileStore
) -> None:
    with FakeEngine(tmp_path / "e") as engine:
        store = BatchStore(tmp_path / "batches", files, lambda: Client(engine.endpoint))
        source = files.add(io.BytesIO(content), "in.jsonl", "batch")
        batch_id = store.create({"input_file_id": source.id, "endpoint": "/v1/completions"}).id
        wait_until(lambda: store.get(batch_id).status not in ("validating", "in_progress"))
        batch = store.get(batch_id)
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert batch.errors is not None and [error["message"] for error in batch.errors["data"]] == [words]


def test_no_change_is_lost_among_others(tmp_path: Path, files: FileStore, engine: Engine) -> None:
    """A cancellation beside reports of progress, for example."""
    store = BatchStore(tmp_path / "batches", files, engine.connect)
    batch_id = create(store, files)
    assert engine.asked.wait(10)
    stop, interval = threading.Event(), sys.getswitchinterval()

    def tell() -> None:
        while not stop.is_set():
            store._change(batch_id, request_counts={"total": 1, "completed": 1, "failed": 0})

    telling = [threading.Thread(target=tell) for _ in range(3)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in telling:
            thread.start()
        for number in range(50):
            store._change(batch_id, metadata={"number": str(number)})
            for _ in range(5):
                assert store.get(batch_id).metadata == {"number": str(number)}
        store.cancel(batch_id)
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        for thread in telling:
            thread.join()
    kept = json.loads((tmp_path / "batches" / f"{batch_id}.json").read_text(encoding="utf-8"))
    assert kept["status"] == store.get(batch_id).status == "cancelling"


def test_a_batch_whose_engine_ends_is_left_open_for_the_next_server(
    tmp_path: Path, files: FileStore, engine: Engine
) -> None:
    store = BatchStore(tmp_path / "batches", files, engine.connect)
    batch_id = create(store, files)
    engine.ended.set()
    for thread in store._threads:
        thread.join(10)
    assert store.get(batch_id).status == "in_progress"
    other = Engine()
    BatchStore(tmp_path / "batches", files, other.connect)
    assert other.asked.wait(10), "the next one takes it up"
    other.ended.set()


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_batch_that_waits_is_cancelled_at_once(tmp_path: Path, files: FileStore, engine: Engine) -> None:
    store = BatchStore(tmp_path / "batches", files, engine.connect)
    ids = [create(store, files) for _ in range(4)]
    wait_until(lambda: store.get(ids[1]).status == "in_progress")
    assert [store.get(one).status for one in ids[2:]] == ["validating"] * 2
    store.cancel(ids[2])
    wait_until(lambda: store.get(ids[2]).status == "cancelled")
    assert store.get(ids[3]).status == "validating"
    assert store.cancel(ids[2]).status == "cancelled", "what is over stays as it is"


ROWS = b'{"custom_id": "a", "error": null}\n{"custom_id": "b", "error": {}}\n{"custom_id": "c", "err'


@pytest.fixture
def computes(monkeypatch: pytest.MonkeyPatch) -> list[Exception | None]:
    """Batches write ROWS instead of asking an engine, and fail with what is in the list."""
    failures: list[Exception | None] = []

    def compute(store: BatchStore, batch_id: str, out: Path) -> None:
        out.write_bytes(ROWS)
        if failures and (failure := failures.pop(0)) is not None:
            raise failure

    monkeypatch.setattr(BatchStore, "_compute", compute)
    return failures


def test_rows_are_handed_over_once(
    tmp_path: Path, files: FileStore, engine: Engine, computes: list[Exception | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever interrupts it, and without the row that a crash has cut short."""
    store = BatchStore(tmp_path / "batches", files, engine.connect)
    change, interruptions = store._change, [OSError(errno.ENOSPC, "No space left on device")] * 2

    def fail_at_first(batch_id: str, keep: bool = True, **changes: Any) -> Any:
        if changes.get("status") == "completed" and interruptions:
            raise interruptions.pop()
        return change(batch_id, keep, **changes)

    monkeypatch.setattr(store, "_change", fail_at_first)
    monkeypatch.setattr("flexgen_lite.http.batch_store.RETRY_SECONDS", 0.05)
    batch_id = create(store, files)
    wait_until(lambda: store.get(batch_id).status == "completed")
    batch = store.get(batch_id)
    written = {file.id for file in files.list() if file.purpose == "batch_output"}
    assert written == {batch.output_file_id, batch.error_file_id}
    assert files.path(batch.output_file_id or "").read_bytes() == b'{"custom_id": "a", "error": null}\n'
    assert files.path(batch.error_file_id or "").read_bytes() == b'{"custom_id": "b", "error": {}}\n'


def test_what_was_done_before_a_failure_is_handed_over(
    tmp_path: Path, files: FileStore, engine: Engine, computes: list[Exception | None]
) -> None:
    computes += [RuntimeError("nobody foresaw this"), FileExistsError("/a/path")]
    store = BatchStore(tmp_path / "batches", files, engine.connect)
    for words in ("nobody foresaw", "answer other requests"):
        batch_id = create(store, files)
        wait_until(lambda batch_id=batch_id: store.get(batch_id).status == "failed")  # type: ignore[misc]
        batch = store.get(batch_id)
        assert batch.errors is not None and words in batch.errors["data"][0]["message"]
        assert batch.output_file_id is not None


def test_files_whose_description_is_gone_are_not_listed(tmp_path: Path, files: FileStore) -> None:
    kept = files.add(io.BytesIO(b"x"), "kept", "batch")
    (tmp_path / "files" / "file-000000000000000000000000.json").write_text("{", encoding="utf-8")
    assert [file.id for file in files.list()] == [kept.id]


def test_a_record_that_is_none_says_which(tmp_path: Path, files: FileStore, engine: Engine) -> None:
    (tmp_path / "batches").mkdir()
    for content in ("{", "[]", '{"x": 1}'):
        (tmp_path / "batches" / "batch-1.json").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=r"batch-1\.json is no batch of this server"):
            BatchStore(tmp_path / "batches", files, engine.connect)
