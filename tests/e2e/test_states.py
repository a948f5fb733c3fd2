"""Models whose layers keep other state than keys and values, through the real processes, beyond plain batches."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexgen_lite import Client, Completion, EngineConfig, EngineError, FlexGenLite, SamplingParams
from flexgen_lite.launcher.supervisor import EngineSupervisor
from flexgen_lite.model.quantization import IGNORED, Quantization
from flexgen_lite.plan.workload import Workload
from flexgen_lite.text.sizes import parse_size
from flexgen_lite.workers.compute.mixers import read_projections
from tests.quantised_weights import quantised_model
from tests.tiny_models import SMALL_PASSES, VOCAB, make_model, ragged_prompts, reference_tokens

MAX_TOKENS = 10
GREEDY = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=12, temperature=0.8, seed=3, ignore_eos=True)
SETTINGS = {**SMALL_PASSES, "device": "cpu"}


def complete(
    model: Path, prompts: Sequence[list[int]], params: SamplingParams = GREEDY, **changes: Any
) -> list[Completion]:
    with FlexGenLite(model, **SETTINGS | changes) as engine:
        completions = engine.generate(list(prompts), params)
    assert [c.error for c in completions] == [None] * len(prompts)
    return completions


def answers(
    model: Path, prompts: Sequence[list[int]], params: SamplingParams = GREEDY, **changes: Any
) -> list[list[int]]:
    return [list(c.token_ids) for c in complete(model, prompts, params, **changes)]


@pytest.mark.parametrize("family", ["jamba", "falcon-mamba", "qwen3.5", "bamba", "lfm2"])
def test_prompts_in_many_chunks(family: str, tmp_path: Path) -> None:
    """The first two take tokens one by one after a state; all layers are in memory."""
    model, prompts = make_model(family, tmp_path / "model"), ragged_prompts(5, longest=90)
    found = answers(model, prompts, micro_batches=1, micro_batch_tokens=16)
    assert found == reference_tokens(model, prompts, MAX_TOKENS)


@pytest.mark.parametrize("family", ["mamba2", "zamba2"])
def test_layers_in_memory_or_not(family: str, tmp_path: Path) -> None:
    """A model without any attention, and one whose layers have it beside a mixer."""
    model, prompts = make_model(family, tmp_path / "model"), ragged_prompts(9, longest=50)
    expected = reference_tokens(model, prompts, MAX_TOKENS)
    for options in ({}, {"layer_slots": 2}, {"stage_weights": True, "layer_slots": 2}):
        assert answers(model, prompts, **options) == expected, options


def test_sequences_that_are_preempted(tmp_path: Path) -> None:
    """They begin anew, in a state that another may have left: answers are longer than the plan was told."""
    model = make_model("qwen3.5", tmp_path / "model")
    prompts, params = ragged_prompts(30, longest=30), replace(SAMPLED, max_tokens=60)
    expected = answers(model, prompts, params, max_sequences=30)
    short = Workload(sequences=30, typical_tokens=16, longest_likely=32, longest_tokens=32)
    settings = SETTINGS | {"max_sequences": 30}
    with pytest.raises(EngineError) as refusal:
        EngineSupervisor(EngineConfig(model=str(model), ram=1 << 20, **settings), expected=short)
    match = re.search(r"needs at least ([\d.]+ \w+) of RAM", str(refusal.value))
    assert match
    ram = parse_size(match[1].replace(" ", ""))
    config = EngineConfig(model=str(model), ram=ram, **settings)
    with EngineSupervisor(config, expected=short) as engine, Client(engine.endpoint) as client:
        client.submit([[5]] * 100, replace(params, stop_token_ids=[*range(VOCAB)])).results()  # short ones are expected
        found = [list(completion.token_ids) for completion in client.submit(prompts, params).results()]
        assert client.status().totals["sent_back"] > 0
    assert found == expected


def test_several_answers_to_a_prompt(tmp_path: Path) -> None:
    """More than there are places; the same as alone, where the k-th is drawn with the seed + k."""
    model, prompts = make_model("nemotron-h", tmp_path / "model"), ragged_prompts(4, longest=40)
    several = complete(model, prompts, replace(SAMPLED, n=4), max_sequences=5)
    alone = [complete(model, prompts, replace(SAMPLED, seed=3 + k)) for k in range(4)]
    for index, completion in enumerate(several):
        assert [o.token_ids for o in completion.outputs] == [found[index].token_ids for found in alone]
    assert len({tuple(o.token_ids) for o in several[0].outputs}) > 1


@pytest.mark.parametrize("family", ["qwen3-next", "falcon-mamba"])
@torch.inference_mode()
def test_logprobs_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """Of prompts in chunks, and of continuations of contexts that are alike: a state is never another's."""
    model, prompts = make_model(family, tmp_path / "model"), ragged_prompts(6, longest=70)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    scored = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
    continuations = ragged_prompts(6, longest=20, seed=1)
    with FlexGenLite(model, **SETTINGS) as engine:
        completions = engine.generate(prompts, scored)
        scores = engine.score([prompts[1]] * len(continuations), continuations)

    def expected(tokens: list[int]) -> list[float]:
        logprobs = theirs(torch.tensor([tokens])).logits[0].log_softmax(dim=-1)
        return [float(row[token]) for row, token in zip(logprobs[:-1], tokens[1:], strict=True)]

    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.prompt_logprobs is not None
        places = zip(prompt[1:], completion.prompt_logprobs[1:], strict=True)
        found = [place[token].logprob for token, place in places if place is not None]
        assert found == pytest.approx(expected(prompt), abs=2e-4)
    for continuation, score in zip(continuations, scores, strict=True):
        wanted = expected(prompts[1] + continuation)[-len(continuation) :]
        assert score.token_logprobs == pytest.approx(wanted, abs=2e-4)


@pytest.mark.parametrize("family", ["qwen3.5", "granite-hybrid", "lfm3"])
def test_in_bfloat16(family: str, tmp_path: Path) -> None:
    """The same tokens streamed and resident; close to what Transformers makes of it in float32."""
    model, prompts = make_model(family, tmp_path / "model", torch.bfloat16), ragged_prompts(8, longest=40)
    params = replace(GREEDY, logprobs=0)
    found = []
    for options in ({}, {"layer_slots": 2}):
        completions = complete(model, prompts, params, dtype="bfloat16", **options)
        found.append([list(c.token_ids) for c in completions])
        places = [place for c in completions for place in c.outputs[0].logprobs or ()]
        values = [entry.logprob for place in places for entry in place.values()]
        assert len(values) >= MAX_TOKENS * len(prompts) and all(math.isfinite(value) for value in values)
    assert found[0] == found[1]
    expected = reference_tokens(model, prompts, MAX_TOKENS)
    first = [tokens[0] == wanted[0] for tokens, wanted in zip(found[0], expected, strict=True)]
    assert sum(first) >= len(first) - 2, "rounding decides few first tokens"


@torch.inference_mode()
def test_quantised_weights(tmp_path: Path) -> None:
    """Those that mixers read beside their own products stay as they are."""
    model, prompts = make_model("qwen3.5", tmp_path / "model"), ragged_prompts(6, longest=40)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    unread = read_projections(plain.modules())
    names = tuple(name for name, module in plain.named_modules() if module in unread)
    rounded: Any = quantised_model(model, Quantization(8, ignore=(*IGNORED, *names)))
    rounded.generation_config.eos_token_id = None
    expected = [
        rounded.generate(torch.tensor([p]), max_new_tokens=MAX_TOKENS, do_sample=False, pad_token_id=0)[0, len(p) :]
        for p in prompts
    ]
    for options in ({}, {"layer_slots": 2}):
        assert answers(model, prompts, quantization="int8", **options) == [tokens.tolist() for tokens in expected]
