"""The requests of all clients in front of several engines: which waits, which engine has which, what was told. Pure
logic, but for the files of kept jobs."""

from __future__ import annotations

import random
from array import array
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from flexgen_lite.client.streamed_answer import OTHERWISE, StreamedAnswer
from flexgen_lite.queue.client_jobs import Answer, ClientJobs
from flexgen_lite.queue.open_request import OpenRequest, Origin
from flexgen_lite.queue.waiting_queue import WaitingQueue
from flexgen_lite.wire.client_messages import Cancel, RequestDelta, RequestDone, Submit, WireOutput, WireRequest
from flexgen_lite.wire.sampling import WireParams

MOST_LOSSES = 3  # of engines that had a request: it may be what ends them
MORE = 8  # sequences that an engine has beyond those that run, and as many that wait
MAX_SEED = 2**63
CHARACTERS_PER_TOKEN = 4

Order = tuple[int, Submit | Cancel]
"""What the engine of this number is to be sent."""


@dataclass(slots=True, eq=False)
class Dispatched:
    """A client's request.

    Attributes:
        owner: whose it is.
        request: as engines are to have it, but for its prompt.
        prompt: a text, or token ids of four bytes each: thousands of prompts may wait.
        num_prompt_tokens: where the prompt is a text, by estimate.
        losses: engines that were lost while they had it.
        is_moving: it is to be taken back from an engine for another one, and the engine has not answered yet.
        was_moved: that was done.
        is_cancelled: by its client, while an engine has it.
        streams: what was told of each of its answers.
        held: what of that is not told yet, for the client does not read.
    """

    owner: OpenRequest
    request: WireRequest
    prompt: str | Sequence[int]
    num_prompt_tokens: int
    losses: int = 0
    is_moving: bool = False
    was_moved: bool = False
    is_cancelled: bool = False
    streams: dict[int, StreamedAnswer] = field(default_factory=dict)
    held: dict[int, RequestDelta] = field(default_factory=dict)

    @property
    def params(self) -> WireParams:
        return self.request.params

    @property
    def num_sequences(self) -> int:
        return max(1, self.request.params.n)

    @property
    def was_told(self) -> bool:
        return any(stream.num_tokens or stream.characters for stream in self.streams.values())

    def make_sibling(self) -> None:
        """A request goes as a whole."""

    @property
    def asked(self) -> WireRequest:
        """What an engine is sent."""
        return replace(self.request, prompt=self.prompt if isinstance(self.prompt, str) else tuple(self.prompt))

    def begin_again(self) -> None:
        """Another engine tells it from the beginning."""
        self.is_moving = False
        for stream in self.streams.values():
            stream.tell_again()


@dataclass(slots=True)
class _Engine:
    """
    Attributes:
        places: sequences that run at once.
        sent: requests that it has, by the job that each is there, in the order in which they were sent.
        load: sequences of these.
        priorities: of these, and how many have each.
    """

    places: int
    sent: dict[str, Dispatched] = field(default_factory=dict)
    load: int = 0
    priorities: Counter[int] = field(default_factory=Counter)

    def has_room_for(self, one: Dispatched) -> bool:
        """A pass may end all that runs at once: as many wait for the next. What is more urgent than some of these comes
        before them there, and finds a little more room."""
        is_urgent = bool(self.priorities) and one.owner.priority < max(self.priorities)
        return self.load < 2 * self.places + (2 * MORE if is_urgent else MORE)

    @property
    def has_suspect(self) -> bool:
        return any(_is_suspect(one) for one in self.sent.values())

    def add(self, job_id: str, one: Dispatched) -> None:
        self.sent[job_id] = one
        self.load += one.num_sequences
        self.priorities[one.owner.priority] += 1

    def take(self, job_id: str) -> Dispatched | None:
        one = self.sent.pop(job_id, None)
        if one is not None:
            self.load -= one.num_sequences
            self.priorities[one.owner.priority] -= 1
            self.priorities += Counter()  # without those that nothing has
        return one


class OpenRequests:
    """Requests go to engines in the order of the queue: by priority, and fair among clients. Each is a job of its own
    there, so that it can be taken back alone.

    An engine that is lost leaves what it had to the others, before all that waits. What was with one engine less than
    may be lost (see MOST_LOSSES) is a suspect: no engine has two of these at once, so that it is known which it was.

    Args:
        most_open: requests of a client, or of a kept job, at once.
    """

    def __init__(self, most_open: int) -> None:
        self.totals: Counter[str] = Counter(requests_done=0, requests_failed=0, requests_cancelled=0)
        self._jobs = ClientJobs(self.totals, most_open)
        self._waiting = WaitingQueue[Dispatched]()
        self._suspects: deque[Dispatched] = deque()
        self._open: set[Dispatched] = set()
        self._engines: dict[int, _Engine] = {}
        self._num_sent = 0

    @property
    def num_waiting(self) -> int:
        """Requests that no engine has."""
        return len(self._waiting) + len(self._suspects)

    @property
    def num_sent(self) -> int:
        """Requests that engines have."""
        return sum(len(engine.sent) for engine in self._engines.values())

    def num_at(self, number: int) -> int:
        """Requests that this engine has."""
        return len(self._engines[number].sent) if number in self._engines else 0

    @property
    def is_uneven(self) -> bool:
        """Nothing waits here, an engine has places free, and another may have requests that wait for one."""
        if self.num_waiting or len(self._engines) < 2:
            return False
        least, most = (choose(self._engines.values(), key=lambda one: one.load) for choose in (min, max))
        return least.load < least.places and most.load > least.load + 1

    def clients(self) -> set[bytes]:
        return self._jobs.clients()

    # ------------------------------------------------------------------------------------------------ clients

    def submit(self, client: bytes, message: Submit) -> list[Answer]:
        """Into the queue; answers at once for those that are refused, or done and kept."""
        return self._jobs.submit(client, message, self._take)

    def _take(self, origin: Origin, request: WireRequest, priority: int) -> list[Answer]:
        owner = OpenRequest(origin, priority=priority)
        num_tokens = len(request.prompt) // (CHARACTERS_PER_TOKEN if isinstance(request.prompt, str) else 1)
        one = Dispatched(owner, _with_seed(request), _compact(request.prompt), num_tokens)
        self._open.add(one)
        self._jobs.opened(origin)
        self._waiting.add(one)
        return []

    def cancel(self, client: bytes, job_id: str | None) -> tuple[list[Answer], list[Order]]:
        """Drop a client's job, or all of its jobs, or a kept one: what no engine has is answered now, the rest when the
        engine has confirmed it. The id of a kept one is free at once."""
        is_kept = self._jobs.is_kept(job_id)
        owned_by = None if is_kept else client
        wanted = {
            one
            for one in self._open
            if one.owner.origin.client == owned_by and job_id in (None, one.owner.origin.job_id)
        }
        orders = self._drop(wanted)
        over = self._waiting.remove(lambda one: one in wanted)
        over += [one for one in self._suspects if one in wanted]
        self._suspects = deque(one for one in self._suspects if one not in wanted)
        if is_kept:  # answered at once, wherever they are
            over = [*wanted]
        answers = [answer for one in over for answer in self._close(one, _cancelled(one))]
        if is_kept and job_id is not None:
            self._jobs.drop(job_id)
        return answers, orders

    def _drop(self, wanted: set[Dispatched]) -> list[Order]:
        """Of those that engines have."""
        orders: list[Order] = []
        for number, engine in self._engines.items():
            for job_id, one in engine.sent.items():
                if one in wanted and not one.is_cancelled:
                    one.is_cancelled = True
                    orders.append((number, Cancel(job_id)))
        return orders

    def deltas_read(self, client: bytes, count: int) -> None:
        """The client has read so many more."""
        self._jobs.deltas_read(client, count)

    def forget(self, client: bytes) -> list[Order]:
        """The client is gone: nobody is to be told. Its kept jobs go on."""
        _, orders = self.cancel(client, None)
        self._jobs.forget(client)
        return orders

    # ------------------------------------------------------------------------------------------------ engines

    def engine_ready(self, number: int, places: int) -> None:
        """An engine may be sent requests; it runs `places` sequences at once."""
        assert number not in self._engines
        self._engines[number] = _Engine(max(1, places))

    def engine_lost(self, number: int, why: str) -> list[Answer]:
        """What it had goes to others, before all that waits; answers to what ends with it."""
        engine = self._engines.pop(number, None)
        answers: list[Answer] = []
        for one in reversed(engine.sent.values()) if engine is not None else ():
            if one not in self._open:
                continue
            one.losses += 1
            one.begin_again()
            if one.is_cancelled:
                answers += self._close(one, _cancelled(one))
            elif one.losses >= MOST_LOSSES:
                text = f"{one.losses} engines were lost while they had this request, which may be why; the last: {why}"
                answers += self._close(one, RequestDone("", 0, 0, (), text))
            else:
                self._put_back(one)
        return answers

    def _put_back(self, one: Dispatched) -> None:
        """Before all that waits."""
        if _is_suspect(one):
            self._suspects.appendleft(one)
        else:
            self._waiting.put_back(one)

    def share_out(self) -> list[Order]:
        """What engines are to be sent now: the one that has least comes first."""
        orders: list[Order] = []
        while (order := self._next_order()) is not None:
            orders.append(order)
        return orders

    def _next_order(self) -> Order | None:
        if not self.num_waiting:
            return None
        first = self._waiting.first()
        for number, engine in sorted(self._engines.items(), key=lambda item: (item[1].load, item[0])):
            if self._suspects and engine.has_room_for(self._suspects[0]) and not engine.has_suspect:
                return number, self._send(engine, self._suspects.popleft())
            if first is not None and engine.has_room_for(first):
                return number, self._send(engine, self._waiting.take())
        return None

    def _send(self, engine: _Engine, one: Dispatched) -> Submit:
        self._num_sent += 1  # an engine takes no job twice
        job_id = str(self._num_sent)
        engine.add(job_id, one)
        return Submit(job_id, (one.asked,), False, one.owner.priority)

    def even_out(self, waiting: Mapping[int, int]) -> list[Order]:
        """What engines are to give back for others that have nothing to do: nothing as long as something waits here.
        Nothing is moved twice, nor what its reader was told of.

        Args:
            waiting: sequences that wait in engines, as they said after all that they were sent.
        """
        if self.num_waiting or any(one.is_moving for engine in self._engines.values() for one in engine.sent.values()):
            return []
        orders: list[Order] = []
        left, load = dict(waiting), {number: self._engines[number].load for number in waiting}
        idle = [number for number in waiting if not waiting[number] and load[number] < self._engines[number].places]
        for number in sorted(idle, key=load.__getitem__):
            most = max(left, key=lambda other: (left[other], load[other]))
            room = self._engines[number].places - load[number]
            moved = self._take_back(most, min(left[most], room, (load[most] - load[number]) // 2))
            orders += moved
            load[number] += len(moved)
            load[most] -= len(moved)
            left[most] -= len(moved)
        return orders

    def _take_back(self, number: int, count: int) -> list[Order]:
        """Those that were sent last: they wait, as far as can be known."""
        orders: list[Order] = []
        for job_id, one in reversed(self._engines[number].sent.items()):
            if len(orders) >= count:
                break
            if not (one.is_cancelled or one.was_moved or one.is_moving or one.was_told):
                one.is_moving = True
                orders.append((number, Cancel(job_id)))
        return orders

    # ------------------------------------------------------------------------------------------------ answers

    def done(self, number: int, message: RequestDone) -> list[Answer]:
        """An engine has answered a request, or given it back."""
        one = self._engines[number].take(message.job_id) if number in self._engines else None
        if one is None or one not in self._open:
            return []
        if one.is_moving and not one.is_cancelled and is_cancelled(message):
            one.begin_again()
            one.was_moved = True
            self._put_back(one)
            return []
        told = one.streams
        if not all(told[n].agrees_with(output) for n, output in enumerate(message.outputs) if n in told):
            message = RequestDone("", 0, message.num_prompt_tokens, (), OTHERWISE)
        return self._close(one, message)

    def delta(self, number: int, message: RequestDelta) -> list[Answer]:
        """An engine tells of a request that goes on."""
        one = self._engines[number].sent.get(message.job_id) if number in self._engines else None
        if one is None or one.owner.origin.client is None or one not in self._open:
            return []
        origin, client = one.owner.origin, one.owner.origin.client
        new = one.streams.setdefault(message.number, StreamedAnswer()).rest_of(message)
        if new is None:
            return []
        held = one.held.pop(message.number, None)
        new = replace(new if held is None else _merged(held, new), job_id=origin.job_id, index=origin.index)
        if not self._jobs.may_tell(client):
            one.held[message.number] = new
            return []
        self._jobs.told(client)
        return [(client, new)]

    def _close(self, one: Dispatched, done: RequestDone) -> list[Answer]:
        self._open.discard(one)
        kind = "failed" if done.error is not None else "cancelled" if is_cancelled(done) else "done"
        self.totals[f"requests_{kind}"] += 1
        origin = one.owner.origin
        return self._jobs.close(origin, replace(done, job_id=origin.job_id, index=origin.index))


def is_cancelled(done: RequestDone) -> bool:
    """Whether an answer is not complete, for it was cancelled."""
    return any(output.finish_reason == "cancelled" for output in done.outputs)


def _is_suspect(one: Dispatched) -> bool:
    return one.losses == MOST_LOSSES - 1


def _cancelled(one: Dispatched) -> RequestDone:
    return RequestDone("", 0, one.num_prompt_tokens, (WireOutput("", (), "cancelled"),))


def _compact(prompt: str | tuple[int, ...]) -> str | Sequence[int]:
    try:
        return prompt if isinstance(prompt, str) else array("i", prompt)
    except OverflowError:  # no token id: the engine will say so
        return prompt


def _with_seed(request: WireRequest) -> WireRequest:
    """Without its prompt. If it is sent to another engine, that draws the same tokens."""
    params = request.params
    if params.seed is not None or params.temperature == 0:
        return replace(request, index=0, prompt="")
    return replace(request, index=0, prompt="", params=replace(params, seed=random.randrange(MAX_SEED)))


def _merged(first: RequestDelta, then: RequestDelta) -> RequestDelta:
    return replace(
        then,
        text=first.text + then.text,
        token_ids=first.token_ids + then.token_ids,
        logprobs=first.logprobs + then.logprobs,
        token_texts=first.token_texts | then.token_texts,
        token_bytes=first.token_bytes | then.token_bytes,
        offsets=first.offsets + then.offsets,
    )
