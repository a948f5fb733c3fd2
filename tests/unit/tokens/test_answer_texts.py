"""Texts, offsets, logprobs and streams of requests, from their prompts to the bodies of their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from flexgen_lite.client.completion import Completion, Delta
from flexgen_lite.client.completion_of import completion_of, delta_of, last_deltas
from flexgen_lite.client.request import Request
from flexgen_lite.http.generate import _Sse
from flexgen_lite.openai.request_body import CHAT, COMPLETIONS, Body, parse_body
from flexgen_lite.openai.response_body import response_body
from flexgen_lite.queue.admission import Limits
from flexgen_lite.queue.batching import Batcher
from flexgen_lite.queue.micro_batch import Result
from flexgen_lite.queue.page_table import PageTable
from flexgen_lite.queue.requests import Requests
from flexgen_lite.tokens.tokenizer import TextTokenizer
from flexgen_lite.wire.client_messages import RequestDelta, RequestDone, Submit
from flexgen_lite.wire.sampling import TokenLogprobs
from tests.built_tokenizers import built_tokenizer, ids
from tests.kv_groups import one_group

LLAMA = built_tokenizer("llama")
EOS = ids(LLAMA, "</s>")[0]
BYTES_THEN_DOTS = [*"龘龗龖龕".encode(), *ids(LLAMA, ".", ".", ".")]


@dataclass(frozen=True)
class Answered:
    """What came of a request: `deltas` if it was streamed, without what the completion adds to them."""

    completion: Completion
    deltas: list[Delta]
    body: Body
    url: str

    @property
    def choice(self) -> dict[str, Any]:
        choice: dict[str, Any] = response_body(self.body, self.completion, "m")["choices"][0]
        return choice

    @property
    def streamed(self) -> list[dict[str, Any]]:
        """The choices of the chunks."""
        told = sum(len(delta.text) for delta in self.deltas), sum(len(delta.token_ids) for delta in self.deltas)
        sse = _Sse(self.url, [self.body], "m", False)
        deltas = [*self.deltas, *last_deltas(self.completion, {0: told})]
        return [choice for delta in deltas for choice in sse._choices(delta)]


def ask(
    body: dict[str, Any],
    answer: Sequence[int],
    tokenizer: TextTokenizer = LLAMA,
    top: Sequence[tuple[int, float]] = (),
    url: str = COMPLETIONS,
    prompt: Any = None,
) -> Answered:
    """A request, answered with these tokens as far as it goes on; each has the logprob of -1.

    Args:
        prompt: of a chat, as its template has made it.
    """
    parsed = parse_body(url, dict(body))
    pages = PageTable(64, one_group(8), 1)
    limits = Limits(200, pages.max_tokens(1), tokenizer._tokenizer.get_vocab_size(), (EOS,))
    requests = Requests(Batcher(pages, 4, 2, 64, spread=False), limits, tokenizer)
    params = replace(parsed.params, temperature=0.0)
    wire = Request(prompt or parsed.prompt, params, echo=parsed.echo, stream=True).to_wire(0)
    assert requests.submit(b"client", Submit("job", (wire,), False)) == []
    deltas: list[Delta] = []
    left = list(answer)
    while True:
        composed = requests.next_pass()
        (piece,) = composed[0].pieces
        scored = piece.scored
        scores = () if scored is None else tuple(_logprobs(wire.params.prompt_logprobs, ()) for _ in scored.targets)
        drawn = (left.pop(0),) if piece.completes and params.max_tokens else ()
        found = () if params.logprobs is None or not drawn else (_logprobs(params.logprobs, top),)
        for _, message in requests.end_pass(composed, [Result(drawn, found, scores)]):
            if isinstance(message, RequestDelta):
                deltas.append(delta_of(message, wire.params))
            else:
                assert isinstance(message, RequestDone) and message.error is None
                return Answered(completion_of(message, parsed.prompt, wire.params), deltas, parsed, url)


def _logprobs(num_top: int | None, top: Sequence[tuple[int, float]]) -> TokenLogprobs:
    others = ((token, -3.0) for token in range(20))
    return TokenLogprobs(-1.0, 21, (*top, *others)[: num_top or 0])


def test_a_stop_string_in_a_run_of_bytes() -> None:
    answered = ask({"prompt": [65], "max_tokens": 13, "stop": ["龕"]}, BYTES_THEN_DOTS)
    assert (answered.completion.text, answered.completion.finish_reason) == ("龘龗龖", "stop")
    assert len(answered.completion.token_ids) == 12
    assert "".join(choice["text"] for choice in answered.streamed) == "龘龗龖"


@pytest.mark.parametrize("with_stop", [False, True])
def test_a_text_that_ends_within_a_character(with_stop: bool) -> None:
    stop = {"stop": ["nowhere"]} if with_stop else {}
    answered = ask({"prompt": [65], "max_tokens": 6, **stop}, list("😀😀".encode()))
    assert answered.completion.text == "".join(choice["text"] for choice in answered.streamed) == "😀\ufffd"


@pytest.mark.parametrize("extra", [{}, {"echo": True}, {"echo": True, "logprobs": 1}])
@pytest.mark.parametrize("kind", ["llama", "metaspace"])
def test_the_answer_follows_its_prompt(kind: str, extra: dict[str, Any]) -> None:
    tokenizer = built_tokenizer(kind)
    answer = ids(tokenizer, "\u2581it", "'", "s")
    answered = ask({"prompt": "The sky is", "max_tokens": 3, **extra}, answer, tokenizer)
    assert answered.choice["text"] == ("The sky is it's" if extra else " it's")
    if "logprobs" in extra:
        found = answered.choice["logprobs"]
        assert found["text_offset"] == [0, 0, 3, 7, 10, 13, 14], "the first is <s>, which is not in the text"
        assert found["tokens"] == ["<s>", " The", " sky", " is", " it", "'", "s"]


@pytest.mark.parametrize("kind", ["llama", "gemma", "byte_level"])
def test_offsets_behind_characters_of_several_tokens(kind: str) -> None:
    tokenizer = built_tokenizer(kind)
    x = tokenizer.encode("x", False)[-1:] if kind == "byte_level" else [ord("x")]
    prompt = {"prompt": "é😀", "echo": True, "logprobs": 0, "max_tokens": 1}
    answered = ask(prompt, x, tokenizer)
    found = answered.choice["logprobs"]
    assert answered.choice["text"] == "é😀x"
    size = len(found["text_offset"])
    assert found["text_offset"] == [0, *([0] * (size - 6)), 1, 1, 1, 1, 2]


def test_the_decoding_is_echoed_where_offsets_would_not_point_into_the_prompt() -> None:
    """A normaliser has changed it. Without offsets the prompt comes as it was given."""
    tokenizer = built_tokenizer("word_piece")
    answer = ids(tokenizer, "##s")
    body = {"prompt": "The  SKY", "max_tokens": 1, "echo": True}
    assert ask(body, answer, tokenizer).choice["text"] == "The  SKYs"
    choice = ask({**body, "logprobs": 0}, answer, tokenizer).choice
    assert choice["text"] == "the skys"
    assert choice["logprobs"]["text_offset"] == [0, 0, 3, 7]


def test_an_echo_of_token_ids_has_their_special_tokens() -> None:
    prompt = LLAMA.encode("The sky", True)
    choice = ask({"prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": 0}, ids(LLAMA, "\u2581is")).choice
    assert choice["text"] == "<s> The sky is"
    assert choice["logprobs"]["text_offset"] == [0, 3, 7, 11]


def test_all_top_logprobs_come_whatever_their_texts() -> None:
    """The chosen one under the name that `tokens` has."""
    top = [(0xE9, -1.5), (0x80, -2.0), (EOS, -2.25), (65, -2.5), (0xE4, -2.75)]
    choice = ask({"prompt": [65], "max_tokens": 1, "logprobs": 5}, [0xE8], top=top).choice
    assert choice["logprobs"]["tokens"] == ["bytes:\\xe8"]
    assert choice["logprobs"]["top_logprobs"] == [
        {
            "bytes:\\xe8": -1.0, "bytes:\\xe9": -1.5, "bytes:\\x80": -2.0, "</s>": -2.25, "A": -2.5,
            "bytes:\\xe4": -2.75,
        }
    ]  # fmt: skip


def test_tokens_of_the_same_text_are_told_apart_by_their_ids() -> None:
    letter = ids(LLAMA, "s")[0]  # and the byte of it
    assert letter != ord("s")
    top = [(letter, -0.5), (ord("s"), -1.0)]
    choice = ask({"prompt": [65], "max_tokens": 1, "logprobs": 2}, [ord("s")], top=top).choice
    assert choice["logprobs"]["top_logprobs"] == [{"s": -1.0, f"token_id:{letter}": -0.5}]


def test_a_chat_has_the_true_bytes_of_tokens() -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 2, "max_tokens": 2}
    answered = ask(body, list("é".encode()), top=[(0xE9, -0.5), (65, -0.75)], url=CHAT, prompt=[65])
    content = answered.choice["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[0xC3], [0xA9]]
    assert [entry["bytes"] for entry in content[0]["top_logprobs"]] == [[0xE9], [65]]
    chunks = [choice["logprobs"] for choice in answered.streamed if choice["logprobs"] is not None]
    assert [entry for chunk in chunks for entry in chunk["content"]] == content


@pytest.mark.parametrize("stop", [["<|im_end|>"], ["龗"], ["b"]])
def test_a_stream_has_the_offsets_of_the_plain_answer(stop: list[str]) -> None:
    answer = [*"a龘".encode(), EOS - 1, *"b龗c".encode(), *ids(LLAMA, "<|im_end|>", "s"), 66, 66]
    answered = ask({"prompt": [65], "max_tokens": 14, "logprobs": 0, "stop": stop}, answer)
    plain = answered.choice["logprobs"]
    chunks = [choice["logprobs"] for choice in answered.streamed]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [value for chunk in chunks for value in chunk[name]] == plain[name]
    assert "".join(choice["text"] for choice in answered.streamed) == answered.completion.text
    assert answered.completion.finish_reason == "stop"
    assert plain["text_offset"] == sorted(plain["text_offset"])


def test_a_special_token_that_is_skipped_stops_by_its_text() -> None:
    end = ids(LLAMA, "<|im_end|>")[0]
    answered = ask({"prompt": [65], "max_tokens": 9, "stop": ["<|im_end|>"]}, [66, 67, end, 68])
    assert (answered.completion.text, answered.completion.finish_reason) == ("BC", "stop")
    assert answered.completion.token_ids == [66, 67, end]
