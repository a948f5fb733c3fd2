"""The requests of all clients: accepted or refused, queued, running, answered. Pure logic but for the tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from flexgen_lite.queue.admission import Admission, Limits, RequestError
from flexgen_lite.queue.batching import Batcher
from flexgen_lite.queue.client_jobs import Answer, ClientJobs
from flexgen_lite.queue.kv_on_disk import KvOnDisk
from flexgen_lite.queue.micro_batch import MicroBatch, Result
from flexgen_lite.queue.open_request import OpenRequest, Origin
from flexgen_lite.queue.responses import Responses, refusal
from flexgen_lite.queue.running_request import RunningRequest
from flexgen_lite.queue.waiting_queue import WaitingQueue
from flexgen_lite.tokens.detokenizer import Tokenizer
from flexgen_lite.wire.client_messages import RequestDelta, RequestDone, Submit, WireRequest
from flexgen_lite.wire.kv_on_disk import KvMoved
from flexgen_lite.wire.sampling import NO_TOKEN

OVERFLOW = "the model's logits are not finite: its numbers overflow in this dtype, use bfloat16 or float32"


class Requests:
    """Args:
    tokenizer: None where the model has none; prompts are then token ids and answers have no text.
    """

    def __init__(self, batcher: Batcher, limits: Limits, tokenizer: Tokenizer | None) -> None:
        self._batcher = batcher
        self._admission = Admission(limits, tokenizer)
        self._responses = Responses(tokenizer)
        self._waiting = WaitingQueue[RunningRequest]()
        self._open: set[OpenRequest] = set()
        self._cancelled: set[int] = set()
        self._set_aside: dict[int, RunningRequest] = {}
        self.totals: Counter[str] = Counter()
        self._jobs = ClientJobs(self.totals)

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
        return self._jobs.submit(client, message, self._take)

    def cancel(self, client: bytes, job_id: str | None) -> list[Answer]:
        """Drop a client's job, or all of its jobs, or a kept one: waiting requests now, running ones at the end of the
        pass. The id of a kept one is free at once."""
        is_kept = self._jobs.is_kept(job_id)
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
        if is_kept and job_id is not None:
            told = self._jobs.drop(job_id)
            for owner in wanted & self._open:
                owner.origin = replace(owner.origin, client=told)
                self._jobs.opened(owner.origin)
        return answers

    def deltas_read(self, client: bytes, count: int) -> None:
        """The client has read so many more."""
        self._jobs.deltas_read(client, count)

    def forget(self, client: bytes) -> None:
        """The client is gone: nobody is to be told. Its kept jobs go on."""
        self.cancel(client, None)
        self._jobs.forget(client)

    def clients(self) -> set[bytes]:
        """Those that have ever submitted a job and are not known to be gone."""
        return self._jobs.clients()

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
            if client is not None and self._jobs.may_tell(client):
                delta = self._responses.delta(sequence)
                if delta is not None:
                    self._jobs.told(client)
                    yield client, delta

    # ------------------------------------------------------------------------------------------------ inside

    def _take(self, origin: Origin, request: WireRequest, priority: int) -> list[Answer]:
        """Into the queue, or refused."""
        owner = OpenRequest(origin, max(1, request.params.n), request.echo, priority)
        try:
            sequence = self._admission.accept(request, owner)
        except RequestError as error:
            return self._jobs.refuse(origin, str(error))
        self._open.add(owner)
        self._jobs.opened(origin)
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

    def _close(self, owner: OpenRequest, done: RequestDone) -> list[Answer]:
        """The request has its answer."""
        owner.answered = True
        self._open.discard(owner)
        return self._jobs.close(owner.origin, done)

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
