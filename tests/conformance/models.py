"""Every causal language model and multimodal model of the installed Transformers, as a tiny model with random weights,
through the real processes, against Transformers' own forward: `make conformance`. Writes docs/models.md's table.

A type is known by its default config; where that makes no model that runs, DEFAULTS has what published ones have.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from flexgen_lite import EngineError, FlexGenLite, SamplingParams
from flexgen_lite.workers.compute import attention_call, experts, probe
from flexgen_lite.workers.compute.trial import find_text_path
from flexgen_lite.workers.model import builder
from tests.compiled_kernels import ROOT
from tests.tiny_models import SMALL_PASSES, ragged_prompts

PAGE = ROOT / "docs/models.md"
NOTES = ROOT / ".pytest_cache/conformance" / transformers.__version__
BEGIN, END = "<!-- conformance: begin -->\n", "<!-- conformance: end -->\n"
TYPES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES})
MAX_TOKENS = 10
LOGPROB_TOLERANCE = 1e-3
SETTINGS: dict[str, Any] = {**SMALL_PASSES, "layer_slots": 2, "device": "cpu"}
HALF_ROTARY = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "mrope_section": [8, 12, 12],
    }
}
ROTARY_BY_KIND = {
    "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
    }
}
SPARSE_LAYERS = {"layer_types": ["full_attention"] * 3 + ["minimax_m3_sparse"] * 57}
DEFAULTS: dict[str, dict[str, Any]] = {
    "glm4v": {"text_config": HALF_ROTARY},
    "glm46v": {"text_config": HALF_ROTARY},
    "glmga": {"text_config": HALF_ROTARY},
    "glm4v_moe": {"text_config": {**HALF_ROTARY, "head_dim": 128}},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},
    "step3p7": {"text_config": {"sliding_window": 512}},
    "aya_vision": {"vision_config": {"num_attention_heads": 16}},
    "minimax_m3_vl": {"text_config": SPARSE_LAYERS},
    "minimax_m3_vl_text": SPARSE_LAYERS,
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "granitemoehybrid": {"layer_types": (["linear_attention"] * 7 + ["full_attention"]) * 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "cohere_compass": {"text_config": ROTARY_BY_KIND},
    "cohere_compass_text": ROTARY_BY_KIND,
}
SHARP = re.compile(r"(^|[._])(q|k|qkv|query|key|query_key_value|c_attn|q_a|q_b|kv_a|kv_b)(_|\.|$)")
FAILING = {"kyutai_speech_to_text", "qwen2_audio", "step3p7"}
"""Refused, as a tiny model of them fails, be it in Transformers."""
SAVED_AS_NAMED = {"shieldgemma2"}
"""Types whose names, as Transformers would save them, are not those that it reads."""
SERVED = ("**Language models**", "**Multimodal models, on text alone**")
KINDS = {"encoder-decoder": "encoder-decoder model", "bidirectional": "is bidirectional"}


@dataclasses.dataclass(frozen=True)
class Found:
    """What came of a type: its largest error of a logprob, or the sentence that refuses it."""

    error: float | None
    refusal: str = ""
    is_wrapper: bool = False


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", TYPES)
def test_tokens_and_logprobs(kind: str, tmp_path: Path) -> None:
    attention_call.register()
    experts.register()
    config = CONFIG_MAPPING[kind](**DEFAULTS.get(kind, {}))
    is_wrapper = builder.text_config(config) is not config
    model: PreTrainedModel | None = None
    try:
        model = save_tiny(config, tmp_path)
    except Exception:  # refused, or its config cannot be made small: what is served is told of that
        config.architectures = None
        config.save_pretrained(tmp_path)
    try:
        error = None if model is None else error_of(model, tmp_path)
        refusal = "" if model is not None else refusal_of(tmp_path)
    except EngineError as reason:
        error, refusal = None, str(reason)
    note(kind, Found(error, refusal.replace(str(tmp_path), "MODEL"), is_wrapper))
    assert error is None or error < LOGPROB_TOLERANCE
    assert not any(words in refusal for words in ("worker was lost", "cannot be opened")), refusal
    assert kind in FAILING or "a tiny model of it fails here" not in refusal, refusal
    assert kind not in served_so_far() or error is not None, refusal


@functools.cache
def served_so_far() -> frozenset[str]:
    """As the page has it."""
    lines = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].splitlines()
    return frozenset(kind for line in lines if line.startswith(SERVED) for kind in re.findall("`([^`]+)`", line))


def note(kind: str, found: Found) -> None:
    NOTES.mkdir(parents=True, exist_ok=True)
    (NOTES / f"{kind}.json").write_text(json.dumps(dataclasses.asdict(found)), encoding="utf-8")


def write_page() -> None:
    """From the notes of the last run of every type."""
    notes = {kind: NOTES / f"{kind}.json" for kind in TYPES}
    found = {kind: Found(**json.loads(path.read_text(encoding="utf-8"))) for kind, path in notes.items()}
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + page_of(found) + END + rest.partition(END)[2], encoding="utf-8")


def save_tiny(config: Any, directory: Path) -> PreTrainedModel:
    """The reference, eager; what a text does not need has NaNs."""
    small, ours = probe.tiny_model(config)
    find_text_path(ours)
    theirs = builder.build(small, torch.float32, "eager")
    probe.without_weights(theirs)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    others = theirs.state_dict(keep_vars=True)
    for name, tensor in ours.state_dict(keep_vars=True).items():
        if not tensor.is_floating_point() or probe.is_computed(tensor, others.get(name)):
            tensors[name] = tensor.clone()
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        scale = (3 if SHARP.search(name) else 1.5) * (tensor.shape[-1] if tensor.dim() else 1) ** -0.5
        value = 1 + 0.1 * noise if tensor.dim() <= 1 else scale * noise
        path, _, attribute = name.rpartition(".")
        module = theirs.get_submodule(path)
        if isinstance(tensor, torch.nn.Parameter):
            module._parameters[attribute] = torch.nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[attribute] = value
    theirs.tie_weights()
    state = theirs.state_dict()
    tensors |= {name: state[name].clone().contiguous() for name in ours.state_dict() if name not in tensors}
    as_published = tensors if small.model_type in SAVED_AS_NAMED else revert_weight_conversion(theirs, tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in as_published.items()},
        directory / "model.safetensors",
        {"format": "pt"},
    )
    small.architectures = [type(ours).__name__]
    small.save_pretrained(directory)
    return theirs


def error_of(reference: PreTrainedModel, directory: Path) -> float:
    """Infinite where a token is another."""
    prompts = [[token % 125 + 3 for token in prompt] for prompt in ragged_prompts(7, longest=57)]
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True, logprobs=0)
    with FlexGenLite(directory, **SETTINGS) as engine:
        answers = engine.generate(prompts, params)
    error = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        if answer.error is not None:
            raise EngineError(answer.error)
        tokens = list(answer.token_ids)
        with torch.no_grad():
            logits = reference(input_ids=torch.tensor([[*prompt, *tokens[:-1]]]), use_cache=False).logits[0]
        expected = torch.log_softmax(logits[len(prompt) - 1 :].float(), -1)
        if expected.argmax(-1).tolist() != tokens:
            return float("inf")
        told = [entry[token].logprob for entry, token in zip(answer.logprobs or (), tokens, strict=True)]
        error = max(error, float((expected.max(-1).values - torch.tensor(told)).abs().max()))
    return error


def refusal_of(directory: Path) -> str:
    with pytest.raises(EngineError) as caught:
        FlexGenLite(directory, load_format="dummy", device="cpu", dtype="float32").close()
    return str(caught.value)


def page_of(found: dict[str, Found]) -> str:
    served = {kind: one for kind, one in found.items() if one.error is not None}
    lines = [
        f"Transformers {transformers.__version__}: of {len(found)} types {len(served)} are served, with the same "
        f"greedy tokens and with logprobs within {max((one.error or 0) for one in served.values()):.0e}.\n"
    ]
    for is_wrapper, title in enumerate(SERVED):
        kinds = [f"`{kind}`" for kind, one in served.items() if one.is_wrapper == bool(is_wrapper)]
        lines.append(f"{title} ({len(kinds)}): {', '.join(kinds)}.\n")
    reasons: dict[str, list[str]] = defaultdict(list)
    for kind, one in found.items():
        if one.error is None:
            short = next((short for short, words in KINDS.items() if words in one.refusal), None)
            reasons[f"Refused: {short}" if short else ""].append(kind if short else f"| `{kind}` | {one.refusal} |")
    for reason, kinds in reasons.items():
        if reason:
            lines.append(f"**{reason}** ({len(kinds)}): {', '.join(f'`{kind}`' for kind in kinds)}.\n")
    lines += ["| refused | what is said |", "| --- | --- |", *reasons[""], ""]
    return "\n".join(lines)


if __name__ == "__main__":
    write_page()
