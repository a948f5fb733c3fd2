"""Prompts that begin alike through the real processes: computed once, with the tokens of Transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexgen_lite import FlexGenLite, SamplingParams
from tests.tiny_models import SMALL_PASSES, make_model, ragged_prompts, reference_tokens

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
SETTINGS = {**SMALL_PASSES, "layer_slots": 2, "device": "cpu"}


@pytest.mark.parametrize("family", ["llama", "gpt-oss", "llama4-chunks", "gemma4-wrapper", "deepseek-v3"])
def test_same_tokens_as_transformers(family: str, tmp_path: Path) -> None:
    """Plain, with windows and sinks, chunks, windows of two kinds of layers, latents; the beginnings are longer than a
    micro-batch, and there are more requests than places."""
    model = make_model(family, tmp_path / "model")
    beginnings = ragged_prompts(2, longest=60, seed=5)
    beginnings = [(tokens * 40)[:length] for tokens, length in zip(beginnings, (50, 35), strict=True)]
    prompts = [beginnings[number % 2] + tail for number, tail in enumerate(ragged_prompts(20, longest=30, seed=6))]
    with FlexGenLite(model, **SETTINGS) as engine:
        completions = engine.generate(prompts, GREEDY)
        shared = engine.status().totals["shared_prompt_tokens"]
        computed = engine.status().totals["prompt_tokens"]
    assert [list(c.token_ids) for c in completions] == reference_tokens(model, prompts, GREEDY.max_tokens)
    assert shared >= 14 * 32 and shared + computed == sum(map(len, prompts))


def test_answers_and_scores_are_the_same_as_without(tmp_path: Path) -> None:
    """Several answers to a prompt, and several continuations of a context."""
    model = make_model("llama", tmp_path / "model")
    prompts = [(tokens * 40)[:45] for tokens in ragged_prompts(4, longest=20, seed=7)]
    sampled = SamplingParams(n=5, max_tokens=6, seed=3, temperature=0.8, ignore_eos=True)
    contexts = [prompt for prompt in prompts for _ in range(4)]
    continuations = ragged_prompts(16, longest=9, seed=8)
    answers, scores, shared = [], [], []
    for sharing in (True, False):
        with FlexGenLite(model, **SETTINGS, prefix_caching=sharing) as engine:
            completions = engine.generate(prompts, sampled)
            answers.append([[list(output.token_ids) for output in c.outputs] for c in completions])
            scores.append([score.logprob for score in engine.score(contexts, continuations)])
            short = engine.generate([prompts[0][:33]], SamplingParams(max_tokens=0, prompt_logprobs=0, n=3))
            assert [len(output.token_ids) for output in short[0].outputs] == [0, 0, 0]
            shared.append(engine.status().totals["shared_prompt_tokens"])
    assert answers[0] == answers[1]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    assert shared[0] >= 4 * 4 * 32 + 4 * 3 * 32 and shared[1] == 0
