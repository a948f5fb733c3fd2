"""KV in 8 bits: the same greedy tokens as Transformers with a cache that is rounded in the same way."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexgen_lite import FlexGenLite, SamplingParams
from tests.int8_cache import int8_tokens
from tests.tiny_models import SMALL_PASSES, make_model, ragged_prompts, reference_tokens

MAX_TOKENS = 12
GREEDY = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
SETTINGS = {**SMALL_PASSES, "device": "cpu", "kv_dtype": "int8"}


def answers(model: Path, prompts: list[list[int]], **changes: object) -> list[list[int]]:
    with FlexGenLite(model, **SETTINGS | changes) as engine:
        completions = engine.generate(prompts, GREEDY)
    assert [c.error for c in completions] == [None] * len(prompts)
    return [list(c.token_ids) for c in completions]


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2", "gpt-oss", "deepseek-v3"])
def test_same_tokens_as_a_rounded_cache(family: str, tmp_path: Path) -> None:
    model, prompts = make_model(family, tmp_path / "model"), ragged_prompts(10, longest=70)
    expected = int8_tokens(model, prompts, MAX_TOKENS)
    assert answers(model, prompts, micro_batch_tokens=128) == expected
    assert expected != reference_tokens(model, prompts, MAX_TOKENS), "rounding shows, or this would test nothing"


def test_same_tokens_as_a_rounded_cache_where_a_prompt_comes_in_chunks(tmp_path: Path) -> None:
    model, prompt = make_model("llama", tmp_path / "model"), ragged_prompts(2, longest=80)[1]
    expected = int8_tokens(model, [prompt], MAX_TOKENS, chunk=32)
    assert answers(model, [prompt], micro_batches=1) == expected
