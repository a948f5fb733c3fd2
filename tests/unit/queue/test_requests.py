"""Requests on arrival: what is refused, what is clamped, and who gets which answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from flexgen_lite.queue.admission import Limits
from flexgen_lite.queue.batching import Batcher
from flexgen_lite.queue.micro_batch import Result
from flexgen_lite.queue.page_table import PageTable
from flexgen_lite.queue.requests import OVERFLOW, Requests
from flexgen_lite.wire.client_messages import RequestDone, Submit, WireRequest
from flexgen_lite.wire.sampling import NO_TOKEN, Penalties, TokenLogprobs, WireParams
from tests.kv_groups import one_group

PARAMS = WireParams(4, 0, 0.0, 0, 1.0, None, (), True, True)


class Words:
    """A tokenizer of numbers."""

    is_local = True

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, token_ids))

    def has_text(self, token: int, skip_special_tokens: bool) -> bool:
        return True

    def is_special(self, token: int) -> bool:
        return False

    def ends_within_character(self, token_ids: Sequence[int]) -> bool:
        return False

    def token_bytes(self, token: int) -> bytes | None:
        return None


@pytest.fixture
def requests() -> Requests:
    pages = PageTable(16, one_group(8), 1)
    return Requests(Batcher(pages, 4, 2, 32, spread=False), Limits(100, pages.max_tokens(1), 50, (2,)), Words())


def submit(
    requests: Requests, prompt: str | tuple[int, ...], params: WireParams = PARAMS, index: int = 0
) -> str | None:
    answers = requests.submit(b"client", Submit("job", (WireRequest(index, prompt, params),), False))
    return answers[0][1].error if answers else None


@pytest.mark.parametrize(
    ("prompt", "changes", "words"),
    [
        ("", {}, "empty"),
        ((), {}, "empty"),
        ((1, 50), {}, "token id 50 is outside the vocabulary of 50"),
        ((-1,), {}, "token id -1"),
        ((1,) * 100, {}, "100 tokens, the model takes 100"),
        ((1,), {"stop_token_ids": (99,)}, "token id 99"),
        ((1,), {"max_tokens": 0}, "max_tokens=0"),
        ((1,), {"min_tokens": 9}, "min_tokens=9"),
        ((1,), {"temperature": float("nan")}, "temperature=nan"),
        ((1,), {"temperature": -0.5}, "temperature=-0.5"),
        ((1,), {"top_p": float("nan")}, "top_p=nan"),
        ((1,), {"top_p": 0.0}, "top_p=0.0"),
        ((1,), {"top_k": -5}, "top_k=-5"),
        ((1,), {"seed": -1}, "seed=-1"),
        ((1,), {"min_p": float("nan")}, "min_p=nan"),
        ((1,), {"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ((1,), {"presence_penalty": 2.5}, "presence_penalty=2.5"),
        ((1,), {"frequency_penalty": float("nan")}, "frequency_penalty=nan"),
        ((1,), {"logit_bias": ((3, 101.0),)}, "logit_bias=101.0"),
        ((1,), {"logit_bias": ((50, 1.0),)}, "token id 50"),
        ((1,), {"logprobs": 21}, "logprobs=21"),
        ((1,), {"stop": ("",)}, "0 characters"),
        ((1,), {"n": 0}, "n=0"),
        ((1,), {"n": 129}, "n=129"),
        ((1,), {"prompt_logprobs": 21}, "prompt_logprobs=21"),
        ((1,), {"prompt_logprobs": 0, "max_tokens": -1}, "max_tokens=-1"),
        ((1,), {"prompt_logprobs": 0, "scored_from": 0}, "scored_from=0"),
    ],
)
def test_bad_requests_are_refused_one_by_one(
    requests: Requests, prompt: str | tuple[int, ...], changes: dict[str, object], words: str
) -> None:
    error = submit(requests, prompt, replace(PARAMS, **changes))
    assert error is not None
    assert words in error
    assert requests.num_waiting == 0
    assert submit(requests, (1, 2), index=1) is None


def test_more_kv_than_a_worker_has_is_refused_with_the_numbers() -> None:
    pages = PageTable(4, one_group(8), 1)
    requests = Requests(Batcher(pages, 4, 2, 32, spread=False), Limits(100, pages.max_tokens(1), 50, (2,)), None)
    assert "needs 33 tokens of KV cache" in (submit(requests, (1,) * 30) or "")
    assert "no tokenizer" in (submit(requests, "1 2", index=1) or "")


def test_a_request_submitted_again_is_ignored(requests: Requests) -> None:
    assert submit(requests, (1, 2)) is None
    assert submit(requests, (1, 2)) is None
    assert requests.num_waiting == 1


def test_answers_go_to_those_who_asked(requests: Requests) -> None:
    for client in (b"a", b"b"):
        requests.submit(client, Submit("job", (WireRequest(0, (5, 6, 7), replace(PARAMS, max_tokens=1)),), False))
    composed = requests.next_pass()
    answers = requests.end_pass(composed, [Result((8, 9))])
    assert [(client, done.outputs[0].token_ids) for client, done in answers] == [(b"a", (8,)), (b"b", (9,))]
    assert requests.totals["prompt_tokens"] == 6


def test_cancel_drops_waiting_requests_now_and_running_ones_with_the_pass(requests: Requests) -> None:
    for index in range(6):
        submit(requests, (1, 2), index=index)
    composed = requests.next_pass()
    dropped = requests.cancel(b"client", "job")
    assert len(dropped) == 2
    ended = requests.end_pass(composed, [Result((8,) * 4)])
    assert [done.outputs[0].finish_reason for _, done in [*dropped, *ended]] == ["cancelled"] * 6
    assert requests.num_running == requests.num_waiting == 0


def test_a_request_whose_numbers_overflow_fails_alone(requests: Requests) -> None:
    for index in range(2):
        assert submit(requests, (5, 6, 7), PARAMS, index) is None
    answers = requests.end_pass(requests.next_pass(), [Result((NO_TOKEN, 9))])
    assert [(done.index, done.error) for _, done in answers] == [(0, OVERFLOW)]
    for _ in range(3):
        answers = requests.end_pass(requests.next_pass(), [Result((9,))])
    assert [(done.index, done.outputs[0].token_ids, done.error) for _, done in answers] == [(1, (9, 9, 9, 9), None)]
    assert requests.totals["generated_tokens"] == 4
    assert requests.totals["requests_failed"] == 1


def test_a_cancelled_request_does_not_come_back(requests: Requests) -> None:
    assert submit(requests, (5, 6, 7)) is None
    requests.next_pass()
    requests.cancel(b"client", "job")
    assert [done.outputs[0].finish_reason for _, done in requests.drop_cancelled()] == ["cancelled"]
    assert requests.next_pass() == []
    assert requests.num_running == requests.num_waiting == 0


def test_an_endless_text_is_refused_before_it_is_cut_into_tokens(requests: Requests) -> None:
    assert "characters, the model takes 100 tokens" in (submit(requests, "1 " * 20_000) or "")


def test_a_stop_string_ends_the_text_and_logprobs_come_with_it(requests: Requests) -> None:
    params = replace(PARAMS, stop=("7 8",), logprobs=1, max_tokens=9)
    assert submit(requests, "3", params) is None
    for step, token in enumerate((5, 7, 8)):
        composed = requests.next_pass()
        (span,) = composed[0].token_batch(0).spans
        assert span.sample is not None and span.sample.num_logprobs == 1
        found = TokenLogprobs(-0.5 * step, 2, ((9, -0.25),))
        answers = requests.end_pass(composed, [Result((token,), (found,))])
    (_, done) = answers[0]
    (output,) = done.outputs
    assert (output.text, output.token_ids, output.finish_reason) == (" 5 ", (5, 7, 8), "stop")
    assert [place.logprob for place in output.logprobs] == [0.0, -0.5, -1.0]
    assert done.token_texts.keys() == {5, 7, 8, 9}
    assert output.offsets == (0, 2, 3), "the string's tokens begin at the end of the text"


def test_penalties_know_the_prompt_and_what_was_generated(requests: Requests) -> None:
    assert submit(requests, "3 4 3", replace(PARAMS, repetition_penalty=1.2)) is None
    assert submit(requests, "3 4 3", replace(PARAMS, presence_penalty=0.5), index=1) is None
    assert submit(requests, "3 4 3", index=2) is None
    requests.end_pass(requests.next_pass(), [Result((6, 6, 6))])
    spans = requests.next_pass()[0].token_batch(0).spans
    first, second, third = (span.sample.penalties for span in spans if span.sample is not None)
    assert first == Penalties(1.2, 0.0, 0.0, (3, 4), (6,))
    assert second == Penalties(1.0, 0.5, 0.0, (), (6,))
    assert third is None


def finish(requests: Requests, tokens: dict[int, int]) -> list[RequestDone]:
    """Passes until all is done; a sequence's step k draws `tokens[k]`, token 9 where there is none."""
    done = []
    while requests.num_running or requests.num_waiting:
        composed = requests.next_pass()
        assert composed
        results = []
        for index, micro_batch in enumerate(composed):
            spans = micro_batch.token_batch(index).spans
            drawn = tuple(tokens.get(span.sample.step, 9) for span in spans if span.sample is not None)
            scored = [target for span in spans if span.scored is not None for target in span.scored.targets]
            results.append(Result(drawn, (), tuple(TokenLogprobs(-float(target), 1, ()) for target in scored)))
        done += [answer for _, answer in requests.end_pass(composed, results)]
    return done


def test_several_answers_come_back_as_one_in_their_order(requests: Requests) -> None:
    """There are more sequences than places, and each has a seed of its own."""
    assert submit(requests, "3 4", replace(PARAMS, n=6, seed=10, temperature=1.0, max_tokens=2)) is None
    assert submit(requests, "5", replace(PARAMS, n=1), index=1) is None
    seeds = [span.sample.seed for span in requests.next_pass()[0].token_batch(0).spans if span.sample is not None]
    assert seeds == [10, 11, 12, 13]
    requests.cancel(b"client", None)
    requests.drop_cancelled()
    assert submit(requests, "3 4", replace(PARAMS, n=6, max_tokens=2), index=2) is None
    (done,) = finish(requests, {0: 7})
    assert [output.token_ids for output in done.outputs] == [(7, 9)] * 6
    assert requests.totals["requests_done"] == 1


def test_a_cancelled_request_tells_of_the_answers_that_had_begun(requests: Requests) -> None:
    assert submit(requests, (5, 6), replace(PARAMS, n=100)) is None
    composed = requests.next_pass()
    requests.cancel(b"client", "job")
    ((_, done),) = requests.end_pass(composed, [Result((8,) * 4)])
    assert [output.finish_reason for output in done.outputs] == ["cancelled"] * 5  # the fifth waited
    assert requests.num_running == requests.num_waiting == 0


def test_one_answer_that_fails_fails_the_request(requests: Requests) -> None:
    assert submit(requests, (5, 6), replace(PARAMS, n=6)) is None
    answers = requests.end_pass(requests.next_pass(), [Result((8, NO_TOKEN, 8, 8))])
    assert [done.error for _, done in answers] == [OVERFLOW]
    assert requests.num_running == requests.num_waiting == 0
    assert submit(requests, (5,), replace(PARAMS, max_tokens=1), index=1) is None
    assert len(finish(requests, {})) == 1


def test_logprobs_of_a_prompt_that_comes_in_chunks(requests: Requests) -> None:
    """70 rows in micro-batches of 32; then of a continuation alone, without a token generated."""
    prompt = tuple(range(1, 36)) * 2
    assert submit(requests, prompt, replace(PARAMS, prompt_logprobs=0, max_tokens=1)) is None
    (done,) = finish(requests, {})
    assert done.prompt is not None and done.prompt.token_ids == prompt
    assert [found.logprob for found in done.prompt.logprobs] == [-float(token) for token in prompt[1:]]
    scored = replace(PARAMS, prompt_logprobs=0, max_tokens=0, scored_from=60)
    assert submit(requests, prompt, scored, index=1) is None
    (done,) = finish(requests, {})
    assert done.prompt is not None and done.outputs[0].token_ids == ()
    assert [found.logprob for found in done.prompt.logprobs] == [-float(token) for token in prompt[60:]]
    assert done.outputs[0].finish_reason == "length"


def test_a_prompt_of_one_token_has_no_logprob(requests: Requests) -> None:
    message = Submit("job", (WireRequest(0, (5,), replace(PARAMS, prompt_logprobs=0, max_tokens=0)),), False)
    ((_, done),) = requests.submit(b"client", message)
    assert done.error is None and done.prompt is not None and done.prompt.logprobs == ()
    assert requests.num_waiting == 0


def test_a_prompt_that_was_scored_in_part_has_no_logprobs(requests: Requests) -> None:
    """Those that there are would be taken for others' ."""
    assert submit(requests, tuple(range(1, 36)) * 2, replace(PARAMS, prompt_logprobs=0, max_tokens=0)) is None
    composed = requests.next_pass()
    requests.cancel(b"client", "job")
    num_scored = sum(len(p.scored.targets) for m in composed for p in m.pieces if p.scored)
    results = [Result((), (), (TokenLogprobs(-1.0, 1, ()),) * num_scored)]
    ((_, done),) = requests.end_pass(composed, results)
    assert isinstance(done, RequestDone)
    assert done.outputs[0].finish_reason == "cancelled"
    assert done.prompt is not None and done.prompt.logprobs == ()


def test_several_answers_without_a_token(requests: Requests) -> None:
    none = replace(PARAMS, prompt_logprobs=0, max_tokens=0, n=3)
    answers = requests.submit(b"client", Submit("job", (WireRequest(0, (5,), none),), False))
    assert [len(done.outputs) for _, done in answers] == [3]


def test_a_reader_who_stands_still_gets_the_rest_at_the_end(
    requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexgen_lite.queue.client_jobs.MAX_UNREAD_DELTAS", 2)
    params = replace(PARAMS, max_tokens=6, stop=())
    requests.submit(b"client", Submit("job", (WireRequest(0, (5, 6, 7), params, stream=True),), False))
    told = []
    for number in range(6):
        requests.deltas_read(b"client", -5)
        requests.deltas_read(b"another", 5)
        if number == 4:
            requests.deltas_read(b"client", 1)
        told.append([m for _, m in requests.end_pass(requests.next_pass(), [Result((10 + number,))])])
    assert [len(messages) for messages in told] == [1, 1, 0, 0, 1, 1]
    assert told[4][0].token_ids == (12, 13, 14), "all that has come since"
    assert told[5][0].outputs[0].token_ids == tuple(range(10, 16))
    requests.deltas_read(b"client", 100)
    assert not requests._jobs._unread


@pytest.mark.parametrize("is_gone", [False, True])
def test_the_id_of_a_kept_job_that_is_cancelled_while_it_runs_is_free(requests: Requests, is_gone: bool) -> None:
    assert requests.submit(b"a", Submit("job", (WireRequest(0, (5, 6, 7), PARAMS),), True)) == []
    composed = requests.next_pass()
    if is_gone:
        requests.forget(b"a")
    told = [(client, done.outputs[0].finish_reason) for client, done in requests.cancel(b"b", "job")]
    assert told == ([] if is_gone else [(b"a", "cancelled")])
    another = Submit("job", (WireRequest(0, (8, 9), replace(PARAMS, max_tokens=1)),), True)
    assert requests.submit(b"b", another) == []
    assert requests.end_pass(composed, [Result((8,))]) == []
    ((client, done),) = requests.end_pass(requests.next_pass(), [Result((8,))])
    assert (client, done.outputs[0].token_ids) == (b"b", (8,))
    assert requests.submit(b"c", another) == [(b"c", done)], "and kept"
    assert not requests._jobs._num_open and not requests.num_running


def test_scores_say_nothing_of_how_long_answers_are(requests: Requests) -> None:
    for index in range(400):
        submit(requests, (5, 6), replace(PARAMS, prompt_logprobs=0, max_tokens=0), index)
        composed = requests.next_pass()
        requests.end_pass(composed, [Result((), (), (TokenLogprobs(-1.0, 1, ()),))])
    assert requests._batcher.expected_life.share == 1.0


def test_logprobs_that_are_no_numbers_fail_the_request(requests: Requests) -> None:
    assert submit(requests, (5, 6), replace(PARAMS, prompt_logprobs=0)) is None
    nan = TokenLogprobs(float("nan"), 1, ())
    answers = requests.end_pass(requests.next_pass(), [Result((8,), (), (nan,))])
    assert [done.error for _, done in answers] == [OVERFLOW]


def test_clients_share_places_and_priorities_come_first() -> None:
    pages = PageTable(64, one_group(8), 1)
    requests = Requests(Batcher(pages, 4, 2, 32, spread=False), Limits(100, pages.max_tokens(1), 50, (2,)), Words())

    def send(client: bytes, index: int, priority: int) -> None:
        request = WireRequest(index, (index + 3, 4), replace(PARAMS, max_tokens=1))
        requests.submit(client, Submit(f"job {priority}", (request,), False, priority))

    for index in range(20):
        send(b"greedy", index, 0)
    for index in range(4):
        send(b"modest", index, 0)
    send(b"late", 0, -1)
    order = []
    while requests.num_waiting or requests.num_running:
        composed = requests.next_pass()
        count = sum(len(micro_batch.pieces) for micro_batch in composed)
        order.append([client for client, _ in requests.end_pass(composed, [Result((9,) * count)])])
    assert sorted(order[0]) == [b"greedy", b"greedy", b"late", b"modest"]
    assert [passed.count(b"modest") for passed in order[1:3]] == [2, 1]
    assert sum(passed.count(b"greedy") for passed in order) == 20


def test_a_cancelled_job_frees_its_pages_with_the_end_of_the_pass() -> None:
    pages = PageTable(16, one_group(8), 1)
    requests = Requests(Batcher(pages, 8, 2, 32, spread=False), Limits(100, pages.max_tokens(1), 50, (2,)), None)
    for job in ("kept", "dropped"):
        request = WireRequest(0, (5 + len(job),) * 20, PARAMS)
        requests.submit(b"client", Submit(job, (request,), False))
    composed = requests.next_pass()
    used = pages.used_pages
    requests.cancel(b"client", "dropped")
    assert pages.used_pages == used, "the pass still reads and writes them"
    requests.end_pass(composed, [Result((8,) * len(m.pieces)) for m in composed])
    assert 0 < pages.used_pages < used
    requests.cancel(b"client", "kept")
    requests.drop_cancelled()
    assert pages.used_pages == 0
