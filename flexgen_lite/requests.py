"""The requests of all clients: accepted or refused, queued, running, answered. Pure logic but for the tokenizer."""

from __future__ import annotations

import random
from array import array
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Protocol

from flexgen_lite.batching import Batcher, MicroBatch, Result, RunningRequest
from flexgen_lite.kept_jobs import KeptJob
from flexgen_lite.kept_logprobs import KeptLogprobs
from flexgen_lite.messages import RequestDone, Submit, WireRequest
from flexgen_lite.sampling_wire import NO_TOKEN, TokenLogprobs
from flexgen_lite.stop_strings import StopStrings

MAX_SEED = 2**63
MAX_OPEN = 4096  # requests of a client, or a kept job, that wait or run
MAX_JOBS = 10_000  # that are remembered, so that nothing of them is done twice
MAX_KEPT_JOBS = 200  # each has a file
CHARACTERS_PER_TOKEN = 256  # at most: longer texts are refused before they are cut into tokens
OVERFLOW = "the model's logits are not finite: its numbers overflow in this dtype, use bfloat16 or float32"


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str: ...


class RequestError(ValueError):
    """A request that cannot be served; the message is for the one who sent it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request has to fit in. `kv_tokens`: what one attention worker's pages hold."""

    max_length: int
    kv_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a request came from; `client` is None for a kept job's."""

    client: bytes | None
    job_id: str
    index: int


Answer = tuple[bytes, RequestDone]


class Requests:
    """Args:
    tokenizer: None where the model has none; prompts are then token ids and answers have no text.
    """

    def __init__(self, batcher: Batcher, limits: Limits, tokenizer: Tokenizer | None) -> None:
        self._batcher = batcher
        self._limits = limits
        self._tokenizer = tokenizer
        self._waiting: deque[RunningRequest] = deque()
        self._origins: dict[int, Origin] = {}  # of every request that waits or runs
        self._next_index: dict[tuple[bytes, str], int] = {}
        self._num_open: Counter[bytes] = Counter()  # requests per client, those of kept jobs left out
        self._kept: dict[str, KeptJob] = {}
        self._close_when_empty: set[str] = set()  # kept jobs that were cancelled
        self._cancelled: set[int] = set()
        self._set_aside: dict[int, RunningRequest] = {}
        self._next_id = 0
        self._texts: dict[int, str] = {}  # of tokens that were asked for
        self.totals: Counter[str] = Counter()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_sent_back(self) -> int:
        """How often a running request had to make room."""
        return self._batcher.num_sent_back

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
            answers += self._take(Origin(client, message.job_id, request.index), request, self._num_open[client])
        return answers

    def _submit_kept(self, client: bytes, message: Submit) -> list[Answer]:
        job = self._kept.get(message.job_id)
        if job is None:
            if len(self._kept) >= MAX_KEPT_JOBS:
                text = f"the engine keeps {MAX_KEPT_JOBS} jobs already: cancel one that is not needed any more"
                return [(client, _done(Origin(client, message.job_id, r.index), error=text)) for r in message.requests]
            try:
                job = KeptJob()
            except OSError as error:
                text = f"the engine cannot keep another job: {error.strerror}"
                return [(client, _done(Origin(client, message.job_id, r.index), error=text)) for r in message.requests]
            self._kept[message.job_id] = job
        job.client = client
        answers: list[Answer] = []
        for request in message.requests:
            origin = Origin(client, message.job_id, request.index)
            is_new = request.index == job.num_submitted
            wrong = job.submit(request)
            if wrong is not None:
                answers.append((client, _done(origin, error=wrong)))
            elif is_new:
                answers += self._take(Origin(None, message.job_id, request.index), request, job.num_open - 1)
            elif (done := job.result(request.index)) is not None:
                answers.append((client, done))
        return answers

    def cancel(self, client: bytes, job_id: str | None) -> list[Answer]:
        """Drop a client's job, or all of its jobs, or a kept one: waiting requests now, running ones at the end of the
        pass."""
        if job_id in self._kept:
            assert job_id is not None
            ids = {i for i, o in self._origins.items() if o.client is None and o.job_id == job_id}
        else:
            ids = {i for i, o in self._origins.items() if o.client == client and job_id in (None, o.job_id)}
        dropped = [request for request in self._waiting if request.id in ids]
        self._waiting = deque(request for request in self._waiting if request.id not in ids)
        self._cancelled |= ids & self._batcher.running.keys()
        answers = [answer for request in dropped for answer in self._finish(request, "cancelled")]
        if job_id in self._kept:
            self._close_when_empty.add(job_id)
            self._close_cancelled_jobs()
        return answers

    def forget(self, client: bytes) -> None:
        """The client is gone: nobody is to be told. Its kept jobs go on."""
        self.cancel(client, None)
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
        self._close_cancelled_jobs()
        return answers

    def end_pass(self, micro_batches: list[MicroBatch], results: list[Result]) -> list[Answer]:
        """Commit a pass's tokens; answers for the requests that it completed, or that were cancelled meanwhile."""
        self.totals["generated_tokens"] += sum(token != NO_TOKEN for r in results for token in r.token_ids)
        self.totals["prompt_tokens"] += sum(
            p.num_rows for m in micro_batches for p in m.pieces if _is_new_prompt(p.request)
        )
        answers: list[Answer] = []
        for request in self._batcher.commit(micro_batches, results):
            if request.overflowed:
                answers += self._fail(request, OVERFLOW)
            else:
                answers += self._finish(request, request.finish_reason or "")
        return answers + self.drop_cancelled()

    def clients(self) -> set[bytes]:
        """Those that have ever submitted a job and are not known to be gone."""
        keeping = {job.client for job in self._kept.values() if job.client is not None}
        return keeping | {client for client, _ in self._next_index}

    # ------------------------------------------------------------------------------------------------ inside

    def _take(self, origin: Origin, request: WireRequest, num_open: int) -> list[Answer]:
        """Into the queue, or refused. `num_open`: requests of the same client, or kept job, that are open already."""
        try:
            if num_open >= MAX_OPEN:
                raise RequestError(f"{num_open} requests are open already, {MAX_OPEN} allowed: wait for results first")
            running = self._accept(request)
        except RequestError as error:
            self.totals["requests_failed"] += 1
            return self._address(origin, _done(origin, error=str(error)))
        self._origins[running.id] = origin
        if origin.client is not None:
            self._num_open[origin.client] += 1
        self._waiting.append(running)
        return []

    def _forget_old_jobs(self) -> None:
        """Of clients that have left without a word, the longest ago: they would add up under an engine that runs on."""
        if len(self._next_index) > MAX_JOBS:
            open_jobs = {(origin.client, origin.job_id) for origin in self._origins.values()}
            old = list(self._next_index)[: MAX_JOBS // 2]
            for key in [key for key in old if key not in open_jobs]:
                del self._next_index[key]

    def _address(self, origin: Origin, done: RequestDone) -> list[Answer]:
        """To whom it goes, if anyone is there; what is to be kept is kept."""
        if origin.client is not None:
            return [(origin.client, done)]
        job = self._kept[origin.job_id]
        job.add(done)
        return [] if job.client is None else [(job.client, done)]

    def _close_cancelled_jobs(self) -> None:
        busy = {origin.job_id for origin in self._origins.values() if origin.client is None}
        for job_id in self._close_when_empty - busy:
            self._close_when_empty.discard(job_id)
            self._kept.pop(job_id).close()

    def _pop_origin(self, request: RunningRequest) -> Origin:
        origin = self._origins.pop(request.id)
        if origin.client is not None:
            self._num_open[origin.client] -= 1
            if not self._num_open[origin.client]:
                del self._num_open[origin.client]
        return origin

    def _accept(self, request: WireRequest) -> RunningRequest:
        tokens = self._tokenize(request.prompt)
        limits, params = self._limits, request.params
        wrong = params.problem()
        if wrong is not None:
            raise RequestError(wrong)
        if not tokens:
            raise RequestError("the prompt is empty: give at least one token")
        if params.stop and self._tokenizer is None:
            raise RequestError("the model has no tokenizer: give stop_token_ids instead of stop")
        for token in (*tokens, *params.stop_token_ids, *(token for token, _ in params.logit_bias)):
            if not 0 <= token < limits.vocab_size:
                raise RequestError(f"token id {token} is outside the vocabulary of {limits.vocab_size}")
        room = limits.max_length - len(tokens)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(tokens)} tokens, the model takes {limits.max_length} with what it generates: "
                "shorten the prompt"
            )
        if params.max_tokens > room:
            params = replace(params, max_tokens=room, min_tokens=min(params.min_tokens, room))
        if params.logprobs is not None:
            params = replace(params, logprobs=min(params.logprobs, limits.vocab_size))
        end_ids = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else limits.eos_token_ids)
        seed = random.randrange(MAX_SEED) if params.seed is None else params.seed
        self._next_id += 1
        kept = array("i", tokens)  # thousands may wait: four bytes a token
        running = RunningRequest(self._next_id, kept, len(tokens), params, seed, end_ids)
        if params.logprobs is not None:
            running.logprobs = KeptLogprobs(params.logprobs)
        if params.stop and self._tokenizer is not None:
            decode = partial(self._tokenizer.decode, skip_special_tokens=params.skip_special_tokens)
            running.stop_strings = StopStrings(params.stop, decode)
        if running.most_stored > limits.kv_tokens:
            raise RequestError(
                f"the request needs {running.most_stored} tokens of KV cache ({len(tokens)} in the prompt, up to "
                f"{params.max_tokens} generated), an attention worker holds {limits.kv_tokens}: "
                "lower max_tokens or raise the RAM budget"
            )
        return running

    def _tokenize(self, prompt: str | tuple[int, ...]) -> list[int]:
        if isinstance(prompt, tuple):
            return list(prompt)
        if self._tokenizer is None:
            raise RequestError("the model has no tokenizer: give the prompt as token ids")
        if len(prompt) > CHARACTERS_PER_TOKEN * self._limits.max_length:
            raise RequestError(
                f"the prompt has {len(prompt)} characters, the model takes {self._limits.max_length} tokens: "
                "shorten the prompt"
            )
        return self._tokenizer.encode(prompt)

    def _fail(self, request: RunningRequest, error: str) -> list[Answer]:
        self.totals["requests_failed"] += 1
        origin = self._pop_origin(request)
        return self._address(origin, _done(origin, error=error))

    def _finish(self, request: RunningRequest, reason: str) -> list[Answer]:
        self.totals["requests_cancelled" if reason == "cancelled" else "requests_done"] += 1
        token_ids = list(request.tokens[request.num_prompt_tokens :])
        shown = token_ids[:-1] if reason == "stop" and not request.has_stop_string else token_ids
        decode: Callable[[list[int], bool], str] = self._tokenizer.decode if self._tokenizer else lambda *_: ""
        text = decode(shown, request.params.skip_special_tokens)
        if request.stop_strings is not None and request.has_stop_string:
            text = request.stop_strings.cut(text, request.params.include_stop_str_in_output)
        origin = self._pop_origin(request)
        logprobs = tuple(request.logprobs or ())
        done = _done(
            origin,
            text=text,
            token_ids=tuple(token_ids),
            num_prompt_tokens=request.num_prompt_tokens,
            finish_reason=reason,
            logprobs=logprobs,
            token_texts=self._token_texts({*token_ids, *(token for found in logprobs for token, _ in found.top)})
            if logprobs
            else {},
        )
        return self._address(origin, done)

    def _token_texts(self, tokens: set[int]) -> dict[int, str]:
        return {token: self._token_text(token) for token in tokens} if self._tokenizer else {}

    def _token_text(self, token: int) -> str:
        """As it would stand within a text: many tokenizers drop a space in front of the first token."""
        if token not in self._texts and self._tokenizer is not None:
            one, two = (self._tokenizer.decode([token] * count, False) for count in (1, 2))
            self._texts[token] = two[len(one) :] if two.startswith(one) else one
        return self._texts[token]


def _is_new_prompt(request: RunningRequest) -> bool:
    return request.stored < request.num_prompt_tokens and not request.times_sent_back


def _done(
    origin: Origin,
    text: str = "",
    token_ids: tuple[int, ...] = (),
    num_prompt_tokens: int = 0,
    finish_reason: str = "error",
    error: str | None = None,
    logprobs: tuple[TokenLogprobs, ...] = (),
    token_texts: Mapping[int, str] = MappingProxyType({}),
) -> RequestDone:
    return RequestDone(
        origin.job_id,
        origin.index,
        text,
        token_ids,
        num_prompt_tokens,
        finish_reason,
        error,
        logprobs,
        dict(token_texts),
    )
