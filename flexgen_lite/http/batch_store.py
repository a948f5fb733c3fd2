"""Batch jobs over HTTP: /v1/batches. Each runs as `run-batch` does, from a file of the store into another."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from flexgen_lite.batch_run import BatchRun, Progress
from flexgen_lite.client import Client
from flexgen_lite.errors import EngineError
from flexgen_lite.http.errors import ApiError
from flexgen_lite.http.file_store import FileStore, new_id, write_json
from flexgen_lite.request_body import URLS
from flexgen_lite.result_file import ResultWriter

AT_ONCE = 2  # batches that run beside each other; the others wait
PRIORITY = 1  # behind requests that somebody waits for
PROGRESS_SECONDS = 1.0
CLOSE_SECONDS = 5.0
OPEN = ("validating", "in_progress", "cancelling")
_ID = re.compile(r"batch-[0-9a-f]{24}")


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch, as the API describes it."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    status: str = "validating"
    metadata: dict[str, str] | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    errors: dict[str, Any] | None = None
    request_counts: dict[str, int] = field(default_factory=lambda: {"total": 0, "completed": 0, "failed": 0})

    def to_json(self) -> dict[str, Any]:
        return {"object": "batch", **asdict(self), "expires_at": None, "finalizing_at": None, "expired_at": None}


class BatchStore:
    """Batches in a folder. Those that a server before this one has left open go on where they stopped.

    Args:
        folder: is made if it is not there.
        files: where their input is, and their output goes.
        connect: a new client of the engine: each batch has its own, so that they share the engine fairly.
    """

    def __init__(self, folder: Path, files: FileStore, connect: Callable[[], Client]) -> None:
        self._folder, self._files, self._connect = folder, files, connect
        self._lock = threading.Lock()
        self._places = threading.Semaphore(AT_ONCE)
        self._batches: dict[str, Batch] = {}
        self._runs: dict[str, BatchRun] = {}
        self._threads: list[threading.Thread] = []
        self._closing = False
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("batch-*.json")):
            batch = _read(path)
            self._batches[batch.id] = batch
            if batch.status in OPEN:
                self._start(batch)

    def create(self, body: dict[str, Any]) -> Batch:
        """
        Raises:
            ApiError: it cannot be.
        """
        unknown = sorted(body.keys() - {"input_file_id", "endpoint", "completion_window", "metadata"})
        if unknown:
            raise ApiError(400, f"{', '.join(unknown)}: not supported", unknown[0])
        endpoint, metadata = body.get("endpoint"), body.get("metadata")
        if endpoint not in URLS:
            raise ApiError(400, f"endpoint is {endpoint!r}: supported are {', '.join(URLS)}", "endpoint")
        if not isinstance(body.get("completion_window", ""), str):
            raise ApiError(400, "completion_window is not a string", "completion_window")
        if metadata is not None and not (isinstance(metadata, dict) and all(map(_is_text, metadata.values()))):
            raise ApiError(400, "metadata is not an object of strings", "metadata")
        file_id = body.get("input_file_id")
        if not isinstance(file_id, str):
            raise ApiError(400, "input_file_id is missing", "input_file_id")
        self._files.get(file_id)
        window = body.get("completion_window", "24h")
        batch = Batch(new_id("batch"), endpoint, file_id, window, int(time.time()), metadata=metadata)
        with self._lock:
            self._put(batch)
        self._start(batch)
        return batch

    def get(self, batch_id: str) -> Batch:
        """
        Raises:
            ApiError: there is no such batch.
        """
        with self._lock:
            if batch_id not in self._batches:
                raise ApiError(404, f"there is no batch {batch_id[:80]!r}", "batch_id")
            return self._batches[batch_id]

    def list(self) -> list[Batch]:
        """The newest first."""
        with self._lock:
            return sorted(self._batches.values(), key=lambda batch: (batch.created_at, batch.id), reverse=True)

    def cancel(self, batch_id: str) -> Batch:
        """What is done stays. Raises as `get` does."""
        batch = self.get(batch_id)
        if batch.status in OPEN:
            batch = self._change(batch_id, status="cancelling", cancelling_at=int(time.time()))
            with self._lock:
                run = self._runs.get(batch_id)
            if run is not None:
                run.cancel()
        return batch

    def close(self) -> None:
        """The server ends: open batches stop, and go on with the next one."""
        self._closing = True
        with self._lock:
            runs = list(self._runs.values())
        for run in runs:
            run.cancel()
        for thread in self._threads:
            thread.join(CLOSE_SECONDS)

    # ------------------------------------------------------------------------------------------------ running

    def _start(self, batch: Batch) -> None:
        thread = threading.Thread(target=self._run, args=(batch.id,), name=f"flexgen-lite {batch.id}", daemon=True)
        self._threads = [*(one for one in self._threads if one.is_alive()), thread]
        thread.start()

    def _run(self, batch_id: str) -> None:
        out = self._folder / f"{batch_id}.jsonl"
        try:
            with self._places:  # the others wait, also when the server ends
                if self._closing:
                    return
                if self.get(batch_id).status != "cancelling":
                    self._change(batch_id, status="in_progress", in_progress_at=int(time.time()))
                    self._compute(batch_id, out)
                if not self._closing:
                    self._hand_over(batch_id, out)
        except EngineError:
            return  # the server ends with its engine; the next one goes on with the batch
        except (OSError, ValueError, ApiError) as error:
            if not self._closing:
                errors = {"object": "list", "data": [{"message": str(error), "code": "failed"}]}
                self._change(batch_id, status="failed", failed_at=int(time.time()), errors=errors)

    def _compute(self, batch_id: str, out: Path) -> None:
        source = self._files.path(self.get(batch_id).input_file_id)
        with self._connect() as client, ResultWriter(out) as results:
            run = BatchRun(client, source, results, priority=PRIORITY, own_templates=False)
            with self._lock:
                self._runs[batch_id] = run
            if self.get(batch_id).status == "cancelling":
                run.cancel()
            try:
                run.run(lambda progress: self._tell(batch_id, progress), PROGRESS_SECONDS)
            finally:
                with self._lock:
                    del self._runs[batch_id]

    def _tell(self, batch_id: str, progress: Progress) -> None:
        counts = {"total": progress.total or progress.done, "failed": progress.failed}
        self._change(batch_id, request_counts=counts | {"completed": progress.done - progress.failed})

    def _hand_over(self, batch_id: str, out: Path) -> None:
        """Rows with an answer go into one file, those with an error into another, as the API has it."""
        good, bad = out.with_suffix(".good"), out.with_suffix(".bad")
        with good.open("wb") as answers, bad.open("wb") as errors:
            if out.exists():
                with out.open("rb") as rows:
                    for row in rows:
                        (answers if json.loads(row)["error"] is None else errors).write(row)
        ids = {}
        for name, path in (("output", good), ("error", bad)):
            if path.stat().st_size:
                stored = self._files.adopt(path, f"{batch_id}_{name}.jsonl", "batch_output")
                ids[f"{name}_file_id"] = stored.id
            else:
                path.unlink()
        over = "cancelled" if self.get(batch_id).status == "cancelling" else "completed"
        self._change(batch_id, status=over, **{f"{over}_at": int(time.time())}, **ids)
        out.unlink(missing_ok=True)

    def _change(self, batch_id: str, **changes: Any) -> Batch:
        with self._lock:
            before = self._batches[batch_id]
            if before.status == "cancelling" and changes.get("status") == "in_progress":
                changes.pop("status")
            return self._put(replace(before, **changes))

    def _put(self, batch: Batch) -> Batch:
        """While the lock is held: no change may be lost between reading and writing."""
        self._batches[batch.id] = batch
        write_json(self._folder / f"{batch.id}.json", asdict(batch))
        return batch


def _read(path: Path) -> Batch:
    try:
        return Batch(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no batch of this server: move it away ({error})") from None


def _is_text(value: object) -> bool:
    return isinstance(value, str)
