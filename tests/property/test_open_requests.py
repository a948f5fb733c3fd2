"""Requests in front of several engines that are lost, told to give back, and slow: each is answered once, and nothing
of an answer is told twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random

from hypothesis import example, given
from hypothesis import strategies as st

from flexgen_lite.dispatch.open_requests import MORE, MOST_LOSSES, OpenRequests, Order
from flexgen_lite.queue.client_jobs import Answer
from flexgen_lite.wire.client_messages import Cancel, RequestDelta, RequestDone, Submit, WireOutput, WireRequest
from flexgen_lite.wire.sampling import WireParams

TOKENS = 6  # of an answer
Name = tuple[bytes, str, int]


def request(index: int, stream: bool, num_answers: int = 1, temperature: float = 0.0) -> WireRequest:
    params = WireParams(TOKENS, 0, temperature, 0, 1.0, None, (), False, True, n=num_answers)
    return WireRequest(index, (7, 8, index), params, stream=stream)


def answer_to(asked: WireRequest, number: int) -> tuple[int, ...]:
    """The same from any engine, as the seed is the request's."""
    first = 1000 * asked.prompt[2] + 100 * number + (asked.params.seed or 0) % 50  # type: ignore[operator]
    return tuple(range(first, first + TOKENS))


@dataclass
class Running:
    asked: WireRequest
    told: Counter[int] = field(default_factory=Counter)
    cancelled: bool = False


class Engines:
    """What each was sent, and what it does with it."""

    def __init__(self) -> None:
        self.jobs: dict[int, dict[str, Running]] = {}
        self.seen: set[tuple[int, str]] = set()

    def take(self, orders: Iterable[Order]) -> None:
        for number, message in orders:
            if isinstance(message, Cancel):
                self.jobs[number][message.job_id].cancelled = True
                continue
            (asked,) = message.requests
            assert (number, message.job_id) not in self.seen, "an engine ignores a job that it has seen"
            self.seen.add((number, message.job_id))
            self.jobs[number][message.job_id] = Running(asked)

    def next_message(self, number: int, random: Random) -> RequestDelta | RequestDone | None:
        if not self.jobs[number]:
            return None
        job_id = random.choice([*self.jobs[number]])
        job = self.jobs[number][job_id]
        if job.asked.stream and not job.cancelled and random.random() < 0.6:
            answer = random.randrange(job.asked.params.n)
            first = job.told[answer]
            more = answer_to(job.asked, answer)[first : first + random.randrange(1, 3)]
            job.told[answer] += len(more)
            if not more:
                return None
            return RequestDelta(job_id, 0, answer, "x" * len(more), more, (), {})
        del self.jobs[number][job_id]
        reason = "cancelled" if job.cancelled and random.random() < 0.8 else "length"
        answers = [answer_to(job.asked, answer) for answer in range(job.asked.params.n)]
        if reason == "cancelled":
            answers = [tokens[: job.told[answer]] for answer, tokens in enumerate(answers)]
        return RequestDone(job_id, 0, 3, tuple(WireOutput("x" * len(one), one, reason) for one in answers))


class Clients:
    """What they were told."""

    def __init__(self) -> None:
        self.asked: dict[Name, WireRequest] = {}
        self.told: dict[tuple[Name, int], tuple[int, ...]] = {}
        self.done: dict[Name, RequestDone] = {}
        self.gone: set[bytes] = set()

    def take(self, answers: Iterable[Answer]) -> None:
        for client, message in answers:
            name = client, message.job_id, message.index
            assert name in self.asked and name not in self.done, "told to somebody else, or twice"
            if isinstance(message, RequestDelta):
                told = self.told.get((name, message.number), ()) + message.token_ids
                assert message.token_ids and len(message.text) == len(message.token_ids)
                self.told[name, message.number] = told
            else:
                self.done[name] = message
                for number, output in enumerate(message.outputs):
                    told = self.told.get((name, number), ())
                    if output.finish_reason != "cancelled":
                        assert output.token_ids[: len(told)] == told, "the rest comes from the whole"
                        assert len(output.token_ids) == TOKENS


@example(num_engines=3, places=3, steps=101, losses=0.1, random=Random(85987))  # a suspect that is moved
@given(
    num_engines=st.integers(1, 3),
    places=st.integers(1, 3),
    steps=st.integers(1, 300),
    losses=st.sampled_from([0.0, 0.02, 0.1]),
    random=st.integers(0, 2**32).map(Random),
)
def test_each_request_is_answered_once(
    num_engines: int, places: int, steps: int, losses: float, random: Random
) -> None:
    requests, engines, clients = OpenRequests(10_000), Engines(), Clients()
    names = [b"a", b"b"]
    indices: Counter[tuple[bytes, str]] = Counter()
    for number in range(num_engines):
        engines.jobs[number] = {}
        requests.engine_ready(number, places)
    for step in range(steps):
        client = random.choice(names)
        chance = random.random()
        if chance < 0.2:
            job = random.choice("jk")
            first = indices[client, job]
            part = tuple(
                request(first + n, random.random() < 0.4, random.choice([1, 1, 2]), random.choice([0.0, 0.9]))
                for n in range(random.randrange(1, 6))
            )
            indices[client, job] += len(part)
            clients.asked |= {(client, job, one.index): one for one in part}
            message = Submit(job, part, False, random.choice([0, 0, 1]))
            clients.take(requests.submit(client, message))
            assert requests.submit(client, message) == [], "repeated ones are ignored"
        elif chance < 0.23:
            answers, orders = requests.cancel(client, random.choice("jk"))
            clients.take(answers)
            engines.take(orders)
        elif chance < 0.23 + losses:
            lost = random.choice([*engines.jobs])
            engines.jobs[lost] = {}
            clients.take(requests.engine_lost(lost, "it died"))
            if random.random() < 0.7:
                engines.take(requests.share_out())  # to the others
            requests.engine_ready(lost, places)
        elif chance < 0.4:
            running = {n: min(places, len(jobs)) for n, jobs in engines.jobs.items()}
            engines.take(requests.even_out({n: len(engines.jobs[n]) - running[n] for n in running}))
        else:
            work(requests, engines, clients, random)
        engines.take(requests.share_out())
        check(requests, engines, places, step)
    while requests.num_sent or requests.num_waiting:
        work(requests, engines, clients, random)
        engines.take(requests.share_out())
    assert clients.done.keys() == clients.asked.keys()
    kinds = Counter(
        "failed" if done.error else "cancelled" if "cancelled" in [o.finish_reason for o in done.outputs] else "done"
        for done in clients.done.values()
    )
    assert dict(requests.totals) == {f"requests_{kind}": kinds[kind] for kind in ("done", "failed", "cancelled")}
    assert losses or not kinds["failed"]
    assert all("engines were lost while" in (done.error or "engines were lost while") for done in clients.done.values())
    assert not requests._open and not requests._jobs._num_open


def work(requests: OpenRequests, engines: Engines, clients: Clients, random: Random) -> None:
    number = random.choice([*engines.jobs])
    message = engines.next_message(number, random)
    if isinstance(message, RequestDelta):
        clients.take(requests.delta(number, message))
        if random.random() < 0.8:
            requests.deltas_read(b"a", 1)
    elif message is not None:
        clients.take(requests.done(number, message))


def check(requests: OpenRequests, engines: Engines, places: int, step: int) -> None:
    at_engines = [one for engine in requests._engines.values() for one in engine.sent.values()]
    assert len(set(at_engines)) == len(at_engines), "no engine has what another one has"
    assert {n: {*engine.sent} for n, engine in requests._engines.items()} == {n: {*e} for n, e in engines.jobs.items()}
    for engine in requests._engines.values():
        assert engine.load == sum(one.num_sequences for one in engine.sent.values())
        assert engine.load < 2 * places + 2 * MORE + 2
        assert sum(one.losses == MOST_LOSSES - 1 for one in engine.sent.values()) <= 1, "one suspect at a time"
    if len(requests._waiting):
        assert all(engine.load >= 2 * places + MORE for engine in requests._engines.values()), f"idle in step {step}"
