"""The requests of all clients: accepted or refused, queued, running, answered. Pure logic but for the tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from flexgen_lite.queue.admission import Admission, Limits, RequestError
from flexgen_lite.queue.batching import Batcher
from flexgen_lite.queue.kept_jobs import KeptJob
from flexgen_lite.queue.kv_on_disk import KvOnDisk
from flexgen_lite.queue.micro_batch import MicroBatch, Result
from flexgen_lite.queue.open_request import NOBODY, OpenRequest, Origin
from flexgen_lite.queue.responses import Responses, refusal
from flexgen_lite.queue.running_request import RunningRequest
from flexgen_lite.queue.waiting_queue import WaitingQueue
from flexgen_lite.tokens.detokenizer import Tokenizer
from flexgen_lite.wire.client_messages import RequestDelta, RequestDone, Submit, WireRequest
from flexgen_lite.wire.kv_on_disk import KvMoved
from flexgen_lite.wire.sampling import NO_TOKEN

MAX_OPEN = 4096  # requests of a client, or a kept job, that wait or run
MAX_UNREAD_DELTAS = 4096  # for a client that does not read them; what they would tell comes with later ones
MAX_JOBS = 10_000  # that are remembered, so that nothing of them is done twice
MAX_KEPT_JOBS = 200  # each has a file
OVERFLOW = "the model's logits are not finite: its numbers overflow in this dtype, use bfloat16 or float32"

Answer = tuple[bytes, RequestDone | RequestDelta]


class Requests:
    """Args:
    tokenizer: None where the model has none; prompts are then token ids and answers have no text.
    """

    def __init__(self, batcher: Batcher, limits: Limits, tokenizer: Tokenizer | None) -> None:
        self._batcher = batcher
        self._admission = Admission(limits, tokenizer)
        self._responses = Responses(tokenizer)
        self._waiting = WaitingQueue()
        self._open: set[OpenRequest] = set()
        self._next_index: dict[tuple[bytes, str], int] = {}
        self._num_open: Counter[bytes] = Counter()  # requests per client, those of kept jobs left out
        self._kept: dict[str, KeptJob] = {}
        self._cancelled: set[int] = set()
        self._unread: Counter[bytes] = Counter()  # deltas, by client
        self._set_aside: dict[int, RunningRequest] = {}
        self.totals: Counter[str] = Counter()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_preempted(self) -> int:
        """How often a running request had to make room."""
        return self._batcher.num_preempted

    @property
    def num_shared(self) -> int:
        """Tokens of prompts that were not computed: others that began alike had been."""
        return self._batcher.num_shared

    @property
    def waits_for_disk(self) -> bool:
        """What is on its way to or from there may be all that the next pass waits for."""
        return self._batcher.disk is not None and self._batcher.disk.is_moving

    @property
    def disk(self) -> KvOnDisk | None:
        """Where sequences are parked; None: nowhere."""
        return self._batcher.disk

    @property
    def num_running(self) -> int:
        return len(self._batcher.running)

    # ------------------------------------------------------------------------------------------------ from clients

    def submit(self, client: bytes, message: Submit) -> list[Answer]:
        """Queue the requests; answers at once for those that cannot be served. Repeated ones are ignored; of a kept job
        they are answered again, if they are done."""
        if message.keep:
            return self._submit_kept(client, message)
        answers: list[Answer] = []
        key = (client, message.job_id)
        for request in message.requests:
            if request.index < self._next_index.get(key, 0):
                continue
            if key not in self._next_index:
                self._forget_old_jobs()
            self._next_index[key] = request.index + 1
            origin = Origin(client, message.job_id, request.index)
            answers += self._take(origin, request, message.priority, self._num_open[client])
        return answers

    def _submit_kept(self, client: bytes, message: Submit) -> list[Answer]:
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
            origin = Origin(client, message.job_id, request.index)
            is_new = request.index == job.num_submitted
            wrong = job.submit(request)
            if wrong is not None:
                answers.append((client, refusal(origin, wrong)))
            elif is_new:
                kept = Origin(None, message.job_id, request.index)
                answers += self._take(kept, request, message.priority, job.num_open - 1)
            elif (done := job.result(request.index)) is not None:
                answers.append((client, done))
        return answers

    def cancel(self, client: bytes, job_id: str | None) -> list[Answer]:
        """Drop a client's job, or all of its jobs, or a kept one: waiting requests now, running ones at the end of the
        pass. The id of a kept one is free at once."""
        is_kept = job_id in self._kept
        wanted = {
            owner
            for owner in self._open
            if owner.origin.client == (None if is_kept else client) and job_id in (None, owner.origin.job_id)
        }
        for owner in wanted:
            owner.give_up_the_rest()
        over = self._drop_waiting(wanted)
        running = [request for request in self._batcher.running.values() if request.owner in wanted]
        self._cancelled |= {request.id for request in running}
        if is_kept:  # answered at once; their pages are free with the end of the pass
            over += running
        answers = [answer for sequence in over for answer in self._finish(sequence, "cancelled")]
        if job_id is not None and (job := self._kept.pop(job_id, None)) is not None:
            self._disown(wanted & self._open, NOBODY if job.client is None else job.client)
            job.close()
        return answers

    def _disown(self, owners: set[OpenRequest], client: bytes) -> None:
        """They are no kept job's any more: only the client is to be told."""
        for owner in owners:
            owner.origin = replace(owner.origin, client=client)
            self._num_open[client] += 1

    def deltas_read(self, client: bytes, count: int) -> None:
        """The client has read so many more."""
        left = self._unread[client] - max(0, count)
        if left > 0:
            self._unread[client] = left
        else:
            self._unread.pop(client, None)

    def forget(self, client: bytes) -> None:
        """The client is gone: nobody is to be told. Its kept jobs go on."""
        self.cancel(client, None)
        self._unread.pop(client, None)
        for job in self._kept.values():
            job.client = None if job.client == client else job.client
        for key in [key for key in self._next_index if key[0] == client]:
            del self._next_index[key]

    # ------------------------------------------------------------------------------------------------ passes

    def next_pass(self, only: frozenset[int] | None = None) -> list[MicroBatch]:
        """What the next pass computes; with `only`, nothing but these running requests."""
        return self._batcher.compose(self._waiting, only)

    def limit_rows(self, rows: int) -> int:
        """A micro-batch of the next passes has at most so many rows, or as many as there is a limit on already."""
        return self._batcher.limit_rows(rows)

    def set_aside(self, request_id: int) -> None:
        """A running request runs no more; it will `fail`."""
        request = self._batcher.running[request_id]
        self._batcher.release(request)
        self._cancelled.discard(request_id)
        self._set_aside[request_id] = request

    def fail(self, request_id: int, error: str) -> list[Answer]:
        """A request that was set aside ends with an error."""
        return self._fail(self._set_aside.pop(request_id), error)

    def drop_cancelled(self) -> list[Answer]:
        """Running requests that were cancelled run no more; between passes."""
        answers: list[Answer] = []
        for request in [r for r in self._batcher.running.values() if r.id in self._cancelled]:
            self._batcher.release(request)
            answers += self._finish(request, "cancelled")
        self._cancelled.clear()
        return answers

    def kv_moved(self, message: KvMoved) -> list[Answer]:
        """The loader has written or read K and V."""
        request = self._batcher.moved(message, self._waiting)
        if request is None or request.id not in self._cancelled:
            return []
        self._cancelled.discard(request.id)
        self._waiting.remove(lambda sequence: sequence is request)
        return self._finish(request, "cancelled")

    def end_pass(self, micro_batches: list[MicroBatch], results: list[Result]) -> list[Answer]:
        """Commit a pass's tokens; answers for the requests that it completed, or that were cancelled meanwhile."""
        self.totals["generated_tokens"] += sum(token != NO_TOKEN for r in results for token in r.token_ids)
        pieces = [piece for micro_batch in micro_batches for piece in micro_batch.pieces]
        self.totals["prompt_tokens"] += sum(piece.num_rows for piece in pieces if _is_new_prompt(piece.request))
        for piece in pieces:
            request, end = piece.request, piece.request.stored + piece.num_rows
            self.totals["recomputed_tokens"] += max(0, min(end, request.computed) - request.stored)
            request.computed = max(request.computed, end)
        finished = self._batcher.commit(micro_batches, results)
        answers: list[Answer] = [*self._deltas(micro_batches)]
        for request in finished:
            if request.overflowed:
                answers += self._fail(request, OVERFLOW)
            else:
                answers += self._finish(request, request.finish_reason or "")
        return answers + self.drop_cancelled()

    def _deltas(self, micro_batches: list[MicroBatch]) -> Iterator[tuple[bytes, RequestDelta]]:
        """Of sequences that go on, for those who want to see them grow."""
        for piece in (piece for micro_batch in micro_batches for piece in micro_batch.pieces):
            sequence = piece.request
            owner = sequence.owner
            if not sequence.is_streamed or sequence.id not in self._batcher.running or sequence.num_generated == 0:
                continue
            client = owner.origin.client if owner is not None and not owner.answered else None
            if client not in (None, NOBODY) and self._unread[client] < MAX_UNREAD_DELTAS:
                delta = self._responses.delta(sequence)
                if delta is not None:
                    self._unread[client] += 1
                    yield client, delta

    def clients(self) -> set[bytes]:
        """Those that have ever submitted a job and are not known to be gone."""
        keeping = {job.client for job in self._kept.values() if job.client is not None}
        return keeping | {client for client, _ in self._next_index}

    # ------------------------------------------------------------------------------------------------ inside

    def _take(self, origin: Origin, request: WireRequest, priority: int, num_open: int) -> list[Answer]:
        """Into the queue, or refused. `num_open`: requests of the same client, or kept job, that are open already."""
        owner = OpenRequest(origin, max(1, request.params.n), request.echo, priority)
        try:
            if num_open >= MAX_OPEN:
                raise RequestError(f"{num_open} requests are open already, {MAX_OPEN} allowed: wait for results first")
            sequence = self._admission.accept(request, owner)
        except RequestError as error:
            self.totals["requests_failed"] += 1
            return self._address(origin, refusal(origin, str(error)))
        self._open.add(owner)
        if origin.client is not None:
            self._num_open[origin.client] += 1
        if sequence.finish_reason is not None:  # a prompt of one token, which has no logprob
            owner.give_up_the_rest()
            owner.outputs = {number: self._responses.output(sequence, "length") for number in range(request.params.n)}
            return self._finish(sequence, "length")
        self._waiting.add(sequence)
        return []

    def _drop_waiting(self, owners: set[OpenRequest]) -> list[RunningRequest]:
        """Takes out of the queue what these have there."""
        over = self._waiting.remove(lambda sequence: sequence.owner in owners)
        for sequence in over:
            self._batcher.forget(sequence)
        return over

    def _forget_old_jobs(self) -> None:
        """Of clients that have left without a word, the longest ago: they would add up under an engine that runs on."""
        if len(self._next_index) > MAX_JOBS:
            open_jobs = {(owner.origin.client, owner.origin.job_id) for owner in self._open}
            old = list(self._next_index)[: MAX_JOBS // 2]
            for key in [key for key in old if key not in open_jobs]:
                del self._next_index[key]

    def _address(self, origin: Origin, done: RequestDone) -> list[Answer]:
        """To whom it goes, if anyone is there; what is to be kept is kept."""
        if origin.client is not None:
            return [] if origin.client == NOBODY else [(origin.client, done)]
        job = self._kept[origin.job_id]
        job.add(done)
        return [] if job.client is None else [(job.client, done)]

    def _close(self, owner: OpenRequest, done: RequestDone) -> list[Answer]:
        """The request has its answer."""
        owner.answered = True
        self._open.discard(owner)
        client = owner.origin.client
        if client is not None:
            self._num_open[client] -= 1
            if not self._num_open[client]:
                del self._num_open[client]
                self._unread.pop(client, None)
        return self._address(owner.origin, done)

    def _fail(self, sequence: RunningRequest, error: str) -> list[Answer]:
        """A sequence cannot go on: nor does any other of the same request."""
        owner = sequence.owner
        assert owner is not None
        if owner.answered:
            return []
        self.totals["requests_failed"] += 1
        owner.give_up_the_rest()
        self._drop_waiting({owner})
        self._cancelled |= {r.id for r in self._batcher.running.values() if r.owner is owner}
        return self._close(owner, refusal(owner.origin, error))

    def _finish(self, sequence: RunningRequest, reason: str) -> list[Answer]:
        owner = sequence.owner
        assert owner is not None
        if owner.answered:
            return []
        owner.num_live -= 1
        owner.outputs[sequence.number] = self._responses.output(sequence, reason)
        if sequence.number == 0:
            owner.prompt = self._responses.prompt(sequence, owner)
        if not owner.is_complete:
            return []
        self.totals["requests_cancelled" if reason == "cancelled" else "requests_done"] += 1
        return self._close(owner, self._responses.done(owner, sequence.num_prompt_tokens))


def _is_new_prompt(request: RunningRequest) -> bool:
    return request.stored < request.num_prompt_tokens and not request.times_preempted


def _refuse_all(client: bytes, message: Submit, error: str) -> list[Answer]:
    return [(client, refusal(Origin(client, message.job_id, request.index), error)) for request in message.requests]
