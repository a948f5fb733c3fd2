"""Answers in the form of the OpenAI API."""

from __future__ import annotations

import json

from flexgen_lite.client.completion import Delta, Logprob
from flexgen_lite.http.generate import _Sse
from flexgen_lite.openai.request_body import CHAT, COMPLETIONS, parse_body
from flexgen_lite.openai.response_body import chat_logprobs

PLACE = {7: Logprob(-3.0, 9, "x"), 1: Logprob(-0.1, 1, "a"), 2: Logprob(-0.2, 2, "b")}


def test_as_many_top_logprobs_as_were_asked_for() -> None:
    """The drawn token, which may not be among them, has its own entry."""
    for asked, expected in ((None, []), (0, []), (2, ["a", "b"])):
        found = chat_logprobs([7], [PLACE], asked, {})
        assert found is not None
        (entry,) = found["content"]
        assert entry["token"] == "x"
        assert [top["token"] for top in entry["top_logprobs"]] == expected
    assert chat_logprobs([7], None, 2, {}) is None


def test_text_offsets_are_those_of_the_answer_in_a_stream() -> None:
    body = parse_body(COMPLETIONS, {"prompt": "p", "logprobs": 1})
    place = {5: Logprob(-1.0, 1, "abc")}
    delta = Delta(0, 0, "abcabc", [5, 5], [place, place], text_offsets=[6, 9])
    (choice,) = _Sse(COMPLETIONS, [body], "m", False)._choices(delta)
    assert choice["logprobs"]["text_offset"] == [6, 9]


def test_a_chat_says_its_role_first() -> None:
    sse = _Sse(CHAT, [parse_body(CHAT, {"messages": [{"role": "user", "content": "x"}]})], "m", False)
    choices = [choice for text in ("a", "b") for choice in sse._choices(Delta(0, 0, text, [1], None))]
    assert [choice["delta"].get("role") for choice in choices] == ["assistant", None, None]
    assert json.dumps(choices)
