"""Batches on the server's disk: what happens to them when things change at once, or end."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flexgen_lite.errors import EngineError
from flexgen_lite.http.batch_store import BatchStore
from flexgen_lite.http.file_store import FileStore


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
        for number in range(200):
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


def test_a_record_that_is_none_says_which(tmp_path: Path, files: FileStore, engine: Engine) -> None:
    (tmp_path / "batches").mkdir()
    for content in ("{", "[]", '{"x": 1}'):
        (tmp_path / "batches" / "batch-1.json").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=r"batch-1\.json is no batch of this server"):
            BatchStore(tmp_path / "batches", files, engine.connect)
