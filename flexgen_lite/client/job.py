"""Requests that were submitted together, and their completions."""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from flexgen_lite.client.completion import Completion, Delta, Prompt
from flexgen_lite.client.completion_of import completion_of, delta_of, last_deltas
from flexgen_lite.client.request import Request
from flexgen_lite.client.streamed_answer import OTHERWISE, StreamedAnswer
from flexgen_lite.errors import fresh
from flexgen_lite.wire.client_messages import RequestDelta, RequestDone, WireRequest

SEED_BITS = 63
PART_REQUESTS = 256
PART_PROMPT_UNITS = 1 << 20  # characters or token ids in one part


class Job:
    """Completions of the requests that one `submit` sent; iterate over it to get them as they finish.

    A request goes through these places, at most `window` of them between source and reader:

        source --feeder thread--> outbox --take()--> in flight --complete()--> finished --next()--> reader

    Where the engine is lost and another one follows, `requeue()` takes what was in flight back to the outbox.

    All of it may be read and cancelled from any thread. Requests that were not sent before `cancel()` have no
    completion. If the engine fails, iteration raises EngineError after the completions that had arrived; if the
    source of prompts raises, iteration raises that.
    """

    def __init__(
        self,
        job_id: str,
        source: Iterable[Request],
        length: int | None,
        window: int,
        wake: Callable[[], None],
        cancel: Callable[[str, bool], None],
        keep: bool = False,
        priority: int = 0,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.id = job_id
        self.keep = keep
        self.priority = priority
        self._source = source
        self._length = length
        self._window = window
        self._wake = wake
        self._send_cancel = cancel
        self._changed = threading.Condition()
        self._outbox: deque[tuple[WireRequest, Prompt]] = deque()
        self._in_flight: dict[int, tuple[WireRequest, Prompt]] = {}
        self._finished: deque[Completion | Delta] = deque()
        self._told: dict[int, dict[int, StreamedAnswer]] = {}  # of requests, by the number of the answer
        self._on_change = on_change
        self._accepted = self._done = self._failed = self._taken = 0
        self._prompt_tokens = self._generated_tokens = 0
        self._exhausted = self._cancelled = False
        self._error: Exception | None = None
        self._feeder = threading.Thread(target=self._feed, name=f"flexgen-lite feeder {job_id}", daemon=True)

    # ------------------------------------------------------------------ the reader's side

    def __iter__(self) -> Iterator[Completion]:
        return self

    def __next__(self) -> Completion:
        while True:
            event = self._next_event()
            if isinstance(event, Completion):
                return event

    def events(self) -> Iterator[Delta | Completion]:
        """What comes of requests that are streamed: their tokens as they come, and each completion behind its last
        Delta. Ends, and raises, as iteration does."""
        while True:
            try:
                event = self._next_event()
            except StopIteration:
                return
            yield event

    def take_events(self) -> tuple[list[Delta | Completion], bool]:
        """What has come by now, without waiting, and whether nothing more will. Raises as iteration does."""
        with self._changed:
            if not self._finished and self._error is not None:
                raise fresh(self._error)
            events = list(self._finished)
            self._finished.clear()
            self._taken += sum(isinstance(event, Completion) for event in events)
            self._changed.notify_all()
            return events, self._error is None and self._is_settled()

    def _next_event(self) -> Delta | Completion:
        with self._changed:
            while not self._finished:
                if self._error is not None:
                    raise fresh(self._error)
                if self._is_over():
                    raise StopIteration
                self._changed.wait()
            event = self._finished.popleft()
            self._taken += isinstance(event, Completion)
            self._changed.notify_all()
            return event

    def results(self) -> list[Completion]:
        """Wait for all requests; the completions not yet taken by iteration, in the order of the prompts."""
        return sorted(self, key=lambda completion: completion.index)

    def cancel(self, wait: bool = True) -> None:
        """Send no further request and ask the engine to drop those it has; they end as "cancelled". What is kept of a
        kept job is dropped too, also when all is done, and its id is free.

        Returns when the engine has confirmed it, or is gone; with `wait=False` at once."""
        with self._changed:
            if not self.keep and (self._is_over() or self._cancelled):
                return
            if not self._is_over():
                self._drop_rest()
        self._send_cancel(self.id, wait)

    def __len__(self) -> int:
        """Number of requests; where the prompts come from a generator, of those taken from it so far."""
        with self._changed:
            return self._accepted if self._length is None or self._exhausted else self._length

    @property
    def done(self) -> int:
        """Requests that came back, the failed ones among them."""
        return self._done

    @property
    def failed(self) -> int:
        return self._failed

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of the requests that came back."""
        return self._prompt_tokens

    @property
    def generated_tokens(self) -> int:
        return self._generated_tokens

    # ------------------------------------------------------------------ the connection's side

    def start(self) -> None:
        self._feeder.start()

    @property
    def is_settled(self) -> bool:
        """Nothing is left to be sent or to come back."""
        with self._changed:
            return self._is_settled()

    @property
    def has_more(self) -> bool:
        """More requests are ready to be sent, or will be in a moment: the source is one that does not wait."""
        with self._changed:
            is_fed = self._length is not None and not self._exhausted and not self._cancelled
            return bool(self._outbox) or (is_fed and self._accepted - self._taken < self._window)

    def take(self, limit: int) -> tuple[WireRequest, ...]:
        """Up to `limit` requests to be sent now, as one part."""
        part: list[WireRequest] = []
        units = 0
        with self._changed:
            while self._outbox and len(part) < min(limit, PART_REQUESTS) and units < PART_PROMPT_UNITS:
                request, prompt = self._outbox.popleft()
                self._in_flight[request.index] = request, prompt
                part.append(request)
                units += len(request.prompt)
            if part:
                self._changed.notify_all()
        return tuple(part)

    def complete(self, message: RequestDone) -> bool:
        """Take in a result; False if it is not one that was waited for."""
        with self._changed:
            if message.index not in self._in_flight:
                return False
            request, prompt = self._in_flight.pop(message.index)
            told = self._told.pop(message.index, {})
            if self._error is not None:
                return True
            completion = completion_of(message, prompt, request.params)
            if not all(told[n].agrees_with(output) for n, output in enumerate(message.outputs) if n in told):
                completion = replace(completion, outputs=[], error=OTHERWISE)
            if request.stream:
                has = {number: (answer.characters, answer.num_tokens) for number, answer in told.items()}
                self._finished.extend(last_deltas(completion, has))
            self._finished.append(completion)
            self._done += 1
            self._failed += completion.error is not None
            self._prompt_tokens += message.num_prompt_tokens
            self._generated_tokens += sum(len(output.token_ids) for output in message.outputs)
            self._changed.notify_all()
        self._on_change()
        return True

    def grow(self, message: RequestDelta) -> None:
        """Take in what has come of a request that goes on."""
        with self._changed:
            if message.index not in self._in_flight or self._error is not None:
                return
            answer = self._told.setdefault(message.index, {}).setdefault(message.number, StreamedAnswer())
            rest = answer.rest_of(message)
            if rest is None:
                return
            self._finished.append(delta_of(rest, self._in_flight[message.index][0].params))
            self._changed.notify_all()
        self._on_change()

    def requeue(self) -> int:
        """The engine is lost, and another one is to be sent what it has not answered, unless the job was cancelled. The
        number of these requests.

        Of a kept job the next engine computes what this reader waits for, but keeps nothing: it knows no more of the
        job's beginning than this object does.
        """
        with self._changed:
            open_requests = [self._in_flight[index] for index in sorted(self._in_flight, reverse=True)]
            self._in_flight.clear()
            self.keep = False
            if self._cancelled:
                self._accepted -= len(open_requests)
                self._told.clear()
                open_requests.clear()
            else:
                self._outbox.extendleft(open_requests)
            for answer in (answer for answers in self._told.values() for answer in answers.values()):
                answer.tell_again()
            self._changed.notify_all()
        self._on_change()
        return len(open_requests)

    def fail(self, error: Exception) -> None:
        """End the job: nothing more will come."""
        with self._changed:
            if not self._is_over():
                self._error = error
                self._drop_rest()
        self._on_change()

    # ------------------------------------------------------------------ the feeder thread

    def _feed(self) -> None:
        failure: Exception | None = None
        try:
            self._feed_all()
        except Exception as error:
            failure = error
        with self._changed:
            self._exhausted = True
            if failure is not None and not self._cancelled:
                self._error = failure
                self._drop_rest()
            self._changed.notify_all()
        if failure is not None:
            self._send_cancel(self.id, False)
        self._wake()
        self._on_change()

    def _feed_all(self) -> None:
        source = iter(self._source)
        for index in range(1 << 62):
            with self._changed:
                self._changed.wait_for(self._has_room)
                if self._cancelled:
                    return
            item = next(source, None)
            if item is None:
                return
            request = item.to_wire(index)
            if not self.keep:  # of a kept job all that submit it have to say the same
                request = with_seed(request)
            with self._changed:
                if self._cancelled:
                    return
                self._outbox.append((request, item.prompt))
                self._accepted += 1
                is_first = len(self._outbox) == 1
            if is_first:
                self._wake()

    def _has_room(self) -> bool:
        room = self._accepted - self._taken < self._window and len(self._outbox) < PART_REQUESTS
        return room or self._cancelled

    def _drop_rest(self) -> None:
        self._cancelled = True
        self._accepted -= len(self._outbox)
        self._length = None
        self._outbox.clear()
        self._changed.notify_all()

    def _is_over(self) -> bool:
        return self._error is not None or self._is_settled()

    def _is_settled(self) -> bool:
        return (self._exhausted or self._cancelled) and not self._outbox and not self._in_flight


def with_seed(request: WireRequest) -> WireRequest:
    """Drawn here and not by the engine: if that is lost, the next one draws the same tokens."""
    params = request.params
    if params.seed is not None or params.temperature == 0:
        return request
    return replace(request, params=replace(params, seed=secrets.randbits(SEED_BITS)))
