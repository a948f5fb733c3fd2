"""Every tested family through the real processes: the same greedy tokens as Transformers, token for token.

The settings make each run take every path: layers streamed through two slots, two micro-batches, two attention workers,
prompts that come in chunks, and more requests than places, so that finished ones are replaced.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from flexgen_lite import FlexGenLite, SamplingParams
from flexgen_lite.workers.compute.probe import TESTED_TYPES
from tests.tiny_models import FAMILIES, SMALL_PASSES, make_model, ragged_prompts, reference_tokens

MAX_TOKENS = 10
SETTINGS = {**SMALL_PASSES, "layer_slots": 2, "device": "cpu"}


@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_as_transformers(family: str, tmp_path: Path) -> None:
    model = make_model(family, tmp_path / "model")
    prompts = ragged_prompts(12, longest=70)
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
    with FlexGenLite(model, **SETTINGS) as engine:
        completions = engine.generate(prompts, params)
    assert [c.error for c in completions] == [None] * len(prompts)
    assert [list(c.token_ids) for c in completions] == reference_tokens(model, prompts, MAX_TOKENS)


def test_every_type_served_without_a_probe_is_in_this_suite() -> None:
    assert {kind for kind, _ in FAMILIES.values()} == TESTED_TYPES
