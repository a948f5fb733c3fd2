"""One measuring process: started, waited for, its outcome checked."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.commands import PROJECT, last_line
from benchmarks.peers.job import Job, Measurement, Options
from benchmarks.peers.memory_group import MemoryGroup, forget_pages, memory_group
from benchmarks.peers.workloads import unequal_work

# Written by the child before its interpreter starts, so that everything it loads is charged to the group.
ENTER_GROUP = 'echo $$ > "$0" && exec "$@"'


@dataclasses.dataclass
class Outcome:
    """Of one run; `failure` says in one line why there is no `seconds`."""

    system: str
    options: Options
    seconds: float | None = None  # prefill and decode
    total_seconds: float = 0.0  # of the process: loading, generation, the end
    num_tokens: int = 0  # generated; of a run that failed: by the steps that were finished
    rate_bound: float | None = None  # tokens per second at most, of a run that ran into its time-out
    peak_bytes: int | None = None  # in the memory cgroup, pages of files included
    held_bytes: int | None = None  # the most seen without pages of files, looked at five times a second
    note: str = ""
    failure: str = ""
    date: str = dataclasses.field(default_factory=lambda: datetime.date.today().isoformat())
    tokens: list[list[int]] = dataclasses.field(default_factory=list, repr=False)

    @property
    def tokens_per_second(self) -> float | None:
        return self.num_tokens / self.seconds if self.seconds else None

    def summary(self) -> dict[str, Any]:
        """For a JSON file: all but the tokens."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "tokens"}

    def __str__(self) -> str:
        text = self.failure or f"{self.seconds:.2f} s, {self.tokens_per_second:.2f} tok/s"
        if self.rate_bound is not None:
            text += f"; {self.num_tokens} tokens until then, at most {self.rate_bound:.2f} tok/s"
        if self.peak_bytes is not None:
            text += f"; peak {self.peak_bytes / 2**30:.2f} GiB"
            text += f", {(self.held_bytes or 0) / 2**30:.2f} GiB without pages of files"
        return f"{text}; {self.note}" if self.note else text


@dataclasses.dataclass
class Trial:
    system: str
    command: list[str]  # the interpreter and the script of the system
    job: Job
    timeout: float  # seconds, loading included
    log: Path  # standard output and error of the process

    def run(self) -> Outcome:
        outcome = Outcome(self.system, self.job.options)
        with tempfile.TemporaryDirectory(prefix="flexgen-lite-bench-", dir=self.log.parent) as folder:
            paths = [Path(folder) / name for name in ("job.json", "result.json", "progress")]
            job = dataclasses.replace(self.job, progress_file=str(paths[2]))
            paths[0].write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")
            begin = time.time()
            try:
                code = self._run(outcome, [*self.command, str(paths[0]), str(paths[1])])
                if outcome.failure or code:
                    outcome.failure = outcome.failure or self._last_words(code)
                    outcome.num_tokens = _progress(paths[2])[-1][1]
                else:
                    self._check(outcome, Measurement(**json.loads(paths[1].read_text(encoding="utf-8"))))
            except subprocess.TimeoutExpired:
                outcome.failure = f"stopped after {self.timeout:.0f} s"
                self._bound(outcome, _progress(paths[2]), time.time())
            except OSError as error:
                outcome.failure = f"could not be started: {error.strerror}"
            outcome.total_seconds = time.time() - begin
        return outcome

    def _run(self, outcome: Outcome, command: list[str]) -> int:
        with contextlib.ExitStack() as stack:
            group = None
            if self.job.memory_bytes:
                forget_pages(Path(self.job.model))
                group = stack.enter_context(memory_group(self.job.memory_bytes))
                command = ["/bin/sh", "-c", ENTER_GROUP, str(group.procs), *command]
            log = stack.enter_context(self.log.open("w", encoding="utf-8"))
            variables = {**os.environ, "PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1"}
            # slow down current versions of numpy where they are set, and nobody would set them
            for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
                variables.pop(name, None)
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=variables, cwd=PROJECT, start_new_session=True
            )
            try:
                return self._wait(process, group, outcome)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _wait(self, process: subprocess.Popen[bytes], group: MemoryGroup | None, outcome: Outcome) -> int:
        deadline = time.monotonic() + self.timeout
        try:
            while process.poll() is None:
                if time.monotonic() > deadline:
                    raise subprocess.TimeoutExpired(process.args, self.timeout)
                if group:
                    outcome.held_bytes = max(outcome.held_bytes or 0, group.held_bytes())
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
        finally:
            if group:
                outcome.peak_bytes = group.peak_bytes()
                if group.out_of_memory():
                    outcome.failure = "killed by the kernel: out of the memory of its group"
        return process.returncode

    def _check(self, outcome: Outcome, result: Measurement) -> None:
        outcome.tokens, outcome.note = result.tokens, result.note
        outcome.num_tokens = sum(map(len, result.tokens))
        wrong = unequal_work(result.tokens, len(self.job.prompts), self.job.max_tokens)
        outcome.failure = wrong or ""
        outcome.seconds = None if wrong else result.seconds

    def _bound(self, outcome: Outcome, steps: list[tuple[float, int]], end: float) -> None:
        """Tokens of the finished steps, and of one more that may have been almost done, over the time until the end."""
        (start, _), (_, outcome.num_tokens) = steps[0], steps[-1]
        at_once = min(len(self.job.prompts), int(self.job.options.get("batch", len(self.job.prompts))))
        largest = max((b - a for (_, a), (_, b) in itertools.pairwise(steps)), default=at_once)
        if start:  # else it was still loading, or does not tell of steps
            outcome.rate_bound = (outcome.num_tokens + largest) / (end - start)

    def _last_words(self, code: int) -> str:
        told = last_line(self.log.read_text(encoding="utf-8", errors="replace"))
        ended = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return f"{ended}: {told}" if told else ended


def _progress(file: Path) -> list[tuple[float, int]]:
    """Time and tokens generated by then, as `Job.report_progress` wrote them; (0.0, 0) if generation did not start."""
    if not file.exists():
        return [(0.0, 0)]
    lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
    return [(float(moment), int(tokens)) for moment, tokens in lines]
