"""The harness' model and its own `hf` one, asked the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from tests.tiny_tokenizers import TEXT

MAX_LENGTH = 64
TWINS = [600, 601]  # tokens that are always equally likely, and that no tokenizer has
ALIASES = {"max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"}
PAIRS = [
    ("The quick", " brown fox"),
    ("The quick ", "brown fox"),
    ("The quick brown", " fox jumps over"),
    ("Question: what does it do?\n", "Answer: it jumps"),
    ("Question: what does it do?", "\n\nAnswer:"),
    ("", "The quick brown fox"),
    ("", "<s>The quick"),
    ("<s>The quick", " brown"),
    ("</s>The quick", " brown"),
    ("The quick<|im_end|>", " brown fox"),
    ("naïve cafés cost", " 42 € 世界"),
    (TEXT * 2, " Stop at the end"),
    ("The quick", " brown fox"),
]
TEXTS = ["The quick brown fox", TEXT * 3, "<s>The quick", "a", "世界 42 €", " \n", ""]
CONTEXTS = [TEXT[:3], TEXT[10:30], TEXT[45:57], TEXT[60:100], TEXT[90:170]]
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' and not allow_system %}"
    "{{ raise_exception('no system') }}{% endif %}<s>{{ message.role }}: {{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% if enable_thinking %} hm<|im_end|>{% endif %}{% endif %}"
)
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The quick?"}]

Make = Callable[..., Path]
Engine = Callable[[str], str]


def hf(model: Path, **arguments: Any) -> Any:
    """Without its cache, which mistakes pairs for each other that are the same text, cut at different places."""
    return HFLM(str(model), device="cpu", dtype="float32", batch_size=1, logits_cache=False, **arguments)


def asked(kind: str, requests: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, arguments, number) for number, arguments in enumerate(requests)]


def assert_same_scores(mine: Any, theirs: Any, pairs: list[tuple[str, str]] = PAIRS, texts: list[str] = TEXTS) -> None:
    requests = asked("loglikelihood", pairs)
    found, wanted = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (mine, theirs))
    for pair, (logprob, greedy), (other, other_greedy) in zip(pairs, found, wanted, strict=True):
        assert logprob == pytest.approx(other, rel=1e-5, abs=1e-4), pair
        assert greedy == other_greedy, pair
    rolling = asked("loglikelihood_rolling", [(text,) for text in texts])
    found, wanted = (lm.loglikelihood_rolling(rolling, disable_tqdm=True) for lm in (mine, theirs))
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-4)


def generate(lm: Any, contexts: list[str], **options: Any) -> list[str]:
    requests = asked("generate_until", [(context, options) for context in contexts])
    texts: list[str] = lm.generate_until(requests, disable_tqdm=True)
    return texts
