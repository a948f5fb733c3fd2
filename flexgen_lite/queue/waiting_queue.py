"""Sequences that wait for a place: by priority, and fair among clients. Pure logic."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, Self, TypeVar

from flexgen_lite.queue.open_request import OpenRequest
from flexgen_lite.queue.running_request import RunningRequest
from flexgen_lite.wire.sampling import WireParams

Who = tuple[bytes | None, str]


class Queued(Protocol):
    """What can wait in a queue."""

    @property
    def owner(self) -> OpenRequest | None: ...

    @property
    def num_prompt_tokens(self) -> int: ...

    @property
    def params(self) -> WireParams: ...

    def make_sibling(self) -> Self | None: ...


Item = TypeVar("Item", bound=Queued)


class Waiting(Protocol):
    """Sequences that wait for a place."""

    def first(self) -> RunningRequest | None: ...

    def take(self) -> RunningRequest: ...

    def put_back(self, request: RunningRequest) -> None: ...


class WaitingQueue(Generic[Item]):
    """Those of the lowest priority number come first; among them, those of whoever has had least.

    What somebody has had is counted in tokens, those of a prompt and those that may be generated, when a sequence is
    taken. Who comes new, or comes back, begins with as much as the least of those who wait. Each one's own sequences
    come in the order in which they were added. Sequences that were preempted come before all others.
    """

    def __init__(self) -> None:
        self._returned: deque[Item] = deque()
        self._queues: dict[int, dict[Who, deque[Item]]] = {}  # by priority
        self._had: dict[Who, int] = {}  # tokens, of those who wait
        self._num = 0

    def __len__(self) -> int:
        return self._num + len(self._returned)

    def __iter__(self) -> Iterator[Item]:
        """In no particular order."""
        yield from self._returned
        for queues in self._queues.values():
            for queue in queues.values():
                yield from queue

    def add(self, request: Item) -> None:
        who, priority = _who(request), _priority(request)
        if who not in self._had:
            self._had[who] = min(self._had.values(), default=0)
        self._queues.setdefault(priority, {}).setdefault(who, deque()).append(request)
        self._num += 1

    def put_back(self, request: Item) -> None:
        """It had been taken, and waits again."""
        self._returned.appendleft(request)

    def first(self) -> Item | None:
        """The next to be taken."""
        if self._returned:
            return self._returned[0]
        return self._next()[0] if self._num else None

    def take(self) -> Item:
        """The first. Another sequence that goes on from the same prompt takes its place, if one is wanted."""
        if self._returned:
            return self._returned.popleft()
        queue = self._next()
        request = queue.popleft()
        self._num -= 1
        self._had[_who(request)] += request.num_prompt_tokens + request.params.max_tokens
        sibling = request.make_sibling()
        if sibling is not None:
            queue.appendleft(sibling)
            self._num += 1
        self._tidy()
        return request

    def remove(self, wanted: Callable[[Item], bool]) -> list[Item]:
        """Takes out all of which `wanted` is true."""
        removed = [request for request in self if wanted(request)]
        if removed:
            gone = set(map(id, removed))
            self._returned = deque(r for r in self._returned if id(r) not in gone)
            for queues in self._queues.values():
                for who, queue in queues.items():
                    queues[who] = deque(r for r in queue if id(r) not in gone)
            self._num = sum(len(queue) for queues in self._queues.values() for queue in queues.values())
            self._tidy()
        return removed

    def _next(self) -> deque[Item]:
        queues = self._queues[min(self._queues)]
        return queues[min(queues, key=lambda who: self._had[who])]

    def _tidy(self) -> None:
        """Forgets queues that are empty, and what those have had who do not wait any more."""
        for priority, queues in list(self._queues.items()):
            for who in [who for who, queue in queues.items() if not queue]:
                del queues[who]
            if not queues:
                del self._queues[priority]
        waiting = {who for queues in self._queues.values() for who in queues}
        for who in self._had.keys() - waiting:
            del self._had[who]


def _who(request: Queued) -> Who:
    return request.owner.who if request.owner is not None else (None, "")


def _priority(request: Queued) -> int:
    return request.owner.priority if request.owner is not None else 0
