"""A batch file through an engine: requests from one file, results into another."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flexgen_lite.batch_file import (
    BadLine,
    BatchRequest,
    ResultWriter,
    count_lines,
    read_requests,
    refuse_existing,
)
from flexgen_lite.client import Client
from flexgen_lite.completion import Prompt
from flexgen_lite.messages import Status
from flexgen_lite.sampling_params import SamplingParams
from flexgen_lite.sizes import format_size


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a batch is. `rate` is generated tokens per second in which passes were running."""

    done: int
    failed: int
    total: int | None
    prompt_tokens: int
    generated_tokens: int
    busy_seconds: float
    lanes: dict[str, float]  # busy share since the start
    overhead: float | None  # share of the passes in which no lane was busy, or only copied to another
    peak_bytes: int
    budget_bytes: int

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
        text = (
            f"done: {self.done} requests ({self.failed} failed), {self.prompt_tokens} prompt tokens, "
            f"{self.generated_tokens} generated tokens in {self.busy_seconds:.1f} s, {self.rate:.1f} tok/s"
        )
        if self.lanes:
            busiest = max(self.lanes, key=lambda lane: self.lanes[lane])
            text += f"; busiest lane {busiest} {self.lanes[busiest]:.0%}"
        if self.overhead is not None:
            text += f"; between processes {self.overhead:.1%}"
        if self.budget_bytes:
            text += f"; peak memory {format_size(self.peak_bytes)} of {format_size(self.budget_bytes)}"
        return text


def check_files(input_file: Path, output_file: Path, overwrite: bool) -> None:
    """Refuse what would fail after the engine has been started.

    Raises:
        OSError: the input cannot be read, or the output not written.
    """
    with input_file.open("rb"):
        pass
    if output_file.exists():
        if output_file.samefile(input_file):
            raise FileExistsError(f"{output_file} is the input file: give another output file")
        refuse_existing(output_file, overwrite)
    elif not output_file.parent.is_dir():
        raise FileNotFoundError(f"{output_file.parent} is not a directory: make it first")
    if not os.access(output_file if output_file.exists() else output_file.parent, os.W_OK):
        raise PermissionError(f"{output_file} cannot be written")


class BatchRun:
    """One run. The calling thread shows progress; another takes results and writes them, so that an interrupt in
    the former never cuts a row.

    Args:
        client: of the engine.
        input_file: one request a line.
        output_file: one result a line, in the order in which they finish.
        overwrite: the output may have something in it.
        warn: is given what a user should know, on another thread.
    """

    def __init__(
        self,
        client: Client,
        input_file: Path,
        output_file: Path,
        *,
        overwrite: bool = False,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._client = client
        self._input_file = input_file
        self._total = count_lines(input_file)
        self._model = client.welcome.model
        self._warn = warn
        self._writer = ResultWriter(output_file, model=self._model, overwrite=overwrite)
        self._open: dict[int, BatchRequest] = {}
        self._num_bad = 0
        self._warned = False
        self._failure: Exception | None = None
        self._finished = threading.Event()
        self._first = client.status()

    def run(self, show: Callable[[Progress], None], interval: float) -> Progress:
        """Run to the end, calling `show` every `interval` seconds.

        Raises:
            EngineError: the engine failed. Rows of finished requests are in the output.
            OSError: a file could not be read or written.
        """
        self._job = self._client.submit_pairs(self._requests())
        writing = threading.Thread(target=self._write_results, name="flexgen-lite results", daemon=True)
        writing.start()
        try:
            while not self._finished.wait(interval):
                show(self._progress(self._client.status()))
            if self._failure is not None:
                raise self._failure
            last = self._progress(self._client.status())
            show(last)
            return last
        except Exception:
            self._job.cancel()
            writing.join(timeout=5)  # what has come back is still written
            raise
        finally:
            self._writer.close()

    def _requests(self) -> Iterator[tuple[Prompt, SamplingParams]]:
        index = 0
        with self._input_file.open("rb") as lines:
            for item in read_requests(lines):
                if isinstance(item, BadLine):
                    self._writer.write_bad_line(item)
                    self._num_bad += 1
                    continue
                if item.model not in (None, self._model) and not self._warned:
                    self._warned = True
                    self._warn(f"requests name the model {item.model!r}; {self._model!r} answers them")
                self._open[index] = item
                index += 1
                yield item.prompt, item.params

    def _write_results(self) -> None:
        try:
            for completion in self._job:
                request = self._open.pop(completion.index)
                if completion.finish_reason != "cancelled":
                    self._writer.write(request, completion)
        except Exception as error:
            self._failure = error
        self._finished.set()

    def _progress(self, status: Status) -> Progress:
        def since_start(key: str) -> float:
            return status.totals.get(key, 0.0) - self._first.totals.get(key, 0.0)

        busy = since_start("busy_seconds")
        lanes = {
            lane: min(1.0, since_start(f"{lane}_seconds") / busy) if f"{lane}_seconds" in status.totals else share
            for lane, share in status.lanes.items()
            if busy > 0
        }
        return Progress(
            done=self._job.done + self._num_bad,
            failed=self._job.failed + self._num_bad,
            total=self._total,
            prompt_tokens=self._job.prompt_tokens,
            generated_tokens=self._job.generated_tokens,
            busy_seconds=busy,
            lanes=lanes,
            overhead=since_start("overhead_seconds") / busy
            if busy > 0 and "overhead_seconds" in status.totals
            else None,
            peak_bytes=status.memory.get("peak", 0),
            budget_bytes=status.memory.get("budget", 0),
        )
