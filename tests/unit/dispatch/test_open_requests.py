"""One queue in front of several engines: who gets what, in which order, and what is taken back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexgen_lite.dispatch.open_requests import MORE, MOST_LOSSES, OpenRequests, Order
from flexgen_lite.wire.client_messages import Cancel, RequestDelta, RequestDone, Submit, WireOutput, WireRequest
from flexgen_lite.wire.sampling import WireParams

PARAMS = WireParams(4, 0, 0.0, 0, 1.0, None, (), False, True)


def part(count: int, first: int = 0, stream: bool = False, params: WireParams = PARAMS) -> tuple[WireRequest, ...]:
    return tuple(WireRequest(first + n, (5, first + n), params, stream=stream) for n in range(count))


def sent(orders: list[Order]) -> dict[int, list[int]]:
    """By engine, the requests by their prompts."""
    found: dict[int, list[int]] = {}
    for number, message in orders:
        assert isinstance(message, Submit)
        found.setdefault(number, []).append(message.requests[0].prompt[1])  # type: ignore[arg-type]
    return found


def done(orders: list[Order], prompt: int, reason: str = "length") -> RequestDone:
    """What the engine answers that was sent this one."""
    (job_id,) = [m.job_id for _, m in orders if isinstance(m, Submit) and m.requests[0].prompt[1] == prompt]
    return RequestDone(job_id, 0, 2, (WireOutput("", () if reason == "cancelled" else (1, 2), reason),))


@pytest.fixture
def requests() -> OpenRequests:
    return OpenRequests(4096)


def with_engines(requests: OpenRequests, count: int, places: int) -> None:
    for number in range(count):
        requests.engine_ready(number, places)


def test_engines_get_as_much_as_they_can_run_and_as_much_again(requests: OpenRequests) -> None:
    requests.submit(b"c", Submit("job", part(100), False))
    assert requests.share_out() == [] and requests.num_waiting == 100
    with_engines(requests, 2, 4)
    orders = requests.share_out()
    each = 2 * 4 + MORE
    assert sent(orders) == {0: [*range(0, 2 * each, 2)], 1: [*range(1, 2 * each, 2)]}, "in turns"
    assert requests.num_waiting == 100 - 2 * each and requests.num_at(0) == each
    ((client, answer),) = requests.done(1, done(orders, 3))
    assert (client, answer.job_id, answer.index) == (b"c", "job", 3)
    assert sent(requests.share_out()) == {1: [2 * each]}, "who has room gets the next"
    assert requests.done(1, done(orders, 3)) == [], "not known any more"


def test_what_is_urgent_comes_first_and_finds_room(requests: OpenRequests) -> None:
    with_engines(requests, 1, 4)
    requests.submit(b"batch", Submit("job", part(100), False, 1))
    requests.share_out()
    requests.submit(b"chat", Submit("job", part(1, 500), False, 0))
    ((_, order),) = requests.share_out()
    assert isinstance(order, Submit) and order.priority == 0 and order.requests[0].prompt == (5, 500)


def test_clients_share_the_queue(requests: OpenRequests) -> None:
    requests.submit(b"a", Submit("job", part(100), False))
    requests.submit(b"b", Submit("job", part(2, 500), False))
    with_engines(requests, 1, 1)
    assert sent(requests.share_out())[0][:4] == [0, 500, 1, 501]


def test_requests_of_several_answers_count_as_these(requests: OpenRequests) -> None:
    requests.submit(b"a", Submit("job", part(10, params=replace(PARAMS, n=8)), False))
    with_engines(requests, 1, 8)
    assert len(requests.share_out()) == (2 * 8 + MORE) // 8


def test_a_lost_engine_leaves_its_requests_to_the_others_before_all_others(requests: OpenRequests) -> None:
    requests.submit(b"c", Submit("job", part(100), False))
    with_engines(requests, 2, 1)
    first = sent(requests.share_out())
    assert requests.engine_lost(0, "it died") == []
    assert requests.share_out() == [], "the other one is full"
    requests.engine_ready(0, 1)
    assert sent(requests.share_out())[0] == first[0], "in their order"


def test_a_request_that_ends_engines_ends(requests: OpenRequests) -> None:
    with_engines(requests, 1, 4)
    requests.submit(b"c", Submit("job", part(3), False))
    ended = {}
    for loss in range(1, 20):
        orders = sent(requests.share_out())
        assert loss < MOST_LOSSES or len(orders[0]) == 1, "suspects come one at a time"
        answers = requests.engine_lost(0, "it died of this")
        ended |= {message.index: message.error for _, message in answers}  # type: ignore[union-attr]
        requests.engine_ready(0, 4)
        if len(ended) == 1:
            break
    assert ended == {0: "3 engines were lost while they had this request, which may be why; the last: it died of this"}
    orders = requests.share_out()
    assert sent(orders) == {0: [1]}
    assert len(requests.done(0, done(orders, 1))) == 1
    assert sent(requests.share_out()) == {0: [2]}
    assert requests.totals["requests_failed"] == 1


def test_who_has_nothing_to_do_gets_what_waits_elsewhere(requests: OpenRequests) -> None:
    with_engines(requests, 1, 4)
    requests.submit(b"c", Submit("job", part(10), False))
    orders = requests.share_out()
    requests.engine_ready(1, 4)
    assert requests.is_uneven
    back = requests.even_out({0: 6, 1: 0})
    assert [message.job_id for _, message in back] == [m.job_id for _, m in orders[:-5:-1]], "the last four"
    assert requests.even_out({0: 6, 1: 0}) == [], "one after the other"
    for prompt in (9, 8, 7):
        assert requests.done(0, done(orders, prompt, "cancelled")) == []
    assert len(requests.done(0, done(orders, 6))) == 1, "it was done already"
    moved = requests.share_out()
    assert sent(moved) == {1: [7, 8, 9]}
    assert len(requests.even_out({0: 2, 1: 0})) == 1, "half of the difference"
    for prompt in range(6):
        requests.done(0, done(orders, prompt))
    assert requests.even_out({0: 0, 1: 3}) == [], "nothing is moved twice"


def test_what_a_reader_was_told_of_stays_where_it_is(requests: OpenRequests) -> None:
    with_engines(requests, 1, 1)
    requests.submit(b"c", Submit("job", part(4, stream=True), False))
    orders = requests.share_out()
    for _, message in orders[1:]:
        assert isinstance(message, Submit)
        assert requests.delta(0, RequestDelta(message.job_id, 0, 0, "x", (1,), (), {}))
    requests.engine_ready(1, 4)
    assert [message.job_id for _, message in requests.even_out({0: 3, 1: 0})] == [orders[0][1].job_id]


def test_deltas_are_the_clients_and_come_once(requests: OpenRequests) -> None:
    with_engines(requests, 1, 4)
    requests.submit(b"c", Submit("job", part(1, 3, stream=True), False))
    for tokens in ((1, 2), (1, 2, 3)):
        ((_, order),) = requests.share_out()
        assert isinstance(order, Submit)
        told = requests.delta(0, RequestDelta(order.job_id, 0, 0, "x" * len(tokens), tokens, (), {}))
        new = tokens if tokens == (1, 2) else (3,)
        assert told == [(b"c", RequestDelta("job", 3, 0, "x" * len(new), new, (), {}))]
        if tokens == (1, 2):
            requests.engine_lost(0, "it died")
            requests.engine_ready(0, 4)
    ((_, answer),) = requests.done(0, RequestDone(order.job_id, 0, 2, (WireOutput("abc", (1, 9, 3), "length"),)))
    assert isinstance(answer, RequestDone) and "came to a different answer" in (answer.error or "")


def test_a_client_that_does_not_read_is_told_later(requests: OpenRequests, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexgen_lite.queue.client_jobs.MAX_UNREAD_DELTAS", 1)
    with_engines(requests, 1, 4)
    requests.submit(b"c", Submit("job", part(1, stream=True), False))
    ((_, order),) = requests.share_out()
    assert isinstance(order, Submit)
    told = []
    for token in range(4):
        if token == 3:
            requests.deltas_read(b"c", 1)
        told += requests.delta(0, RequestDelta(order.job_id, 0, 0, str(token), (token,), (), {token: "t"}))
    assert [message.token_ids for _, message in told] == [(0,), (1, 2, 3)]  # type: ignore[union-attr]
    assert told[1][1].text == "123" and told[1][1].token_texts == {1: "t", 2: "t", 3: "t"}  # type: ignore[union-attr]


def test_a_cancelled_job(requests: OpenRequests) -> None:
    with_engines(requests, 1, 1)
    requests.submit(b"c", Submit("job", part(20), False))
    requests.submit(b"c", Submit("other", part(1, 50), False))
    orders = requests.share_out()
    answers, cancels = requests.cancel(b"c", "job")
    assert len(answers) + len(cancels) == 20 and all(isinstance(message, Cancel) for _, message in cancels)
    assert [message.outputs[0].finish_reason for _, message in answers] == ["cancelled"] * len(answers)  # type: ignore[union-attr]
    assert requests.cancel(b"c", "job") == ([], []), "once is enough"
    assert len(requests.done(0, done(orders, 0, "cancelled"))) == 1, "and is not sent again"
    assert len(requests.engine_lost(0, "it died")) == len(cancels) - 1, "what was cancelled there is over"
    requests.engine_ready(0, 1)
    assert sent(requests.share_out()) == {0: [50]}


def test_a_kept_job_over_its_clients_leaving(requests: OpenRequests) -> None:
    with_engines(requests, 1, 8)
    job = Submit("job", part(3, params=replace(PARAMS, temperature=0.9)), True)
    assert requests.submit(b"a", job) == []
    orders = requests.share_out()
    seeds = [m.requests[0].params.seed for _, m in orders if isinstance(m, Submit)]
    assert None not in seeds and len({*seeds}) == 3, "drawn here, the same for any engine"
    assert requests.forget(b"a") == []
    assert requests.done(0, done(orders, 0)) == [], "nobody is there"
    ((client, answer),) = requests.submit(b"b", job)
    assert (client, answer.index) == (b"b", 0) and isinstance(answer, RequestDone)
    assert requests.done(0, done(orders, 1))[0][0] == b"b"
    answers, cancels = requests.cancel(b"b", "job")
    assert [answer.index for _, answer in answers] == [2] and len(cancels) == 1, "at once: its id is free"
    assert requests.submit(b"c", Submit("job", part(1, params=PARAMS), True)) == []
    assert requests.done(0, done(orders, 2, "cancelled")) == []
    again = requests.share_out()
    assert requests.done(0, done(again, 0))[0][0] == b"c"


def test_token_ids_beyond_any_vocabulary_reach_the_engine_that_refuses_them(requests: OpenRequests) -> None:
    with_engines(requests, 1, 1)
    requests.submit(b"c", Submit("job", (WireRequest(0, (5, 1 << 40), PARAMS), WireRequest(1, "text", PARAMS)), False))
    assert [m.requests[0].prompt for _, m in requests.share_out() if isinstance(m, Submit)] == [(5, 1 << 40), "text"]


def test_a_client_that_is_gone(requests: OpenRequests) -> None:
    with_engines(requests, 1, 1)
    requests.submit(b"c", Submit("job", part(20), False))
    orders = requests.share_out()
    assert requests.clients() == {b"c"}
    assert len(requests.forget(b"c")) == len(orders)
    assert requests.clients() == set() and requests.num_waiting == 0


def test_too_many(requests: OpenRequests) -> None:
    few = OpenRequests(2)
    ((_, answer),) = few.submit(b"c", Submit("job", part(3), False))
    assert isinstance(answer, RequestDone) and answer.index == 2
    assert answer.error == "2 requests are open already, 2 allowed: wait for results first"
    assert few.totals["requests_failed"] == 1
