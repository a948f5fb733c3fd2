"""What a reader of a stream gets where an engine is lost in the middle: each token and each character once."""

from __future__ import annotations

import random

import pytest

from flexgen_lite.client.streamed_answer import StreamedAnswer
from flexgen_lite.wire.client_messages import RequestDelta, WireOutput
from flexgen_lite.wire.sampling import TokenLogprobs

TOKENS = tuple(range(30, 60))
TEXTS = [chr(ord("a") + number % 26) * (number % 4) for number in range(30)]  # some tokens have no text
TEXT = "".join(TEXTS)


def delta(
    text: str, tokens: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...] = (), offsets: tuple[int, ...] = ()
) -> RequestDelta:
    return RequestDelta("job", 0, 0, text, tokens, logprobs, {}, {}, offsets)


def output(text: str, tokens: tuple[int, ...], reason: str) -> WireOutput:
    return WireOutput(text, tokens, reason)


def tell(draw: random.Random, num_tokens: int) -> list[RequestDelta]:
    """As an engine may tell so many tokens: some at a time, with texts that lag behind."""
    deltas, told, characters = [], 0, 0
    while told < num_tokens:
        more = min(num_tokens - told, draw.randrange(1, 4))
        ready = max(characters, len("".join(TEXTS[: told + more])) - draw.randrange(3))
        tokens = TOKENS[told : told + more]
        logprobs = tuple(TokenLogprobs(-0.1 * token, 1, ()) for token in tokens)
        offsets = tuple(range(told, told + more))
        deltas.append(delta(TEXT[characters:ready], tokens, logprobs, offsets))
        told, characters = told + more, ready
    return deltas


@pytest.mark.parametrize("seed", range(30))
def test_each_token_and_character_once(seed: int) -> None:
    draw = random.Random(seed)
    answer, found = StreamedAnswer(), []
    for _ in range(4):  # engines, one after the other
        found += [answer.rest_of(told) for told in tell(draw, draw.randrange(31))]
        answer.tell_again()
    deltas = [delta for delta in found if delta is not None]
    tokens = [token for delta in deltas for token in delta.token_ids]
    assert tuple(tokens) == TOKENS[: answer.num_tokens]
    assert [found.logprob for delta in deltas for found in delta.logprobs] == [-0.1 * token for token in tokens]
    assert [offset for delta in deltas for offset in delta.offsets] == list(range(len(tokens)))
    assert "".join(delta.text for delta in deltas) == TEXT[: answer.characters]
    assert all(delta.text or delta.token_ids for delta in deltas)
    assert answer.agrees_with(output(TEXT, TOKENS, "length"))


def test_another_answer_is_not_mixed_in() -> None:
    answer = StreamedAnswer()
    assert answer.rest_of(
        delta(
            "ab",
            (
                1,
                2,
            ),
        )
    ) == delta(
        "ab",
        (
            1,
            2,
        ),
    )
    answer.tell_again()
    assert answer.rest_of(delta("a", (1,))) is None
    assert (
        answer.rest_of(
            delta(
                "cd",
                (
                    3,
                    4,
                ),
            )
        )
        is None
    )
    assert answer.rest_of(delta("e", (5,))) is None, "nothing more of it"
    assert not answer.agrees_with(
        output(
            "acde",
            (
                1,
                3,
                4,
                5,
            ),
            "length",
        )
    )


@pytest.mark.parametrize(
    ("whole", "agrees"),
    [
        (
            output(
                "abc",
                (
                    1,
                    2,
                    3,
                ),
                "length",
            ),
            True,
        ),
        (output("a", (1,), "stop"), False),
        (output("a", (1,), "cancelled"), True),
        (output("x", (9,), "cancelled"), False),
    ],
)
def test_the_whole_answer_has_to_begin_with_what_was_told(whole: WireOutput, agrees: bool) -> None:
    answer = StreamedAnswer()
    answer.rest_of(
        delta(
            "ab",
            (
                1,
                2,
            ),
        )
    )
    assert answer.agrees_with(output("", (), "stop")), "of one engine all is taken as it comes"
    answer.tell_again()
    assert answer.agrees_with(whole) == agrees
