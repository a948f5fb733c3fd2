"""A batch file through an engine: requests from one file, results into another."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexgen_lite.batch.file import BadLine, BatchRequest, count_lines, read_requests
from flexgen_lite.batch.lines import check_lines, open_lines
from flexgen_lite.batch.result_file import ResultWriter
from flexgen_lite.batch.result_row import request_id_of
from flexgen_lite.batch.shard import WHOLE, Shard
from flexgen_lite.chat.template import Chat, ChatError, brings_program
from flexgen_lite.client.client import Client
from flexgen_lite.client.completion import Completion
from flexgen_lite.client.job import Job
from flexgen_lite.client.request import Request
from flexgen_lite.errors import EngineError, NoStatus
from flexgen_lite.openai.request_body import CHAT, COMPLETIONS, BodyError
from flexgen_lite.text.shown import shown, shown_path
from flexgen_lite.text.sizes import format_size
from flexgen_lite.wire.client_messages import Status

LEAST_STATUS_SECONDS = 2.0  # that the engine is given to tell how far it is, between two looks at whether all is done
LAST_STATUS_SECONDS = 10.0  # the same once all is done


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a batch is: requests and bad lines of all runs into the output, tokens of this one.

    `rate` is generated tokens per second in which passes were running.
    """

    done: int
    failed: int
    earlier: int  # of those that are done, by earlier runs
    total: int | None
    prompt_tokens: int
    generated_tokens: int
    busy_seconds: float
    lanes: dict[str, float]  # busy share since the start
    restarts: int  # of workers
    engine_restarts: int
    overhead: float | None  # share of the passes in which no lane was busy, or only copied to another
    peak_bytes: int
    budget_bytes: int
    status: Status  # of the engine, now

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        values = asdict(self)
        del values["status"]
        return values | {"tokens_per_second": self.rate}

    @property
    def rate(self) -> float:
        return self.generated_tokens / self.busy_seconds if self.busy_seconds > 0 else 0.0

    @property
    def lanes_text(self) -> str:
        """Busy shares of the lanes that have anything to do."""
        return ", ".join(f"{lane} {share:.0%}" for lane, share in self.lanes.items() if share >= 0.005)

    def __str__(self) -> str:
        total = "" if self.total is None else f" of {self.total}"
        return (
            f"{self.done}{total} requests ({self.failed} failed), {self.generated_tokens} generated tokens, "
            f"{self.rate:.1f} tok/s; {self.lanes_text}"
        )

    def summary(self) -> str:
        """The last line of a run."""
        earlier = f", {self.earlier} by earlier runs" if self.earlier else ""
        text = (
            f"done: {self.done} requests ({self.failed} failed{earlier}), {self.prompt_tokens} prompt tokens, "
            f"{self.generated_tokens} generated tokens in {self.busy_seconds:.1f} s, {self.rate:.1f} tok/s"
        )
        if self.lanes:
            busiest = max(self.lanes, key=lambda lane: self.lanes[lane])
            text += f"; busiest lane {busiest} {self.lanes[busiest]:.0%}"
        if self.overhead is not None:
            text += f"; between processes {self.overhead:.1%}"
        if self.restarts:
            text += f"; workers started again: {self.restarts}"
        if self.engine_restarts:
            text += f"; engine started again: {self.engine_restarts}"
        if self.budget_bytes:
            text += f"; peak memory {format_size(self.peak_bytes)} of {format_size(self.budget_bytes)}"
            if self.peak_bytes > self.budget_bytes:
                text += ", beyond the budget"
        for name, sizes in self.status.processes.items():
            if sizes["peak"] > sizes["planned"] > 0:
                text += f"; {name} took {format_size(sizes['peak'])} where {format_size(sizes['planned'])} were planned"
        return text


def check_files(input_file: Path, output_file: Path, trace: Path | None = None) -> None:
    """Refuse what would fail after the engine has been started, or destroy a file.

    Raises:
        BatchFileError: the input is no batch file.
        OSError: the input cannot be read, the output is the input or in no directory, or the trace is one of them.
    """
    if trace is not None:
        for path, what in ((input_file, "input"), (output_file, "output")):
            if path.resolve() == trace.resolve() or (path.exists() and trace.exists() and path.samefile(trace)):
                raise FileExistsError(f"{trace} is the {what} file: give another file for the trace")
    check_lines(input_file)
    if output_file.exists():
        if output_file.samefile(input_file):
            raise FileExistsError(f"{output_file} is the input file: give another output file")
    elif not output_file.parent.is_dir():
        raise FileNotFoundError(f"{output_file.parent} is not a directory: make it first")


class BatchRun:
    """One run. The calling thread shows progress; another takes results and writes them, so that an interrupt in
    the former never cuts a row. Lines whose row is there already are passed over.

    Args:
        client: of the engine.
        input_file: one request a line.
        results: one result a line, in the order in which they finish. Closed when the run ends.
        warn: is given what a user should know, on another thread.
        priority: of its requests, see Client.submit.
        own_templates: take chat templates from lines: they are programs.
        url: the only one that lines may ask for; None: any.
        model_name: what rows call the model; None: as the engine does.
        shard: the lines that are its business.

    Attributes:
        num_earlier: lines that earlier runs have given a row.
        num_new: the others; None where there is no row yet, or looking beforehand takes long or would use the input
            up. Then `num_earlier` grows while the run goes on.

    Raises:
        FileExistsError: a row that is there answers another request than the input has. `run` raises it where nobody
            looked beforehand.
    """

    def __init__(
        self,
        client: Client,
        input_file: Path,
        results: ResultWriter,
        *,
        warn: Callable[[str], None] = lambda _: None,
        priority: int = 0,
        own_templates: bool = True,
        url: str | None = None,
        model_name: str | None = None,
        shard: Shard = WHOLE,
    ) -> None:
        self._priority = priority
        self._url = url
        self._own_templates = own_templates
        self._cancelled = False
        self._job: Job | None = None
        self._client = client
        self._input_file = input_file
        self._shard = shard
        self._total = count_lines(input_file, shard)
        self._model = model_name or client.welcome.model
        self._warn = warn
        if self._total == 0:
            part = "" if shard == WHOLE else f" of shard {shard}"
            warn(f"{shown_path(input_file)} has no requests{part}: give one JSON object a line")
        self._results = results
        self._open: dict[int, tuple[BatchRequest, str]] = {}
        self._num_bad = self._num_earlier_failed = 0
        self._warned = False
        self._failure: Exception | None = None
        self._finished = threading.Event()
        self._first = self._last = _first_status(client)
        self.num_earlier = 0
        self.num_new: int | None = None
        if results.there.num_rows and self._total is not None:
            self.num_new = sum(1 for _ in self._new_items(count=True))
        results.begin(self._model)

    def run(self, show: Callable[[Progress], None], interval: float) -> Progress:
        """Run to the end, calling `show` every `interval` seconds.

        Raises:
            EngineError: the engine failed. Rows of finished requests are in the output.
            OSError: a file could not be read or written.
        """
        job = self._job = self._client.submit_requests(self._requests(), priority=self._priority)
        if self._cancelled:
            job.cancel(wait=False)
        writing = threading.Thread(target=self._write_results, args=(job,), name="flexgen-lite results", daemon=True)
        writing.start()
        try:
            while not self._finished.wait(interval):
                with contextlib.suppress(NoStatus):
                    self._last = self._client.status(max(interval, LEAST_STATUS_SECONDS))
                    show(self._progress(job, self._last))
            if self._failure is not None:
                raise self._failure
            if self._client.outage is None:
                with contextlib.suppress(EngineError):  # all is there
                    self._last = self._client.status(LAST_STATUS_SECONDS)
            last = self._progress(job, self._last)
            show(last)
            return last
        except Exception:
            job.cancel(wait=False)
            writing.join(timeout=5)  # what has come back is still written
            raise
        finally:
            self._results.close()

    def cancel(self) -> None:
        """`run` ends soon, from any thread; rows of what was done by then are in the output."""
        self._cancelled = True
        if self._job is not None:
            self._job.cancel(wait=False)

    def _new_items(self, count: bool) -> Iterator[tuple[BatchRequest | BadLine, str]]:
        """Lines that have no row yet, with the `request_id` of the row to come; the others may be counted."""
        there, engine = self._results.there, self._client.welcome.fingerprint
        with open_lines(self._input_file) as lines:
            for item in read_requests(lines, self._shard):
                request_id = request_id_of(item, engine)
                if there.has(item, request_id):
                    if count:
                        self.num_earlier += 1
                        self._num_earlier_failed += there.is_failed(item, request_id)
                else:
                    yield item, request_id

    def _requests(self) -> Iterator[Request]:
        index = 0
        for item, request_id in self._new_items(count=self.num_new is None):
            if isinstance(item, BadLine):
                self._results.write_bad_line(item, request_id)
                self._num_bad += 1
                continue
            if item.model not in (None, self._model, self._client.welcome.model) and not self._warned:
                self._warned = True
                self._warn(f"requests name the model {shown(item.model)}; {shown(self._model)} answers them")
            try:
                asked = self._request(item)
            except (ChatError, BodyError) as error:
                self._results.write(item, request_id, Completion(0, "", [], 0, str(error)))
                self._num_bad += 1
                continue
            self._open[index] = (item, request_id)
            index += 1
            yield asked

    def _request(self, item: BatchRequest) -> Request:
        """
        Raises:
            ChatError, BodyError: it cannot be one here.
        """
        url = CHAT if isinstance(item.prompt, Chat) else COMPLETIONS
        if self._url not in (None, url):
            raise BodyError(f"url is {url!r}: the batch is for {self._url!r}")
        template = self._client.welcome.chat_template
        if not self._own_templates and isinstance(item.prompt, Chat) and brings_program(item.prompt, template):
            raise ChatError(
                "body.chat_template is a program, which is not taken here: "
                "leave it out, or name one of the model's own templates"
            )
        return self._client.request_of(item.prompt, item.params, echo=item.echo)

    def _write_results(self, job: Job) -> None:
        try:
            for completion in job:
                request, request_id = self._open.pop(completion.index)
                if all(output.finish_reason != "cancelled" for output in completion.outputs):
                    self._results.write(request, request_id, completion)
        except Exception as error:
            self._failure = error
        self._finished.set()

    def _progress(self, job: Job, status: Status) -> Progress:
        def since_start(key: str) -> float:
            return status.totals.get(key, 0.0) - self._first.totals.get(key, 0.0)

        busy = since_start("busy_seconds")
        lanes = {
            lane: min(1.0, since_start(f"{lane}_seconds") / busy) if f"{lane}_seconds" in status.totals else share
            for lane, share in status.lanes.items()
            if busy > 0
        }
        return Progress(
            done=job.done + self._num_bad + self.num_earlier,
            failed=job.failed + self._num_bad + self._num_earlier_failed,
            earlier=self.num_earlier,
            total=self._total,
            prompt_tokens=job.prompt_tokens,
            generated_tokens=job.generated_tokens,
            busy_seconds=busy,
            lanes=lanes,
            restarts=int(since_start("restarts")),
            engine_restarts=int(since_start("engine_restarts")),
            overhead=since_start("overhead_seconds") / busy
            if busy > 0 and "overhead_seconds" in status.totals
            else None,
            peak_bytes=status.memory.get("peak", 0),
            budget_bytes=status.memory.get("budget", 0),
            status=status,
        )


def _first_status(client: Client) -> Status:
    """Waits for an engine that is busy, or is started again."""
    while True:
        with contextlib.suppress(NoStatus):
            return client.status()
