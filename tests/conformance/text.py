"""Texts over the tokenizers of real models, against decodings of all tokens: `make conformance`.

A tokenizer that cannot be had is skipped.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from flexgen_lite.tokens.tokenizer import TextTokenizer
from tests.real_tokenizers import real_tokenizer
from tests.whole_text import PARAMS, check

MODELS = ("llama2", "llama3", "qwen3", "gemma3", "gptoss", "deepseek_v3")
NUM_SEQUENCES = 1000
TEXTS = (
    "The sky is blue; it's   what one says.\n\n\tdef f(x):\n        return x  # é, ñ, ß\n",
    "龘龗龖龕 天空是蓝色的。空は青い。하늘은 파랗다. السماء زرقاء. Небо голубое. आकाश नीला है।",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 ᚠᛇᚻ᛫ᛒᛦᚦ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \ufffd e\u0301 \u200b\u00a0|<|im_end|></s><eos>",
)


class Sequences:
    """Random sequences of tokens: pieces of texts, characters that are cut anywhere, special tokens, any token."""

    def __init__(self, tokenizer: TextTokenizer, seed: int) -> None:
        self.rng = random.Random(seed)
        self._tokenizer = tokenizer
        self._texts = [tokenizer.encode(text, False) for text in TEXTS]
        known = range(tokenizer._tokenizer.get_vocab_size())
        self._known = known
        self._special = [token for token in known if tokenizer.is_special(token)]
        self._partial = [token for token in known[:3000] if _is_partial(tokenizer.token_bytes(token))]

    def tokens(self, most: int) -> list[int]:
        rng, tokens = self.rng, list[int]()
        while len(tokens) < most:
            kind = rng.random()
            if kind < 0.5:
                text = rng.choice(self._texts)
                begin = rng.randrange(len(text))
                tokens += text[begin : begin + rng.randint(1, 8)]
            elif kind < 0.75:
                tokens += (rng.choice(self._partial) for _ in range(rng.randint(1, 4)))
            else:
                tokens.append(rng.choice(self._special if kind < 0.82 else self._known))
        return tokens[: rng.randint(0, most)]

    def stops(self, tokens: list[int]) -> tuple[str, ...]:
        """Parts of their text, with special tokens or without."""
        rng = self.rng
        text = self._tokenizer.decode(tokens, rng.random() < 0.5) or "x"
        begins = (rng.randrange(len(text)) for _ in range(rng.choice((0, 1, 1, 3))))
        return tuple(text[begin : begin + rng.randint(1, 8)] for begin in begins)


def _is_partial(raw: bytes | None) -> bool:
    return raw is not None and "\ufffd" in raw.decode(errors="replace")


def conform(model: str, num_sequences: int, seed: int = 0) -> None:
    tokenizer = TextTokenizer(str(real_tokenizer(model) / "tokenizer.json"))
    sequences = Sequences(tokenizer, seed)
    rng = sequences.rng
    for _ in range(num_sequences):
        prompt = tokenizer.encode(rng.choice(TEXTS), True) if rng.random() < 0.2 else sequences.tokens(30)
        answer = sequences.tokens(50)
        params = replace(
            PARAMS,
            stop=sequences.stops(prompt + answer),
            skip_special_tokens=rng.random() < 0.6,
            min_tokens=rng.choice((0, 0, 5)),
            include_stop_str_in_output=rng.random() < 0.3,
        )
        check(tokenizer, prompt, answer, params, rng)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model", MODELS)
def test_texts_of_a_real_tokenizer(model: str) -> None:
    conform(model, NUM_SEQUENCES)
