"""Texts, streams, stop strings and offsets agree with decodings of all tokens, of any tokens and tokenizer."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_lite.tokens.tokenizer import TextTokenizer
from tests.built_tokenizers import KINDS, SPECIAL, WORDS, built_tokenizer, ids
from tests.whole_text import PARAMS, check


def tokens_of(kind: str) -> st.SearchStrategy[list[int]]:
    """Any tokens, also ids that are none; those that make trouble more often."""
    tokenizer = built_tokenizer(kind)
    size = tokenizer._tokenizer.get_vocab_size()
    names = [*SPECIAL, *WORDS, "<tool>", "<call>", *(f"<0x{byte:02X}>" for byte in "\u00e9\u9f98😀".encode())]
    trouble = [*ids(tokenizer, *names), *tokenizer.encode("\u00e9 ま😀", False)]
    return st.lists(st.one_of(st.integers(0, size), st.sampled_from(trouble)), max_size=40)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "not_local"])
@settings(max_examples=150)
@given(data=st.data())
def test_all_that_is_told_of_a_text_agrees(kind: str, data: st.DataObject) -> None:
    tokenizer = built_tokenizer(kind)
    prompt, answer = data.draw(tokens_of(kind)), data.draw(tokens_of(kind))
    params = replace(
        PARAMS,
        skip_special_tokens=data.draw(st.booleans()),
        min_tokens=data.draw(st.sampled_from([0, 0, 2])),
        include_stop_str_in_output=data.draw(st.booleans()),
        stop=data.draw(_parts(tokenizer, prompt, answer)),
    )
    check(tokenizer, prompt, answer, params, random.Random(data.draw(st.integers(0, 99))))


def _parts(tokenizer: TextTokenizer, prompt: list[int], answer: list[int]) -> st.SearchStrategy[tuple[str, ...]]:
    """Parts of the text, with special tokens and without."""
    texts = [text for skip in (True, False) if (text := tokenizer.decode(prompt + answer, skip))]
    if not texts:
        return st.just(())
    part = st.builds(
        lambda text, begin, size: text[begin % len(text) :][:size],
        st.sampled_from(texts),
        st.integers(0, 200),
        st.integers(1, 6),
    )
    return st.lists(part, max_size=3).map(tuple)


@given(st.lists(st.integers(0, 255), max_size=40), st.booleans())
def test_a_run_of_bytes_is_what_utf_8_makes_of_it(run: list[int], skip: bool) -> None:
    """Each part that is no character is one U+FFFD; no character is lost."""
    assert built_tokenizer("gemma").decode(run, skip) == bytes(run).decode("utf-8", "replace")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50)
@given(data=st.data())
def test_decoding_is_the_librarys_where_no_run_is_broken(kind: str, data: st.DataObject) -> None:
    tokenizer = built_tokenizer(kind)
    tokens, skip = data.draw(tokens_of(kind)), data.draw(st.booleans())
    text = tokenizer._tokenizer.decode(tokens, skip_special_tokens=skip)
    if "\ufffd" not in text:
        assert tokenizer.decode(tokens, skip) == text
