"""The client where its engine is lost and another one follows: nothing is lost, nothing comes twice, nothing hangs."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flexgen_lite import Client, EngineError, SamplingParams
from flexgen_lite.client.completion import Completion, Delta
from flexgen_lite.client.request import Request
from flexgen_lite.errors import NoStatus
from flexgen_lite.wire.access import make_key_file
from flexgen_lite.wire.client_messages import GetStatus, RequestDelta, RequestDone, Submit, WireOutput
from tests.fake_engine import FakeEngine, answer
from tests.fake_owner import FakeOwner

pytestmark = pytest.mark.timeout(60)
SAMPLED = SamplingParams(max_tokens=8, temperature=0.7)


@pytest.fixture
def owner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeOwner]:
    owner = FakeOwner(tmp_path_factory.mktemp("s"))
    yield owner
    owner.close()


def submitted(engine: FakeEngine, least: int) -> list[Submit]:
    """What comes in next, so many requests at least."""
    found: list[Submit] = []
    while sum(len(submit.requests) for submit in found) < least:
        found.append(engine.next_of(Submit))
    return found


def test_what_was_not_answered_is_submitted_again(owner: FakeOwner) -> None:
    def answer_some(submit: Submit) -> list[Any]:
        return [answer(submit.job_id, request) for request in submit.requests if request.index % 3 == 0]

    first = owner.start(window=32, on_submit=answer_some)
    client = owner.connect()
    job = client.submit(f"p{number}" for number in range(200))
    submitted(first, 32)
    first.die()
    owner.wait_for_loss()
    second = owner.start(window=32)
    assert [str(completion) for completion in job.results()] == [f"P{number}" for number in range(200)]
    assert (job.done, job.failed, len(job)) == (200, 0, 200)
    indices = [request.index for submit in submitted(second, 200 - 11) for request in submit.requests]
    assert indices == [index for index in range(200) if index % 3 or index >= 32], "in order, and nothing twice"
    assert owner.losses == [f"the engine at {first.endpoint} closed the connection"]
    assert owner.num_in_flight == [32 - 11] and owner.num_finished == 200
    assert first.most_outstanding <= 32 and second.most_outstanding <= 32


@contextlib.contextmanager
def dying_engine(path: Path) -> Iterator[str]:
    """The endpoint of an engine that ends in the middle of ZeroMQ's greeting."""

    def end(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.recv(1)
        connection.close()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=end, args=(listener,))
        thread.start()
        yield f"ipc://{path}"
        thread.join()


def test_an_engine_that_ends_while_the_client_connects(owner: FakeOwner, tmp_path: Path) -> None:
    """It is lost as any other."""
    first = owner.start()
    client = owner.connect()
    first.die()
    owner.wait_for_loss()
    with dying_engine(tmp_path / "e") as endpoint:
        owner.follow_with(endpoint)
        owner.wait_for_loss(2)
    owner.start()
    assert [str(completion) for completion in client.submit(["one"]).results()] == ["ONE"]
    assert owner.losses == [f"the engine at {at} closed the connection" for at in (first.endpoint, endpoint)]


def test_nor_does_it_make_who_starts_engines_doubt_the_keys(owner: FakeOwner, tmp_path: Path) -> None:
    def give_up_then() -> None:
        owner.wait_for_loss()
        owner.give_up(EngineError("no other"))

    make_key_file(tmp_path / "key")
    with dying_engine(tmp_path / "e") as endpoint:
        owner.follow_with(endpoint)
        opening = threading.Thread(target=give_up_then)
        opening.start()
        with pytest.raises(EngineError, match="no other"):
            owner.connect(key_file=tmp_path / "key")
        opening.join()
    assert owner.losses == [f"the engine at {endpoint} closed the connection"]
    with dying_engine(tmp_path / "e2") as endpoint, pytest.raises(EngineError, match="this key, or has just ended"):
        Client(endpoint, key_file=tmp_path / "key")


def test_engine_after_engine(owner: FakeOwner) -> None:
    """Each answers a part and dies; several jobs, by several threads."""
    found: dict[int, list[str]] = {}

    def dies_after(num: int) -> Callable[[Submit], list[Any] | None]:
        seen = 0

        def reply(submit: Submit) -> list[Any] | None:
            nonlocal seen
            seen += len(submit.requests)
            return [] if seen > num else None

        return reply

    engine = owner.start(window=16, on_submit=dies_after(20))
    client = owner.connect()

    def read(number: int) -> None:
        found[number] = [str(completion) for completion in client.submit(f"{number} {i}" for i in range(60)).results()]

    readers = [threading.Thread(target=read, args=(number,)) for number in range(3)]
    for reader in readers:
        reader.start()
    for number in range(4):
        submitted(engine, 21)
        engine.die()
        owner.wait_for_loss(number + 1)
        engine = owner.start(window=16, on_submit=dies_after(30) if number < 3 else None)
    for reader in readers:
        reader.join(20)
    assert found == {number: [f"{number} {index}" for index in range(60)] for number in range(3)}


def test_requests_draw_the_same_wherever_they_are_computed(owner: FakeOwner) -> None:
    """What has no seed gets one before it is sent for the first time."""
    first = owner.start(silent=True)
    client = owner.connect()
    job = client.submit(["a", "b", "c"], [SAMPLED, SAMPLED, SamplingParams(seed=5, n=3)])
    before = [request for submit in submitted(first, 3) for request in submit.requests]
    greedy = client.submit("d")
    assert submitted(first, 1)[0].requests[0].params.seed is None, "there is nothing to draw"
    first.die()
    owner.wait_for_loss()
    second = owner.start()
    job.results()
    greedy.results()
    after = [request for submit in submitted(second, 4) for request in submit.requests]
    assert [request for request in after if request.prompt != "d"] == before
    seeds = [request.params.seed for request in before]
    assert None not in seeds and seeds[0] != seeds[1] and seeds[2] == 5


def delta(submit: Submit, text: str, tokens: tuple[int, ...], number: int = 0) -> RequestDelta:
    return RequestDelta(submit.job_id, submit.requests[0].index, number, text, tokens, (), {})


def done(submit: Submit, *outputs: tuple[str, tuple[int, ...]]) -> RequestDone:
    whole = tuple(WireOutput(text, tokens, "length") for text, tokens in outputs)
    return RequestDone(submit.job_id, submit.requests[0].index, 1, whole)


def test_a_stream_goes_on_where_it_was(owner: FakeOwner) -> None:
    """Both answers of it: one has told more than the next engine has at first, the other nothing."""
    first = owner.start(on_submit=lambda submit: [delta(submit, "ab", (1, 2, 3)), delta(submit, "c", (4,))])
    client = owner.connect()
    job = client.submit_requests([Request("x", SamplingParams(n=2, seed=1), stream=True)], 1)
    events = job.events()
    assert [next(events), next(events)] == [Delta(0, 0, "ab", [1, 2, 3]), Delta(0, 0, "c", [4])]
    first.die()
    owner.wait_for_loss()
    owner.start(
        on_submit=lambda submit: [
            delta(submit, "a", (1, 2)),
            delta(submit, "xy", (7, 8), number=1),
            delta(submit, "bcd", (3, 4, 5)),
            done(submit, ("abcdef", (1, 2, 3, 4, 5, 6)), ("xyz", (7, 8, 9))),
        ]
    )
    rest = list(events)
    assert rest[:-1] == [
        Delta(0, 1, "xy", [7, 8]),
        Delta(0, 0, "d", [5]),
        Delta(0, 0, "ef", [6], None, "length"),
        Delta(0, 1, "z", [9], None, "length"),
    ]
    assert isinstance(rest[-1], Completion) and rest[-1].text == "abcdef"


def test_a_stream_is_not_made_of_two_answers(owner: FakeOwner) -> None:
    first = owner.start(on_submit=lambda submit: [delta(submit, "ab", (1, 2))])
    client = owner.connect()
    events = client.submit_requests([Request("x", SAMPLED, stream=True)], 1).events()
    assert next(events) == Delta(0, 0, "ab", [1, 2])
    first.die()
    owner.wait_for_loss()
    owner.start(on_submit=lambda submit: [delta(submit, "ac", (1, 3)), done(submit, ("acd", (1, 3, 4)))])
    (last,) = events
    assert isinstance(last, Completion) and last.error is not None and "came to a different answer" in last.error


def test_jobs_of_the_time_between(owner: FakeOwner) -> None:
    """Submitted and cancelled while no engine is there."""
    first = owner.start(silent=True)
    client = owner.connect()
    given_up, waiting = client.submit(["a"] * 5), client.submit(["b"] * 5)
    submitted(first, 10 - 2)
    given_up_before = client.submit(["z"] * 5)
    given_up_before.cancel(wait=False)
    first.die()
    owner.wait_for_loss()
    assert client.outage is not None and "closed the connection; it is being started again" in client.outage
    assert given_up_before.results() == []
    given_up.cancel()
    assert given_up.results() == [], "at once"
    late = client.submit(["c"] * 5)
    second = owner.start()
    assert [str(c) for c in waiting.results()] == ["B"] * 5 and [str(c) for c in late.results()] == ["C"] * 5
    assert client.outage is None
    assert {r.prompt for submit in submitted(second, 10) for r in submit.requests} == {"b", "c"}


def test_a_job_that_was_cancelled_just_before(owner: FakeOwner) -> None:
    """The engine did not come to tell that it has dropped it."""
    first = owner.start(on_submit=lambda _: [])
    client = owner.connect()
    job = client.submit(f"{number}" for number in range(50))
    submitted(first, 8)
    first._handle = lambda *_: None  # type: ignore[method-assign]
    job.cancel(wait=False)
    first.die()
    assert job.results() == []
    again = client.submit(["x"], job_id=job.id)  # nothing of it is open any more
    owner.start()
    assert [str(completion) for completion in again.results()] == ["X"]


def test_a_status_asked_for_meanwhile(owner: FakeOwner) -> None:
    first = owner.start(silent=True)
    client = owner.connect()
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.append(client.status()))
    waiting.start()
    first.next_of(GetStatus)
    first.die()
    owner.wait_for_loss()
    with pytest.raises(NoStatus, match=r"within 0\.1 s: .*it is being started again"):
        client.status(0.1)
    second = owner.start()
    waiting.join(20)
    assert found[0].totals["engine_restarts"] == client.status().totals["engine_restarts"] == 1
    assert second.next_of(GetStatus)


def test_counters_go_on(owner: FakeOwner) -> None:
    first = owner.start()
    client = owner.connect()
    client.submit(["a"] * 10).results()
    before = client.status()
    assert before.done == 10
    first.die()
    owner.wait_for_loss()
    owner.start()
    client.submit(["a"] * 5).results()
    after = client.status()
    assert after.done == 15 and after.totals["busy_seconds"] == 1.5 * before.totals["busy_seconds"]


def test_counters_are_known_though_nobody_asks(owner: FakeOwner) -> None:
    """An engine is asked from time to time, or what it did since would be lost with it."""
    first = owner.start(silent=True)
    client = owner.connect()
    client.submit("a")
    first.next_of(GetStatus)


def test_a_kept_job_goes_on_without_being_kept(owner: FakeOwner) -> None:
    """The next engine knows nothing of its beginning, so it cannot keep it under its name."""
    first = owner.start(on_submit=lambda s: [answer(s.job_id, r) for r in s.requests if r.index < 2])
    client = owner.connect()
    job = client.submit(["a", "b", "c", "d"], SAMPLED, job_id="mine", keep=True)
    (before, *_) = submitted(first, 4)
    assert before.keep and before.requests[0].params.seed is None, "others who submit it draw no other seed"
    first.die()
    owner.wait_for_loss()
    second = owner.start()
    assert [str(completion) for completion in job.results()] == ["A", "B", "C", "D"]
    (after, *_) = submitted(second, 2)
    assert not after.keep and [request.index for request in after.requests] == [2, 3]


def test_another_model_is_refused(owner: FakeOwner) -> None:
    first = owner.start(silent=True)
    client = owner.connect()
    job = client.submit("a")
    submitted(first, 1)
    first.die()
    owner.wait_for_loss()
    owner.start(fingerprint="1" * 16)
    for call in (job.results, client.status, lambda: client.submit("b")):
        with pytest.raises(EngineError, match="fake is another model than before") as caught:
            call()  # type: ignore[operator]
        assert caught.value.user_error


def test_no_other_engine(owner: FakeOwner) -> None:
    first = owner.start(silent=True)
    client = owner.connect()
    job = client.submit(["a"] * 5)
    submitted(first, 5)
    first.die()
    owner.wait_for_loss()
    owner.give_up(EngineError("there is no memory for it", user_error=True))
    with pytest.raises(EngineError, match="no memory for it") as caught:
        job.results()
    assert caught.value.user_error
    with pytest.raises(EngineError, match="no memory for it"):
        client.wait_for_end(20)


def test_closed_meanwhile(owner: FakeOwner) -> None:
    first = owner.start(silent=True)
    client = owner.connect()
    job = client.submit(["a"] * 5)
    submitted(first, 5)
    first.die()
    owner.wait_for_loss()
    start = time.monotonic()
    client.close()
    assert time.monotonic() - start < 4, "it does not wait for the engine"
    with pytest.raises(EngineError, match="closed"):
        job.results()


def test_an_engine_that_hangs_or_babbles_is_lost(owner: FakeOwner) -> None:
    first = owner.start(silent=True)
    client = owner.connect(heartbeat=0.05, answer_timeout=0.1)
    job = client.submit("a")
    owner.wait_for_loss()
    second = owner.start(on_submit=lambda _: [b"garbage"])
    owner.wait_for_loss(2)
    owner.start()
    assert [str(completion) for completion in job.results()] == ["A"]
    assert "has not answered" in owner.losses[0] and "does not speak this protocol" in owner.losses[1]
    assert first.endpoint in owner.losses[0] and second.endpoint in owner.losses[1]


def test_failed_and_cancelled_requests_are_no_progress(owner: FakeOwner) -> None:
    def reply(submit: Submit) -> list[Any]:
        cancelled = (WireOutput("x", (1,), "stop"), WireOutput("", (), "cancelled"))
        return [
            RequestDone(submit.job_id, r.index, 1, cancelled) if r.index else answer(submit.job_id, r, "too long")
            for r in submit.requests
        ]

    owner.start(on_submit=reply)
    assert len(owner.connect().submit(["a", "b"]).results()) == 2
    assert owner.num_finished == 0
