"""Whose requests there are: what was submitted before, how much is open, who is told, and what is kept for later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from flexgen_lite.queue.kept_jobs import KeptJob
from flexgen_lite.queue.open_request import NOBODY, Origin
from flexgen_lite.queue.responses import refusal
from flexgen_lite.wire.client_messages import RequestDelta, RequestDone, Submit, WireRequest

MAX_OPEN = 4096  # requests of a client, or a kept job, that wait or run
MAX_UNREAD_DELTAS = 4096  # for a client that does not read them; what they would tell comes with later ones
MAX_JOBS = 10_000  # that are remembered, so that nothing of them is done twice
MAX_KEPT_JOBS = 200  # each has a file

Answer = tuple[bytes, RequestDone | RequestDelta]
Take = Callable[[Origin, WireRequest, int], list[Answer]]
"""Of a new request, with its job's priority: into the queue, or what refuses it."""


class ClientJobs:
    """Args:
    totals: where requests that are refused are counted, as "requests_failed".
    most_open: requests of a client, or of a kept job, at once.
    """

    def __init__(self, totals: Counter[str], most_open: int = MAX_OPEN) -> None:
        self._totals = totals
        self._most_open = most_open
        self._next_index: dict[tuple[bytes, str], int] = {}
        self._open_of_job: Counter[tuple[bytes, str]] = Counter()  # requests; those of kept jobs left out, as below
        self._num_open: Counter[bytes] = Counter()
        self._kept: dict[str, KeptJob] = {}
        self._unread: Counter[bytes] = Counter()  # deltas, by client

    # ------------------------------------------------------------------------------------------------ submitted

    def submit(self, client: bytes, message: Submit, take: Take) -> list[Answer]:
        """Has new requests taken; repeated ones are ignored, those of a kept job answered again if they are done."""
        if message.keep:
            return self._submit_kept(client, message, take)
        answers: list[Answer] = []
        key = (client, message.job_id)
        for request in message.requests:
            if request.index < self._next_index.get(key, 0):
                continue
            if key not in self._next_index:
                self._forget_old_jobs()
            self._next_index[key] = request.index + 1
            answers += self._take(Origin(*key, request.index), request, message.priority, take, self._num_open[client])
        return answers

    def _submit_kept(self, client: bytes, message: Submit, take: Take) -> list[Answer]:
        job = self._kept.get(message.job_id)
        if job is None:
            if len(self._kept) >= MAX_KEPT_JOBS:
                text = f"the engine keeps {MAX_KEPT_JOBS} jobs already: cancel one that is not needed any more"
                return _refuse_all(client, message, text)
            try:
                job = KeptJob()
            except OSError as error:
                text = f"the engine cannot keep another job: {error.strerror}"
                return _refuse_all(client, message, text)
            self._kept[message.job_id] = job
        job.client = client
        answers: list[Answer] = []
        for request in message.requests:
            is_new = request.index == job.num_submitted
            wrong = job.submit(request)
            if wrong is not None:
                answers.append((client, refusal(Origin(client, message.job_id, request.index), wrong)))
            elif is_new:
                origin = Origin(None, message.job_id, request.index)
                answers += self._take(origin, request, message.priority, take, job.num_open - 1)
            elif (done := job.result(request.index)) is not None:
                answers.append((client, done))
        return answers

    def _take(self, origin: Origin, request: WireRequest, priority: int, take: Take, num_open: int) -> list[Answer]:
        if num_open >= self._most_open:
            text = f"{num_open} requests are open already, {self._most_open} allowed: wait for results first"
            return self.refuse(origin, text)
        return take(origin, request, priority)

    def _forget_old_jobs(self) -> None:
        """Of clients that have left without a word, the longest ago: they would add up under an engine that runs on."""
        if len(self._next_index) > MAX_JOBS:
            old = list(self._next_index)[: MAX_JOBS // 2]
            for key in [key for key in old if not self._open_of_job[key]]:
                del self._next_index[key]

    # ------------------------------------------------------------------------------------------------ open, answered

    def opened(self, origin: Origin) -> None:
        """A request is in the queue. Of a kept job its results will be."""
        if origin.client is not None:
            self._num_open[origin.client] += 1
            self._open_of_job[origin.client, origin.job_id] += 1

    def close(self, origin: Origin, done: RequestDone) -> list[Answer]:
        """A request that was opened has its answer."""
        client = origin.client
        if client is not None:
            self._open_of_job[client, origin.job_id] -= 1
            if not self._open_of_job[client, origin.job_id]:
                del self._open_of_job[client, origin.job_id]
            self._num_open[client] -= 1
            if not self._num_open[client]:
                del self._num_open[client]
                self._unread.pop(client, None)
        return self._address(origin, done)

    def refuse(self, origin: Origin, error: str) -> list[Answer]:
        """A request that was not opened is answered with an error."""
        self._totals["requests_failed"] += 1
        return self._address(origin, refusal(origin, error))

    def _address(self, origin: Origin, done: RequestDone) -> list[Answer]:
        """To whom it goes, if anyone is there; what is to be kept is kept."""
        if origin.client is not None:
            return [] if origin.client == NOBODY else [(origin.client, done)]
        job = self._kept[origin.job_id]
        job.add(done)
        return [] if job.client is None else [(job.client, done)]

    # ------------------------------------------------------------------------------------------------ deltas

    def may_tell(self, client: bytes) -> bool:
        """Whether the client is there, and reads what it is told of sequences that go on."""
        return client != NOBODY and self._unread[client] < MAX_UNREAD_DELTAS

    def told(self, client: bytes) -> None:
        """It was sent one more delta."""
        self._unread[client] += 1

    def deltas_read(self, client: bytes, count: int) -> None:
        """The client has read so many more."""
        left = self._unread[client] - max(0, count)
        if left > 0:
            self._unread[client] = left
        else:
            self._unread.pop(client, None)

    # ------------------------------------------------------------------------------------------------ gone

    def is_kept(self, job_id: str | None) -> bool:
        return job_id in self._kept

    def drop(self, job_id: str) -> bytes:
        """What is kept of the job is gone, and its id is free. Whoever is to be told of its open requests: they are to
        be opened as that client's."""
        job = self._kept.pop(job_id)
        job.close()
        return NOBODY if job.client is None else job.client

    def forget(self, client: bytes) -> None:
        """The client is gone: nobody is to be told. Its kept jobs go on."""
        self._unread.pop(client, None)
        for job in self._kept.values():
            job.client = None if job.client == client else job.client
        for key in [key for key in self._next_index if key[0] == client]:
            del self._next_index[key]

    def clients(self) -> set[bytes]:
        """Those that have ever submitted a job and are not known to be gone."""
        keeping = {job.client for job in self._kept.values() if job.client is not None}
        return keeping | {client for client, _ in self._next_index}


def _refuse_all(client: bytes, message: Submit, error: str) -> list[Answer]:
    return [(client, refusal(Origin(client, message.job_id, request.index), error)) for request in message.requests]
