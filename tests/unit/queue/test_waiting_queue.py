"""Who is next: priorities, fairness among clients, and nobody lost."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from flexgen_lite.queue.open_request import OpenRequest, Origin
from flexgen_lite.queue.running_request import RunningRequest
from flexgen_lite.queue.waiting_queue import WaitingQueue
from flexgen_lite.wire.sampling import WireParams


def sequence(number: int, client: bytes, priority: int = 0, tokens: int = 10, n: int = 1) -> RunningRequest:
    params = WireParams(1, 0, 0.0, 0, 1.0, None, (), False, True, n=n)
    owner = OpenRequest(Origin(client, "job", number), n, priority=priority)
    return RunningRequest(number, [1] * tokens, tokens, params, 0, frozenset(), owner=owner)


def take_all(queue: WaitingQueue) -> list[RunningRequest]:
    taken = []
    while (first := queue.first()) is not None:
        assert queue.take() is first
        taken.append(first)
    assert len(queue) == 0 and list(queue) == []
    return taken


def test_tokens_count_not_requests() -> None:
    queue = WaitingQueue()
    for number in range(4):
        queue.add(sequence(number, b"long", tokens=39))
    for number in range(4, 20):
        queue.add(sequence(number, b"short", tokens=9))
    first = Counter(r.owner.origin.client for r in take_all(queue)[:10] if r.owner is not None)
    assert first == {b"long": 2, b"short": 8}


def test_who_comes_late_does_not_get_what_others_have_had() -> None:
    queue = WaitingQueue()
    for number in range(50):
        queue.add(sequence(number, b"early"))
    for _ in range(20):
        queue.take()
    for number in range(50, 80):
        queue.add(sequence(number, b"late"))
    next_ones = Counter(queue.take().owner.origin.client for _ in range(20))  # type: ignore[union-attr]
    assert next_ones == {b"early": 10, b"late": 10}


def test_what_was_sent_back_comes_first_and_the_oldest_of_it_before_the_others() -> None:
    queue = WaitingQueue()
    for number in range(4):
        queue.add(sequence(number, b"one", priority=-number))
    taken = [queue.take() for _ in range(3)]
    assert [r.id for r in taken] == [3, 2, 1]
    for request in taken[:2]:
        queue.put_back(request)
    assert [r.id for r in take_all(queue)] == [2, 3, 0]


def test_siblings_come_one_after_the_other() -> None:
    queue = WaitingQueue()
    queue.add(sequence(0, b"one", n=3))
    queue.add(sequence(7, b"one"))
    first = queue.take()
    queue.put_back(first)  # has its sibling already
    assert [(r.id, r.number) for r in take_all(queue)] == [(0, 0), (1, 1), (2, 2), (7, 0)]


@given(st.lists(st.tuples(st.sampled_from(["add", "take", "back", "remove"]), st.integers(0, 4)), max_size=80))
def test_nobody_is_lost(actions: list[tuple[str, int]]) -> None:
    queue, waiting, taken = WaitingQueue(), set[int](), dict[int, RunningRequest]()
    for number, (action, choice) in enumerate(actions):
        if action == "add":
            queue.add(sequence(number, b"client %d" % choice, priority=choice % 2))
            waiting.add(number)
        elif action == "take" and queue.first() is not None:
            request = queue.take()
            waiting.remove(request.id)
            taken[request.id] = request
        elif action == "back" and taken:
            request = taken.pop(max(taken))
            queue.put_back(request)
            waiting.add(request.id)
        elif action == "remove":
            gone = {r.id for r in queue.remove(lambda r, choice=choice: r.id % 5 == choice)}  # type: ignore[misc]
            assert gone == {number for number in waiting if number % 5 == choice}
            waiting -= gone
        assert {r.id for r in queue} == waiting and len(queue) == len(waiting)
    assert {r.id for r in take_all(queue)} == waiting
