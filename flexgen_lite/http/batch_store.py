"""Batch jobs over HTTP: /v1/batches. Each runs as `run-batch` does, from a file of the store into another."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from flexgen_lite.batch.lines import BatchFileError
from flexgen_lite.batch.result_file import ResultWriter
from flexgen_lite.batch.run import BatchRun, Progress
from flexgen_lite.client.client import Client
from flexgen_lite.errors import EngineError
from flexgen_lite.http.errors import ApiError
from flexgen_lite.http.file_store import FileStore, new_id, write_json
from flexgen_lite.openai.request_body import URLS
from flexgen_lite.text.shown import shown, shown_json, shown_names, shown_text

AT_ONCE = 2  # batches that run beside each other; the others wait
PRIORITY = 1  # behind requests that somebody waits for
PROGRESS_SECONDS = 1.0
CLOSE_SECONDS = 5.0
RETRY_SECONDS = 3.0  # while the disk is full
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
        model_name: what rows call the model; None: as the engine does.
    """

    def __init__(
        self, folder: Path, files: FileStore, connect: Callable[[], Client], model_name: str | None = None
    ) -> None:
        self._folder, self._files, self._connect, self._model_name = folder, files, connect, model_name
        self._lock = threading.Condition()
        self._queue: list[str] = []  # ids of those that wait for a place
        self._num_running = 0
        self._batches: dict[str, Batch] = {}
        self._runs: dict[str, BatchRun] = {}
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        for batch in sorted(map(_read, folder.glob("batch-*.json")), key=lambda one: (one.created_at, one.id)):
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
            raise ApiError(400, f"{shown_names(unknown)}: not supported", shown_text(unknown[0]))
        endpoint, metadata = body.get("endpoint"), body.get("metadata")
        if endpoint not in URLS:
            raise ApiError(400, f"endpoint is {shown_json(endpoint)}: supported are {', '.join(URLS)}", "endpoint")
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
                raise ApiError(404, f"there is no batch {shown(batch_id)}", "batch_id")
            return self._batches[batch_id]

    def list(self) -> list[Batch]:
        """The newest first."""
        with self._lock:
            return sorted(self._batches.values(), key=lambda batch: (batch.created_at, batch.id), reverse=True)

    def cancel(self, batch_id: str) -> Batch:
        """What is done stays. Raises as `get` does."""
        with self._lock:
            self.get(batch_id)
            batch = self._change(batch_id, status="cancelling", cancelling_at=int(time.time()))
            run = self._runs.get(batch_id)
            self._lock.notify_all()
        if run is not None:
            run.cancel()
        return batch

    def close(self) -> None:
        """The server ends: open batches stop, and go on with the next one."""
        self._closing.set()
        with self._lock:
            runs = list(self._runs.values())
            self._lock.notify_all()
        for run in runs:
            run.cancel()
        for thread in self._threads:
            thread.join(CLOSE_SECONDS)

    # ------------------------------------------------------------------------------------------------ running

    def _start(self, batch: Batch) -> None:
        self._queue.append(batch.id)
        thread = threading.Thread(target=self._run, args=(batch.id,), name=f"flexgen-lite {batch.id}", daemon=True)
        self._threads = [*(one for one in self._threads if one.is_alive()), thread]
        thread.start()

    def _run(self, batch_id: str) -> None:
        out = self._folder / f"{batch_id}.jsonl"
        failure: Exception | None = None
        try:
            if self._take_place(batch_id):
                try:
                    self._compute(batch_id, out)
                finally:
                    self._leave_place()
        except EngineError:
            return  # it is gone for good, and the server ends with it; the next one goes on with the batch
        except FileExistsError:
            failure = ValueError("the rows that are there answer other requests, or another model's: upload it again")
        except Exception as error:
            failure = error
        while not self._closing.is_set():
            try:
                self._hand_over(batch_id, out, failure)
                return
            except OSError as error:  # a full disk, most likely: rows are there, the batch is not lost
                self._change(batch_id, keep=False, errors=_errors(error))
                self._closing.wait(RETRY_SECONDS)

    def _take_place(self, batch_id: str) -> bool:
        """Waits for its turn; False where it is cancelled before, or the server ends."""
        with self._lock:
            self._lock.wait_for(lambda: self._may_begin(batch_id) or self._is_given_up(batch_id))
            self._queue.remove(batch_id)
            given_up = self._is_given_up(batch_id)
            self._num_running += not given_up
            self._lock.notify_all()
            return not given_up

    def _leave_place(self) -> None:
        with self._lock:
            self._num_running -= 1
            self._lock.notify_all()

    def _may_begin(self, batch_id: str) -> bool:
        return self._num_running < AT_ONCE and self._queue[0] == batch_id

    def _is_given_up(self, batch_id: str) -> bool:
        return self._closing.is_set() or self._batches[batch_id].status == "cancelling"

    def _compute(self, batch_id: str, out: Path) -> None:
        with contextlib.suppress(OSError):  # the disk is full: the rows will wait for room
            self._change(batch_id, status="in_progress", in_progress_at=int(time.time()))
        batch = self.get(batch_id)
        source = self._files.path(batch.input_file_id)
        with self._connect() as client, ResultWriter(out) as results:
            run = BatchRun(
                client,
                source,
                results,
                priority=PRIORITY,
                own_templates=False,
                url=batch.endpoint,
                model_name=self._model_name,
            )
            with self._lock:
                self._runs[batch_id] = run
                given_up = self._is_given_up(batch_id)
            if given_up:
                run.cancel()
            try:
                run.run(lambda progress: self._tell(batch_id, progress), PROGRESS_SECONDS)
            finally:
                with self._lock:
                    del self._runs[batch_id]

    def _tell(self, batch_id: str, progress: Progress) -> None:
        counts = {"total": progress.total or progress.done, "failed": progress.failed}
        self._change(batch_id, keep=False, request_counts=counts | {"completed": progress.done - progress.failed})

    def _hand_over(self, batch_id: str, out: Path, failure: Exception | None) -> None:
        """The batch is over. Rows with an answer go into one file, those with an error into another, as the API has
        it; doing so again after an interruption makes the same files."""
        good, bad = out.with_suffix(".good"), out.with_suffix(".bad")
        with good.open("wb") as answers, bad.open("wb") as errors:
            if out.exists():
                with out.open("rb") as rows:
                    for row in rows:
                        if row.endswith(b"\n"):  # else it was cut short by a crash
                            (answers if _is_good(row) else errors).write(row)
        changes: dict[str, Any] = {}
        for name, path in (("output", good), ("error", bad)):
            if path.stat().st_size:
                stored = self._files.adopt(path, f"{batch_id}_{name}.jsonl", "batch_output")
                changes[f"{name}_file_id"] = stored.id
            else:
                path.unlink()
        with self._lock:
            over = "cancelled" if self._batches[batch_id].status == "cancelling" else "completed"
            if failure is not None:
                over, changes["errors"] = "failed", _errors(failure)
            changes |= {"status": over, f"{over}_at": int(time.time())}
            self._change(batch_id, True, **changes)
        out.unlink(missing_ok=True)

    def _change(self, batch_id: str, keep: bool = True, **changes: Any) -> Batch:
        """Nothing changes of a batch that is over; one that is being cancelled does not begin again.

        Args:
            keep: on the disk, too.
        """
        with self._lock:
            before = self._batches[batch_id]
            if before.status not in OPEN:
                return before
            if before.status == "cancelling" and changes.get("status") in OPEN:
                return before
            return self._put(replace(before, **changes), keep)

    def _put(self, batch: Batch, keep: bool = True) -> Batch:
        """While the lock is held: no change may be lost between reading and writing."""
        if keep:
            write_json(self._folder / f"{batch.id}.json", asdict(batch))
        self._batches[batch.id] = batch
        return batch


def _is_good(row: bytes) -> bool:
    try:
        return json.loads(row)["error"] is None
    except (ValueError, KeyError, TypeError):
        return False


def _errors(error: Exception) -> dict[str, Any]:
    text = (error.strerror or "the disk failed") if isinstance(error, OSError) else str(error)
    if isinstance(error, BatchFileError):  # its path is the server's own affair
        text = f"the input file {error.problem}"
    return {"object": "list", "data": [{"message": text or type(error).__name__, "code": "failed"}]}


def _read(path: Path) -> Batch:
    try:
        return Batch(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no batch of this server: move it away ({error})") from None


def _is_text(value: object) -> bool:
    return isinstance(value, str)
