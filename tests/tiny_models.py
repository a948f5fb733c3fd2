"""Tiny models with random weights, one per family, and what Transformers itself generates from them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from flexgen_lite.workers.model.builder import STATE_VERSION
from tests.tiny_hybrids import DELTA, EXPERTS, HYBRIDS

VOCAB = 160
SHAPE: dict[str, Any] = {
    "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": VOCAB,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GQA: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16}
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
OPT: dict[str, Any] = {"ffn_dim": 96, "word_embed_proj_dim": 64}
GPT2: dict[str, Any] = {"n_layer": 4, "n_embd": 64, "n_head": 4, "n_positions": 128}
MLA: dict[str, Any] = {
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12,
    "head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "n_shared_experts": 1, "num_key_value_heads": 4,
}  # fmt: skip
LONGCAT: dict[str, Any] = {
    "num_layers": 2, "num_hidden_layers": 4, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "moe_topk": 2,
    "zero_expert_num": 2,
}  # fmt: skip
TEXT: dict[str, Any] = SHAPE | GQA
GEMMA4: dict[str, Any] = {
    "num_hidden_layers": 6, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "sliding_window": 7, "global_head_dim": 32, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
    "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32,
    "hidden_size_per_layer_input": 0,
}  # fmt: skip
SHARED_KV: dict[str, Any] = {
    "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3, "num_kv_shared_layers": 3,
    "sliding_window": 7, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16,
}  # fmt: skip
GEMMA3N: dict[str, Any] = {"laurel_rank": 16, "activation_sparsity_pattern": [0.5] * 2 + [0.0] * 4}
LLAMA4: dict[str, Any] = {
    "layer_types": ["chunked_attention", "chunked_attention", "full_attention", "chunked_attention"],
    "no_rope_layers": [1, 1, 0, 1], "attention_chunk_size": 24, "floor_scale": 8, "attn_scale": 0.5,
    "num_local_experts": 4, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2,
}  # fmt: skip
INDEXED: dict[str, Any] = {"index_topk": 128, "index_head_dim": 16, "index_n_heads": 2}
MLLAMA: dict[str, Any] = {"num_hidden_layers": 6, "cross_attention_layers": [1, 4]}
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8, "image_size": 32, "patch_size": 8,
}  # fmt: skip
QWEN_VISION: dict[str, Any] = {
    "depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 64, "patch_size": 8,
    "deepstack_visual_indexes": [0, 1, 2],
}  # fmt: skip
QWEN35_VISION: dict[str, Any] = {
    name: value for name, value in QWEN_VISION.items() if name != "deepstack_visual_indexes"
}
MLLAMA_VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_global_layers": 2, "attention_heads": 4,
    "image_size": 32, "patch_size": 8, "vision_output_dim": 64, "intermediate_layers_indices": [0, 1],
    "supported_aspect_ratios": [[1, 1]],
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", OPT),
    "opt-norm-after": ("opt", OPT | {"do_layer_norm_before": False}),
    "opt-projected": ("opt", OPT | {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "gpt2": ("gpt2", GPT2),
    "gpt-neox": ("gpt_neox", {}),
    "gpt-bigcode": ("gpt_bigcode", GPT2 | {"multi_query": True}),
    "llama": ("llama", GQA),
    "llama-tied": ("llama", GQA | {"tie_word_embeddings": True}),
    "mistral-window": ("mistral", GQA | {"sliding_window": 7}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", GQA | {"head_dim": 24}),
    "qwen3-moe": ("qwen3_moe", GQA | MOE | {"num_experts": 4}),
    "mixtral": ("mixtral", GQA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": ("gemma2", GQA | {"sliding_window": 7, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", GQA | {"sliding_window": 7, "query_pre_attn_scalar": 16, "num_key_value_heads": 1}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {"num_key_value_heads": 2}),
    "gpt-oss": ("gpt_oss", GQA | {"sliding_window": 7, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmo2": ("olmo2", {"num_key_value_heads": 2}),
    "starcoder2": ("starcoder2", {"num_key_value_heads": 2, "sliding_window": 7}),
    "cohere": ("cohere", {"num_key_value_heads": 2}),
    "granite": ("granite", {"num_key_value_heads": 2, "attention_multiplier": 0.3, "residual_multiplier": 0.8}),
    "deepseek-v3": ("deepseek_v3", MLA | MOE),
    "deepseek-v32-indexed": ("deepseek_v32", MLA | MOE | INDEXED),
    "llama4-chunks": ("llama4_text", GQA | LLAMA4),
    "diffllama-two-calls": ("diffllama", GQA),
    "longcat-two-calls": ("longcat_flash", MLA | LONGCAT),
    "gemma3-wrapper": ("gemma3", {"text_config": TEXT | {"sliding_window": 7}, "vision_config": VISION}),
    "gemma4-wrapper": ("gemma4", {"text_config": TEXT | GEMMA4, "vision_config": VISION, "audio_config": None}),
    "gemma4-shared-kv": ("gemma4_text", GQA | SHARED_KV | {"global_head_dim": 32}),
    "gemma3n-shared-kv": ("gemma3n_text", GQA | SHARED_KV | GEMMA3N),
    "qwen3-vl-wrapper": ("qwen3_vl", {"text_config": TEXT, "vision_config": QWEN_VISION}),
    "mllama-wrapper": ("mllama", {"text_config": TEXT | MLLAMA, "vision_config": MLLAMA_VISION}),
    "qwen3.5-wrapper": ("qwen3_5", {"text_config": SHAPE | DELTA, "vision_config": QWEN35_VISION}),
    "qwen3.5-moe-wrapper": (
        "qwen3_5_moe",
        {
            "text_config": SHAPE | DELTA | EXPERTS | {"shared_expert_intermediate_size": 32},
            "vision_config": QWEN35_VISION,
        },
    ),
}
"""By name: model type, and what its config has beside SHAPE."""
WITH_STATES = {*HYBRIDS, "qwen3.5-wrapper", "qwen3.5-moe-wrapper", "deepseek-v32-indexed"}
FAMILIES |= HYBRIDS


SMALL_PASSES: dict[str, Any] = {
    "dtype": "float32", "micro_batches": 2, "micro_batch_tokens": 32, "max_sequences": 7, "attention_workers": 2,
    "attention_threads": 1, "page_tokens": 16,
}  # fmt: skip
"""Settings of an engine that make even a few short prompts come in chunks, and wait for places."""


def make_model(family: str, directory: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Saves a model of the family, as Transformers saves it; repeatable. The test is skipped where this Transformers is
    too old for it."""
    kind, overrides = FAMILIES[family]
    is_old = Version(transformers.__version__) < Version(STATE_VERSION)
    if kind not in CONFIG_MAPPING or (is_old and family in WITH_STATES):
        pytest.skip(f"Transformers {transformers.__version__} is too old for {family}")
    common = {} if "text_config" in overrides else SHAPE
    config = AutoConfig.for_model(kind, **common | overrides | changes)
    model = _auto_class(config).from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.1 * noise if parameter.dim() == 1 else 1.5 * noise * parameter.shape[-1] ** -0.5
        if name.endswith("A_log"):  # states are kept for long
            parameter.data = 0.5 * noise - 3
    model.to(dtype).save_pretrained(directory, max_shard_size="100KB")
    return directory


def _auto_class(config: Any) -> Any:
    return AutoModelForCausalLM if config.get_text_config() is config else AutoModelForImageTextToText


def make_reciter(directory: Path, answer: list[int], vocab_size: int) -> Path:
    """Saves a GPT-2 whose greedy answer to any prompt of one token is `answer`, of up to 64 tokens: its layers do
    nothing, and each position has a direction of its own that only the token meets which is to follow."""
    config = AutoConfig.for_model("gpt2", **SHAPE | GPT2 | {"vocab_size": vocab_size, "tie_word_embeddings": False})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.data.zero_()
        if name.endswith("ln_f.weight"):
            parameter.data.fill_(1)
    model.transformer.wpe.weight.data.copy_(torch.eye(128, 64))
    for position, token in enumerate(answer):
        model.lm_head.weight.data[token, position] = 1
    model.save_pretrained(directory)
    return directory


def ragged_prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Prompts of token ids, of lengths from 1 to `longest`, both included."""
    rng = random.Random(seed)
    lengths = [1, longest, *(rng.randint(1, longest) for _ in range(count - 2))]
    return [[rng.randrange(3, VOCAB) for _ in range(length)] for length in lengths]


def some_alike(prompts: list[list[int]]) -> list[list[int]]:
    """With the same 20 tokens before every third."""
    beginning = [3 + number % 50 for number in range(20)]
    return [beginning + prompt if number % 3 == 0 else prompt for number, prompt in enumerate(prompts)]


def reference_tokens(directory: Path, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Greedy tokens of Transformers' generate in float32, each prompt alone; end of sequence is a token like others."""
    cls = _auto_class(AutoConfig.from_pretrained(directory))
    model = cls.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    answers = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers
