"""Threads that run one function together, and sleep in between."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

Job = Callable[[int], None]


class Team:
    """`size` threads, the caller's among them. For functions that release the GIL most of their time."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._jobs: list[queue.SimpleQueue[Job | None]] = [queue.SimpleQueue() for _ in range(1, size)]
        self._results: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        for member, jobs in enumerate(self._jobs, start=1):
            threading.Thread(target=self._serve, args=(member, jobs), daemon=True).start()

    def run(self, job: Job) -> None:
        """Calls `job(member)` in every thread, with members 0 .. size - 1, and returns when all are done."""
        for jobs in self._jobs:
            jobs.put(job)
        try:
            job(0)
        finally:
            errors = [self._results.get() for _ in self._jobs]
        for error in errors:
            if error is not None:
                raise error

    def close(self) -> None:
        for jobs in self._jobs:
            jobs.put(None)

    def _serve(self, member: int, jobs: queue.SimpleQueue[Job | None]) -> None:
        while (job := jobs.get()) is not None:
            try:
                job(member)
            except BaseException as error:  # raised where `run` was called
                self._results.put(error)
            else:
                self._results.put(None)
