"""The tokenizers of real models; `make conformance` tries them with more."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexgen_lite.tokens.stream import TextStream
from flexgen_lite.tokens.tokenizer import TextTokenizer
from tests.conformance.text import MODELS, conform
from tests.real_tokenizers import real_tokenizer
from tests.whole_text import PARAMS


@pytest.mark.parametrize("model", MODELS)
def test_some_sequences(model: str) -> None:
    conform(model, 15, seed=1)


@pytest.mark.parametrize("model", ["llama2", "gemma3"])
def test_lines_of_an_uncommon_script(model: str) -> None:
    """Bytes, all of them: the string is found with the token that completes it, and nothing of it is told."""
    tokenizer = TextTokenizer(str(real_tokenizer(model) / "tokenizer.json"))
    word = "\U00010a00\U00010a10\U00010a11\U00010a12\U00010a13\U00010a14"  # Kharoshthi
    prompt, tokens = tokenizer.encode(word + "\n", True), tokenizer.encode(f"{word}\n" * 6, False)
    first = len(prompt)
    stream, told = TextStream(tokenizer, replace(PARAMS, stop=(word[3],)), first), ""
    for count in range(1, len(tokens) + 1):
        stream.read(prompt + tokens[:count])
        if stream.found:
            break
        told += stream.take()[0]
    assert stream.found
    text = stream.finish()
    assert text.lstrip() == word[:3]
    assert text.startswith(told)
    assert tokenizer.decode(tokens[:count], True).endswith(word[3])
