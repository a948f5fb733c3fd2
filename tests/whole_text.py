"""What the text of an answer has to be, by decodings of all its tokens: slow, and simple enough to be trusted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from flexgen_lite.tokens.detokenizer import BROKEN, Tokenizer
from flexgen_lite.tokens.stream import TextStream
from flexgen_lite.wire.sampling import WireParams

PARAMS = WireParams(1 << 20, 0, 0.0, 0, 1.0, None, (), True, True)


@dataclass(frozen=True)
class Expected:
    """Attributes:
    text: of the answer.
    num_read: tokens of it that are generated before a stop string ends it.
    lengths: characters that are certain with none of its tokens, with one, and so on, before any cut.
    """

    text: str
    num_read: int
    lengths: list[int]


def settled(tokenizer: Tokenizer, tokens: Sequence[int], skip: bool) -> str:
    """The text of tokens up to a character that they end within."""
    text = tokenizer.decode(list(tokens), skip)
    visible = [token for token in tokens if tokenizer.has_text(token, skip)]
    return text[:-1] if text.endswith(BROKEN) and tokenizer.ends_within_character(visible) else text


def expected(tokenizer: Tokenizer, prompt: list[int], answer: list[int], params: WireParams) -> Expected:
    skip = params.skip_special_tokens
    base = len(settled(tokenizer, prompt, skip))
    texts = [settled(tokenizer, prompt + answer[:count], skip)[base:] for count in range(len(answer) + 1)]
    lengths = [len(text) for text in texts]
    special = _with_special(tokenizer, prompt, answer, texts) if skip else texts
    for count in range(params.min_tokens + 1, len(answer) + 1):
        places = []
        for source in (texts, special):
            found = _first(source[count], params.stop, len(source[params.min_tokens]))
            if found is not None:
                own = [len(text) for text in source[: count + 1]]
                places.append((_shown(found[0], own, lengths[: count + 1]), found[1]))
        if places:
            return Expected(_cut(texts[count], min(places, key=lambda place: place[0]), params), count, lengths)
    whole = tokenizer.decode(prompt + answer, skip)[base:] if answer else ""
    if len(answer) > params.min_tokens:  # it ends within a character, which then completes a string
        place = _first(whole, params.stop, lengths[params.min_tokens])
        whole = whole if place is None else _cut(whole, place, params)
    return Expected(whole, len(answer), lengths)


def _cut(text: str, place: tuple[int, str], params: WireParams) -> str:
    return text[: place[0]] + (place[1] if params.include_stop_str_in_output else "")


def _with_special(tokenizer: Tokenizer, prompt: list[int], answer: list[int], texts: list[str]) -> list[str]:
    """The same texts with special tokens, from the first of them on."""
    first = next((n for n, token in enumerate(answer) if tokenizer.is_special(token)), len(answer))
    known = len(settled(tokenizer, prompt + answer[:first], False))
    return texts[: first + 1] + [
        texts[first] + settled(tokenizer, prompt + answer[:count], False)[known:]
        for count in range(first + 1, len(answer) + 1)
    ]


def _first(text: str, strings: Sequence[str], barrier: int) -> tuple[int, str] | None:
    """Where the first of the strings that end behind the barrier begins."""
    places = [
        (at, string)
        for at in range(len(text))
        for string in strings
        if text.startswith(string, at) and at + len(string) > barrier
    ]
    return places[0] if places else None


def _shown(at: int, own: list[int], shown: list[int]) -> int:
    """A place in a text with special tokens, in the one without: both told by their lengths at each token."""
    token = max(n for n in range(len(own) - 1) if own[n] <= at)
    return min(shown[token] + at - own[token], shown[token + 1])


def check(tokenizer: Tokenizer, prompt: list[int], answer: list[int], params: WireParams, rng: random.Random) -> None:
    """Plain, streamed in any parts, with offsets: all of it agrees with the whole decodings."""
    wanted, first = expected(tokenizer, prompt, answer, params), len(prompt)
    tokens = prompt + answer
    context = f"prompt {prompt}, answer {answer}, {params}"

    stream, told, num_read = TextStream(tokenizer, replace(params, logprobs=0), first), "", 0
    told_offsets: list[int] = []
    for count in range(1, len(answer) + 1):
        stream.read(tokens[: first + count])
        num_read = count
        if stream.found:
            break
        if rng.random() < 0.6:
            piece, end = stream.take()
            told, told_offsets = told + piece, list(stream.offsets[: end - first])
            assert wanted.text.startswith(told), (context, told)
    text, offsets = stream.finish(), list(stream.offsets)
    assert (text, num_read) == (wanted.text, wanted.num_read), (context, text, wanted.text)
    assert (told, told_offsets) == (text[: len(told)], offsets[: len(told_offsets)]), context

    for count, offset in enumerate(offsets):
        length = wanted.lengths[count]
        assert offset in {min(length, len(text)), min(length + 1, len(text))}, (context, offsets, wanted.lengths)
        assert offset <= len(text), context
        raw = tokenizer.token_bytes(answer[count])
        own = raw.decode(errors="replace") if raw is not None else ""
        if not stream.found and BROKEN not in own and tokenizer.has_text(answer[count], params.skip_special_tokens):
            assert text.startswith(own, offset), (context, offsets)

    plain = TextStream(tokenizer, params, first)
    for count in [*sorted(rng.sample(range(num_read + 1), min(2, num_read))), num_read]:
        plain.read(tokens[: first + count])
    assert plain.finish() == wanted.text, context
