"""Checkpoints in the formats that are published: the tokens of Transformers with the weights that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.e2e.test_quantization import MAX_TOKENS, answers
from tests.published.checkpoint import base_model, publish
from tests.published.formats import FORMATS
from tests.tiny_models import ragged_prompts, reference_tokens

PROMPTS = ragged_prompts(6, longest=40)
Publish = Callable[[str, str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Publish:
    """A format and a family to the checkpoint and to the model that it stands for."""
    made: dict[tuple[str, str], tuple[Path, Path]] = {}
    directory = tmp_path_factory.mktemp("models")

    def write(name: str, family: str) -> tuple[Path, Path]:
        model = directory / family
        if not model.exists():
            base_model(family, model)
        if (name, family) not in made:
            target = directory / f"{name}-{family}"
            made[name, family] = target, publish(model, target, FORMATS[name])
        return made[name, family]

    return write


@torch.inference_mode()
def lacks(exact: Path, prompts: list[list[int]], found: list[list[int]]) -> torch.Tensor:
    """How much less likely tokens are than the likeliest in their places, in standard deviations of the logits there:
    of the weights rounded to bfloat16 once, multiplied by Transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(exact, dtype=torch.bfloat16).float().eval()
    all_of_them = []
    for prompt, answer in zip(prompts, found, strict=True):
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        all_of_them.append((logits.amax(-1) - logits[range(len(answer)), answer]) / logits.std(-1))
    return torch.cat(all_of_them)


STREAMED = [
    ("fp8-blocks", "llama"), ("fp8-blocks", "deepseek-v3"), ("fp8-blocks-joined-experts", "qwen3-moe"),
    ("fp8-one-scale", "mixtral"), ("fp8-fp4-experts", "qwen3-moe"), ("fbgemm", "llama"), ("mxfp4", "gpt-oss"),
    ("ct-int8-zeros", "qwen3-moe"), ("ct-fp8-channel", "opt"), ("ct-mxfp8", "llama"), ("ct-nvfp4", "qwen3-moe"),
    ("ct-mixed", "qwen3-moe"), ("gptq-4bit-asym-v1", "llama"), ("gptq-4bit-sym-v2", "qwen3-moe"),
    ("gptq-8bit-desc-act", "llama"), ("awq-gemv", "llama"), ("gptq-8bit-sym-v1", "opt"),
    ("gptq-3bit-sym-v1", "llama"), ("awq", "mixtral"), ("modelopt-nvfp4", "opt"),
    ("modelopt-fp8-own-file", "llama"), ("bnb-nf4-double", "mixtral"), ("bnb-fp4", "llama"), ("bnb-int8", "llama"),
    ("torchao-Int8Tensor", "llama"), ("torchao-Int4Tensor", "opt"), ("torchao-IntxUnpackedToInt8Tensor", "llama"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "family"), STREAMED)
def test_in_bfloat16_streamed(name: str, family: str, published: Publish) -> None:
    """The likeliest tokens, but where two are as likely within what bfloat16 rounds away, or a router finds two experts
    so."""
    packed, exact = published(name, family)
    found = lacks(exact, PROMPTS, answers(packed, PROMPTS, layer_slots=2, dtype="bfloat16"))
    assert (found == 0).float().mean() > 0.75
    assert family not in ("llama", "opt") or found.max() < 0.3


RESIDENT = [
    ("gptq-4bit-desc-act", "llama"),
    ("fp8-blocks", "deepseek-v3"), ("mxfp4", "gpt-oss"), ("ct-nvfp4", "qwen3-moe"), ("ct-mixed", "qwen3-moe"),
    ("gptq-4bit-asym-v1", "llama"), ("awq", "mixtral"), ("bnb-nf4-double", "mixtral"), ("torchao-Int4Tensor", "opt"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "family"), RESIDENT)
def test_in_float32_resident(name: str, family: str, published: Publish) -> None:
    packed, exact = published(name, family)
    expected = reference_tokens(exact, PROMPTS, MAX_TOKENS)
    assert answers(packed, PROMPTS) == expected
    unquantised = reference_tokens(exact.parent / family, PROMPTS, MAX_TOKENS)
    assert expected != unquantised, "what is quantised shows"


@pytest.mark.parametrize(("name", "family"), [("gptq-4bit-asym-v1", "llama"), ("bnb-nf4-double", "mixtral")])
def test_in_bfloat16_as_without_packing(name: str, family: str, published: Publish) -> None:
    """To the last bit: of the model that it stands for, rounded to bfloat16 once, resident and streamed."""
    packed, exact = published(name, family)
    expected = answers(exact, PROMPTS, dtype="bfloat16")
    assert answers(packed, PROMPTS, dtype="bfloat16") == expected
    assert answers(packed, PROMPTS, dtype="bfloat16", layer_slots=2) == expected
