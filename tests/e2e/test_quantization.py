"""Weights quantised while they are loaded: the tokens of Transformers with weights that are rounded alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen_lite import Client, EngineError, FlexGenLite, SamplingParams
from flexgen_lite.model.quantization import Quantization
from tests.quantised_weights import quantised_model
from tests.tiny_models import SMALL_PASSES, make_model, ragged_prompts, reference_tokens

MAX_TOKENS = 12
GREEDY = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
SETTINGS = {**SMALL_PASSES, "device": "cpu"}


def answers(model: Path, prompts: list[list[int]], **changes: object) -> list[list[int]]:
    with FlexGenLite(model, **SETTINGS | changes) as engine:
        completions = engine.generate(prompts, GREEDY)
    assert [c.error for c in completions] == [None] * len(prompts)
    return [list(c.token_ids) for c in completions]


@torch.inference_mode()
def rounded_tokens(directory: Path, prompts: Sequence[list[int]], wanted: Quantization) -> list[list[int]]:
    model: Any = quantised_model(directory, wanted)
    model.generation_config.eos_token_id = None
    return [
        model.generate(
            torch.tensor([prompt]), max_new_tokens=MAX_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]


@pytest.mark.parametrize(
    ("family", "bits"),
    [("llama", 8), ("llama", 4), ("opt", 4), ("gpt2", 8), ("gpt-oss", 4), ("qwen3-moe", 8), ("qwen3-moe", 4)],
)
def test_same_tokens_as_rounded_weights(family: str, bits: int, tmp_path: Path) -> None:
    model, prompts = make_model(family, tmp_path / "model"), ragged_prompts(6, longest=40)
    expected = rounded_tokens(model, prompts, Quantization(bits))
    assert answers(model, prompts, quantization=f"int{bits}", layer_slots=2 if bits == 8 else "auto") == expected
    if bits == 4 and family != "gpt2":  # which says the same whatever it is asked
        assert expected != reference_tokens(model, prompts, MAX_TOKENS), "rounding shows"


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
@torch.inference_mode()
def test_activations_in_8_bits(family: str, tmp_path: Path) -> None:
    """Rows of each product are rounded as Transformers' are here. A sum in another order may round an item up that was
    rounded down, so that tokens say too little: probabilities do, which are far from those of rows as they are."""
    model = make_model(family, tmp_path / "model")
    prompts = [prompt for prompt in ragged_prompts(8, longest=40) if len(prompt) > 1]

    def logprobs(wanted: Quantization) -> torch.Tensor:
        theirs: Any = quantised_model(model, wanted)
        rows = [theirs(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1) for prompt in prompts]
        return torch.stack([row[range(len(p) - 1), p[1:]].sum() for row, p in zip(rows, prompts, strict=True)])

    def scores(dtype: str) -> torch.Tensor:
        settings = {"quantization": "int8", "quantization_group_size": 32, "activations": "int8", "dtype": dtype}
        with FlexGenLite(model, **SETTINGS | settings) as engine:
            return torch.tensor([score.logprob for score in engine.loglikelihood(prompts)])

    rounded, as_they_are = logprobs(Quantization(8, 32, activations="int8")), logprobs(Quantization(8, 32))
    assert (scores("float32") - rounded).abs().mean() < 0.1 * (as_they_are - rounded).abs().mean()
    assert torch.allclose(scores("bfloat16"), rounded, rtol=0.05, atol=1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt-oss"])
def test_with_zeros_or_without(family: str, symmetric: bool, tmp_path: Path) -> None:
    model, prompts = make_model(family, tmp_path / "model"), ragged_prompts(6, longest=40)
    expected = rounded_tokens(model, prompts, Quantization(4, symmetric=symmetric))
    assert answers(model, prompts, quantization="int4", quantization_symmetric=symmetric) == expected


@pytest.mark.parametrize("projections", ["none", "qkv"])
@pytest.mark.parametrize(("family", "bits"), [("qwen3-moe", 4), ("gpt2", 8)])
def test_on_its_way_through_device_slots(family: str, bits: int, projections: str, tmp_path: Path) -> None:
    model, prompts = make_model(family, tmp_path / "model"), ragged_prompts(6, longest=40)
    expected = rounded_tokens(model, prompts, Quantization(bits))
    settings = {"stage_weights": True, "device_slots": 2, "cpu_projections": projections}
    assert answers(model, prompts, quantization=f"int{bits}", **settings) == expected


def test_layers_that_stay(tmp_path: Path) -> None:
    model, prompts = make_model("llama", tmp_path / "model"), ragged_prompts(4, longest=40)
    ignore = ("lm_head", "re:.*self_attn.*", "model.layers.2.mlp.down_proj")
    expected = rounded_tokens(model, prompts, Quantization(4, 16, ignore))
    settings = {"quantization": "int4", "quantization_group_size": 16, "quantization_ignore": list(ignore)}
    assert answers(model, prompts, **settings) == expected


def test_bfloat16_is_near(tmp_path: Path) -> None:
    """As near as bfloat16 is to float32 without."""
    model, prompts = make_model("qwen3-moe", tmp_path / "model", hidden_size=128), ragged_prompts(8, longest=40)
    prompts = [prompt for prompt in prompts if len(prompt) > 1]
    with FlexGenLite(model, **SETTINGS | {"quantization": "int4", "dtype": "bfloat16"}) as engine:
        rough = engine.loglikelihood(prompts)
    with FlexGenLite(model, **SETTINGS | {"quantization": "int4", "dtype": "float32"}) as engine:
        exact = engine.loglikelihood(prompts)
    for a, b in zip(rough, exact, strict=True):
        assert a.logprob == pytest.approx(b.logprob, rel=0.03, abs=0.5)


def test_the_plan_and_the_fingerprint_tell_of_it(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model", hidden_size=256, intermediate_size=512)
    plans, fingerprints = set(), set()
    for changes in (
        {"quantization": "auto"},
        {"quantization": "int8"},
        {"quantization": "int4"},
        {"quantization": "int4", "quantization_symmetric": True},
        {"quantization": "int4", "quantization_ignore": ["lm_head", "re:.*self_attn.*"]},
        {"quantization": "int4", "quantization_ignore": ["lm_head", "re:.*[qk]_proj"]},
    ):
        settings = SETTINGS | {"dtype": "bfloat16"} | changes
        with FlexGenLite(model, **settings) as engine, Client(engine.endpoint) as client:
            fingerprints.add(client.welcome.fingerprint)
            plans.add(client.welcome.plan)
    assert len(fingerprints) == 6
    assert len(plans) >= 5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quantization": "int4", "quantization_group_size": 48}, ("quantization_group_size=48", "16, 32, 64")),
        ({"quantization": "int8", "quantization_ignore": ["re:("]}, ("re:(", "regular expression")),
        ({"quantization": "int8", "quantization_ignore": ["re:.*"]}, ("no layer", "quantization")),
        ({"quantization": "int8", "quantization_symmetric": False}, ("quantization_symmetric=false", "8 bits")),
        ({"activations": "int8"}, ("activations", "quantization")),
        ({"quantization_group_size": 64}, ("quantization_group_size=64", "give quantization as well")),
        ({"quantization_symmetric": True}, ("quantization_symmetric=", "give quantization as well")),
        ({"quantization_ignore": ["lm_head"]}, ("quantization_ignore=", "give quantization as well")),
        ({"quantization": "int2"}, ("quantization", '"int8" or "int4"')),
    ],
)
def test_what_is_refused(settings: dict[str, Any], words: tuple[str, ...], tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model")
    with pytest.raises((EngineError, ValueError)) as raised, FlexGenLite(model, **SETTINGS | settings):
        pass
    assert all(word in str(raised.value) for word in words), raised.value
