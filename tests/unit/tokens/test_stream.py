"""Texts as their tokens come; tests/property/test_text.py compares them with decodings of all tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexgen_lite.tokens.detokenizer import WINDOW_TOKENS
from flexgen_lite.tokens.stream import TextStream
from flexgen_lite.tokens.tokenizer import TextTokenizer
from flexgen_lite.wire.sampling import WireParams
from tests.built_tokenizers import built_tokenizer, ids
from tests.whole_text import PARAMS


def run(
    kind: str, prompt: list[int], answer: list[int], **changes: object
) -> tuple[str, str, int, list[int], TextStream]:
    """(text, what was told before its end, tokens of the answer, offsets, the stream)."""
    params = replace(PARAMS, **changes)
    stream, told, count = TextStream(built_tokenizer(kind), params, len(prompt)), "", 0
    for count in range(1, len(answer) + 1):
        stream.read(prompt + answer[:count])
        if stream.found:
            break
        told += stream.take()[0]
    return stream.finish(), told, count, list(stream.offsets), stream


BYTES_THEN_DOTS = [*"龘龗龖龕".encode(), *ids(built_tokenizer("llama"), ".", ".", ".")]


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_a_stop_string_within_a_run_of_bytes(kind: str) -> None:
    text, told, count, _, stream = run(kind, [65], BYTES_THEN_DOTS, stop=("龕",))
    assert (text, told, count, stream.found) == ("龘龗龖", "龘龗龖", 12, True)


@pytest.mark.parametrize(("kind", "size"), [("llama", 4), ("gemma", 4), ("byte_level", 4)])
def test_a_text_that_is_cut_within_a_character_loses_no_other(kind: str, size: int) -> None:
    tokenizer = built_tokenizer(kind)
    tokens = tokenizer.encode("😀😀", False)[-2 * size :]
    for length, text in ((4, "😀"), (5, "😀\ufffd"), (6, "😀\ufffd"), (7, "😀\ufffd"), (8, "😀😀")):
        found, told, _, _, _ = run(kind, tokenizer.encode("a", False), tokens[:length])
        assert found == text
        assert told == text.removesuffix("\ufffd")


@pytest.mark.parametrize("kind", ["llama", "metaspace"])
def test_an_answer_keeps_the_space_behind_the_prompt(kind: str) -> None:
    tokenizer = built_tokenizer(kind)
    prompt, answer = tokenizer.encode("The sky is", True), ids(tokenizer, "\u2581it", "'", "s")
    assert run(kind, prompt, answer)[0] == " it's"
    assert run(kind, prompt[:1], answer)[0] == "it's", "the beginning of a text has none"
    assert run(kind, prompt[:1], answer, skip_special_tokens=False)[0] == " it's"


def test_the_answer_completes_the_prompts_last_character() -> None:
    smile = list("😀".encode())
    assert run("gemma", [65, *smile[:2]], [*smile[2:], 66])[0] == "😀B"
    assert run("gemma", [65, *smile[:2]], [66])[0] == "\ufffdB"
    assert run("gemma", [*"a\ufffd".encode()], [66])[0] == "B", "a character that was in the prompt"
    assert run("gemma", [65, *smile[:2]], [])[0] == ""


def test_offsets_point_to_what_each_token_added() -> None:
    tokenizer = built_tokenizer("byte_level")
    tokens = tokenizer.encode("é😀x", False)
    assert len(tokens) == 7
    assert run("byte_level", [], tokens, logprobs=0)[3] == [0, 0, 1, 1, 1, 1, 2]
    assert run("llama", [65], [*"é😀x".encode()], logprobs=0)[3] == [0, 0, 1, 1, 1, 1, 2]


def test_skipped_tokens_have_no_extent() -> None:
    tokens = ids(built_tokenizer("llama"), "<s>", "</s>", "<s>")
    text, _, _, offsets, _ = run("llama", [65], tokens, logprobs=0)
    assert (text, offsets) == ("", [0, 0, 0])
    text, _, _, offsets, _ = run("llama", [65], tokens, logprobs=0, skip_special_tokens=False)
    assert (text, offsets) == ("<s></s><s>", [0, 3, 7])


def test_a_broken_character_belongs_to_its_own_token() -> None:
    text, _, _, offsets, _ = run("gemma", [65], [0xF0, 66, 0xE3, 0x81, 0xF0], logprobs=0)
    assert (text, offsets) == ("\ufffdB\ufffd\ufffd", [0, 1, 2, 2, 3])


@pytest.mark.parametrize("kind", ["llama", "byte_level"])
def test_the_text_of_a_skipped_special_token_stops(kind: str) -> None:
    tokenizer = built_tokenizer(kind)
    (end,) = ids(tokenizer, "<|im_end|>")
    words = tokenizer.encode("ab", False)
    for stop, text in (("<|im_end|>", "ab"), ("b<|im", "a"), ("im_end", "ab"), ("|>a", "ab")):
        found, told, count, _, stream = run(kind, words, [*words[-2:], end, *words[-2:]], stop=(stop,))
        assert stream.found and "ab".startswith(told)
        assert found == text
        assert count == (4 if stop == "|>a" else 3)
    shown, *_ = run(kind, words, [*words[-2:], end], stop=("<|im_end|>",), include_stop_str_in_output=True)
    assert shown == "ab<|im_end|>"
    across, *_ = run(kind, words, [words[-2], end, words[-1]], stop=("ab",))
    assert across == "", "the shown text has it too"


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    tokens = list(b"no stop or st")
    stream, told = TextStream(built_tokenizer("gemma"), replace(PARAMS, stop=("stop!", "quite another")), 0), []
    for count in range(1, len(tokens) + 1):
        stream.read(tokens[:count])
        told.append(stream.take()[0])
    assert told == ["n", "o", " ", "", "", "", "", "stop ", "o", "r", " ", "", ""]
    assert stream.finish() == "no stop or st"


def test_tokens_go_with_their_text_where_offsets_are_told() -> None:
    """Their offsets depend on what is held back: with a stop string they begin at the end of the text."""
    tokens = list(b"abstop")
    for logprobs, told in ((None, [1, 2, 3, 4, 5]), (0, [1, 2, 3, 3, 3])):
        stream = TextStream(built_tokenizer("gemma"), replace(PARAMS, stop=("stop",), logprobs=logprobs), 0)
        ends = []
        for count in range(1, len(tokens) + 1):
            stream.read(tokens[:count])
            ends.append(stream.take()[1])
        assert ends[:-1] == told
        assert stream.finish() == "ab"
    assert list(stream.offsets) == [0, 1, 2, 2, 2, 2]


def test_the_token_that_ends_a_sequence_is_no_text() -> None:
    tokenizer = built_tokenizer("llama")
    (end,) = ids(tokenizer, "</s>")
    for skip in (True, False):
        stream = TextStream(tokenizer, replace(PARAMS, logprobs=0, skip_special_tokens=skip), 1)
        stream.read_end([65, 66, 0xF0, end])
        assert (stream.finish(), list(stream.offsets)) == ("B\ufffd", [0, 1, 2])
    stop = replace(PARAMS, stop=("B</s>",), include_stop_str_in_output=True)
    stream = TextStream(tokenizer, stop, 1)
    stream.read_end([65, 66, end])
    assert (stream.found, stream.finish()) == (True, "B</s>")
    stream = TextStream(tokenizer, replace(stop, stop=("x",)), 1)
    stream.read_end([65, 66, end])
    assert (stream.found, stream.finish()) == (False, "B")


def test_a_stop_string_within_min_tokens_ends_nothing() -> None:
    tokens = list(b"ab ab ab ab")
    found = run("gemma", [65], tokens, stop=("ab",), min_tokens=5)
    assert (found[0], found[2]) == ("ab ab ", 8)
    found = run("gemma", [65], tokens, stop=("ab",), min_tokens=4)
    assert (found[0], found[2]) == ("ab ", 5), "a string may begin among them"
    (end,) = ids(built_tokenizer("gemma"), "<|im_end|>")
    found = run("gemma", [65], [end, 66, end, 67], stop=("<|im_end|>",), min_tokens=2)
    assert (found[0], found[2]) == ("B", 3)


def test_another_answer_begins_at_the_same_place() -> None:
    stream = TextStream(built_tokenizer("gemma"), replace(PARAMS, stop=("c",)), 2)
    stream.read(list(b"xxabc"))
    other = stream.afresh()
    other.read(list(b"xxde"))
    assert (stream.finish(), other.take()[0], other.found) == ("ab", "de", False)


def test_a_decoder_that_changes_what_was_there_is_waited_for() -> None:
    """`aba...` becomes `x`: nothing is told before the end, stop strings are looked for in all of it."""
    a, b = ids(built_tokenizer("not_local"), "a", "b")
    text, told, _, _, _ = run("not_local", [b], [a, b, a, b, b])
    assert (text, told) == ("xbb", "")
    text, told, count, _, _ = run("not_local", [b], [a, b, a, b, b, a], stop=("bb",))
    assert (text, told, count) == ("x", "", 5)


class Counting(TextTokenizer):
    """Counts the tokens that it decodes."""

    def __init__(self, inner: TextTokenizer) -> None:
        self.__dict__.update(inner.__dict__)
        self.most = self.num = 0

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        self.most = max(self.most, len(token_ids))
        self.num += len(token_ids)
        return super().decode(token_ids, skip_special_tokens)


@pytest.mark.parametrize(
    "pattern",
    [list(b" one two"), [0xFF], list("ま".encode()), [0xE3], ids(built_tokenizer("llama"), "<s>", "</s>", "\u2581it")],
)
@pytest.mark.parametrize("params", [{"stop": ("nowhere",)}, {"logprobs": 0, "skip_special_tokens": False}])
def test_a_token_costs_the_same_in_a_long_text(pattern: list[int], params: dict[str, object]) -> None:
    tokenizer = Counting(built_tokenizer("llama"))
    prompt, answer = [65] * 1000, pattern * (2000 // len(pattern))
    stream = TextStream(tokenizer, replace(PARAMS, **params), len(prompt))
    tokens = list(prompt)
    for token in answer:
        tokens.append(token)
        stream.read(tokens)
    assert tokenizer.most <= 2 * WINDOW_TOKENS
    assert tokenizer.num <= 2 * WINDOW_TOKENS * 2 * len(answer)


def test_without_a_tokenizer_there_is_no_text() -> None:
    params: WireParams = replace(PARAMS, logprobs=1)
    stream = TextStream(None, params, 1)
    stream.read([1, 2, 3])
    stream.read_end([1, 2, 3, 4])
    assert (stream.take()[1], stream.finish(), list(stream.offsets)) == (4, "", [0, 0, 0])
