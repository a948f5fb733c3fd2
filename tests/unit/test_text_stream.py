"""A text told piece by piece is the text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flexgen_lite.text_stream import TextStream


def decode(token_ids: list[int]) -> str:
    """Tokens are bytes."""
    return bytes(token_ids).decode("utf-8", "replace")


@given(
    st.text(max_size=40), st.lists(st.integers(1, 5), max_size=60), st.sampled_from([(), ("xyz",), ("a", "long one")])
)
def test_pieces_make_up_the_text_but_for_what_is_held_back(text: str, steps: list[int], stop: tuple[str, ...]) -> None:
    tokens, stream, told = list(b"a prompt"), TextStream(decode, stop, 8), ""
    rest = list(text.encode())
    for step in steps:
        tokens += rest[:step]
        rest = rest[step:]
        told += stream.next(tokens)
        assert "\ufffd" not in told or "\ufffd" in text
    tokens += rest
    told += stream.next(tokens)
    hold = max(map(len, stop), default=1) - 1
    assert text.startswith(told)
    assert len(text) - len(told) <= hold or text.endswith("\ufffd")


def test_characters_come_whole() -> None:
    stream = TextStream(decode, (), 0)
    tokens: list[int] = []
    pieces = []
    for byte in "aé🙂b".encode():
        tokens.append(byte)
        pieces.append(stream.next(tokens))
    assert pieces == ["a", "", "é", "", "", "", "🙂", "b"]
    assert stream.told == 8


def test_another_sequence_begins_at_the_same_place() -> None:
    stream = TextStream(decode, (), 2)
    stream.next(list(b"xxabc"))
    assert stream.afresh().next(list(b"xxde")) == "de"


def test_tokens_without_text_cost_nothing_for_long() -> None:
    """Skipped special tokens, here 0; and a space that is dropped at the front of a text."""
    longest = 0

    def without_special(token_ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(token_ids))
        return decode([token for token in token_ids if token]).removeprefix(" ")

    stream, tokens, told = TextStream(without_special, (), 0), list(b" one"), ""
    for token in [0] * 100 + list(b" two") + [0] * 50 + list(b" three"):
        tokens.append(token)
        told += stream.next(tokens)
    assert told == "one two three"
    assert longest < 40


def test_bytes_that_are_no_character_are_told() -> None:
    stream, tokens, told = TextStream(decode, (), 0), [], ""
    for token in [*b"a", *[0xFF] * 100, *b"b"]:
        tokens.append(token)
        told += stream.next(tokens)
    assert told == decode(tokens)


@given(
    st.lists(st.sampled_from("aé€🙂 ".encode() + b"\xff\x80"), max_size=120), st.lists(st.integers(1, 25), max_size=60)
)
def test_what_is_told_stays_true_whatever_the_bytes(data: list[int], steps: list[int]) -> None:
    tokens: list[int] = []
    stream, told = TextStream(decode, (), 0), ""
    for step in [*steps, len(data)]:
        tokens, data = tokens + data[:step], data[step:]
        told += stream.next(tokens)
        assert decode(tokens).startswith(told)


def test_tokens_that_each_end_within_a_character_are_told_when_it_is_whole() -> None:
    texts = [b"\xe3\x81", *[b"\xbe\xe3\x81"] * 40, b"\xbe"]
    stream, told = TextStream(lambda ids: b"".join(texts[i] for i in ids).decode("utf-8", "replace"), (), 0), ""
    for number in range(len(texts)):
        told += stream.next(list(range(number + 1)))
    assert told == "\u307e" * 41


def test_a_space_before_tokens_without_text_stays() -> None:
    """As SentencePiece's decoders drop the first space of all."""
    texts = ["\u2581", *[""] * 30, "\u2581foo"]
    stream, told = (
        TextStream(lambda ids: "".join(texts[i] for i in ids).replace("\u2581", " ").removeprefix(" "), (), 0),
        "",
    )
    for number in range(len(texts)):
        told += stream.next(list(range(number + 1)))
    assert told == " foo"
