"""KV in 8 bits: the same greedy tokens as Transformers with a cache that is rounded in the same way."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexgen_lite import Client, FlexGenLite, SamplingParams
from tests.int8_cache import int8_tokens
from tests.tiny_models import SMALL_PASSES, make_model, ragged_prompts, reference_tokens, some_alike

MAX_TOKENS = 12
GREEDY = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
SETTINGS = {**SMALL_PASSES, "device": "cpu", "kv_dtype": "int8"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"))


def answers(model: Path, prompts: list[list[int]], **changes: object) -> list[list[int]]:
    with FlexGenLite(model, **SETTINGS | changes) as engine:
        completions = engine.generate(prompts, GREEDY)
    assert [c.error for c in completions] == [None] * len(prompts)
    return [list(c.token_ids) for c in completions]


@pytest.mark.parametrize("family", ["llama", "gpt-oss", "deepseek-v3", "gemma4-wrapper"])
def test_same_tokens_as_a_rounded_cache(family: str, tmp_path: Path) -> None:
    """However prompts are cut: whole, in chunks, and behind a beginning that is shared."""
    model, prompts = make_model(family, tmp_path / "model"), some_alike(ragged_prompts(10, longest=70))
    expected = int8_tokens(model, prompts, MAX_TOKENS)
    assert answers(model, prompts) == expected
    assert answers(model, prompts, micro_batch_tokens=128, prefix_caching=False) == expected
    assert expected != reference_tokens(model, prompts, MAX_TOKENS), "rounding shows, or this would test nothing"


def test_the_plan_and_the_fingerprint_tell_of_it(model: Path) -> None:
    plans, fingerprints = [], []
    for kv_dtype in ("auto", "int8"):
        settings = SETTINGS | {"dtype": "bfloat16", "kv_dtype": kv_dtype}
        with FlexGenLite(model, **settings) as engine, Client(engine.endpoint) as client:
            plans.append(client.welcome.plan)
            fingerprints.append(client.welcome.fingerprint)
    assert "of 16 in int8" in plans[1] and "int8" not in plans[0]
    assert fingerprints[0] != fingerprints[1]
    assert len(fingerprints[0]) == len(fingerprints[1])
