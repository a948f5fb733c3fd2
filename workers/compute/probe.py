"""Proof that our path and Transformers' own give the same logits for a model class that the tests do not cover.

A tiny model of the class with random weights runs ragged sequences both ways: Transformers' forward over each whole
sequence alone, and ours in packed micro-batches, interleaved layer by layer, with a prefill and then single tokens.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import greenlet
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from flexgen_lite.workers.compute.attention_call import AttentionCall, ModelGreenlet
from flexgen_lite.workers.compute.prefill_attention import causal_attention
from flexgen_lite.workers.model import builder as model_builder
from flexgen_lite.workers.serve import UserError

TESTED_TYPES: frozenset[str] = frozenset(
    {
        "opt", "gpt2", "gpt_neox", "gpt_bigcode", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral",
        "gemma2", "gemma3_text", "phi", "phi3", "gpt_oss", "olmo2", "starcoder2", "cohere", "granite", "deepseek_v3",
    }
)  # fmt: skip
TOLERANCE = 2e-3  # of the largest logit; a wrong mask or position is off by far more
LENGTHS = ((11, 3), (5, 17))  # prompt lengths of two micro-batches
STEPS = 4
TINY = {
    "vocab_size": 128, "hidden_size": 64, "n_embd": 64, "word_embed_proj_dim": 64, "head_dim": 16,
    "intermediate_size": 96, "ffn_dim": 96, "n_inner": 96, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "mlp_hidden_size": 96, "num_attention_heads": 4, "n_head": 4,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_topk": 2,
    "n_group": 1, "topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "qk_head_dim": 24, "v_head_dim": 16, "sliding_window": 8, "first_k_dense_replace": 1,
    "max_position_embeddings": 256, "n_positions": 256, "query_pre_attn_scalar": 16, "attention_dropout": 0.0,
}  # fmt: skip


def prove(config: PreTrainedConfig) -> None:
    """Raises UserError where the class's answers differ, or no tiny model of it can be made."""
    kind = config.model_type
    try:
        tiny = tiny_config(config)
        theirs = _random_model(tiny, "eager")
        ours = _random_model(tiny, model_builder.ATTENTION_NAME)
        ours.load_state_dict(theirs.state_dict())
        error = largest_error(theirs, ours)
    except UserError:
        raise
    except Exception as reason:  # whatever a class unknown to us may raise: it is not proven, so it is refused
        raise UserError(
            f"{kind} is not among the tested model types, and the tiny model that was to prove it failed: "
            f"{type(reason).__name__}: {reason}"
        ) from reason
    if error > TOLERANCE:
        raise UserError(
            f"{kind} is not among the tested model types, and a tiny model of it gives other logits here than in "
            f"Transformers (relative error {error:.1g}, {TOLERANCE:.1g} allowed): it cannot be served"
        )


def tiny_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config with its sizes shrunk and its character kept: norms, activations, kinds of layers, ratio of heads."""
    values = copy.deepcopy(config.to_dict())
    layer_types = list(values.get("layer_types") or [])
    layers = max(2, max((layer_types.index(kind) + 1 for kind in set(layer_types)), default=2))
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    for key, value in TINY.items():
        if isinstance(values.get(key), int | float) and not isinstance(values[key], bool):
            values[key] = value
    for key in ("num_hidden_layers", "n_layer", "num_layers"):
        if key in values:
            values[key] = layers
    for key, value in values.items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            values[key] = value[:layers]
    if "num_key_value_heads" in values:
        values["num_key_value_heads"] = 4 if kv_heads in (None, heads) else 1 if kv_heads == 1 else 2
    if "head_dim" in values:
        values["head_dim"] = TINY["qk_rope_head_dim" if "qk_rope_head_dim" in values else "head_dim"]
    for number, key in enumerate(("pad_token_id", "bos_token_id", "eos_token_id")):
        values[key] = number
    values["dtype"] = "float32"
    return type(config).from_dict(values)


def _random_model(config: PreTrainedConfig, attention: str) -> PreTrainedModel:
    cls = model_builder.causal_lm_class(config)
    generator = torch.Generator().manual_seed(0)
    model: PreTrainedModel = cls._from_config(
        copy.deepcopy(config), dtype=torch.float32, attn_implementation=attention
    ).eval()
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.1 * noise if parameter.dim() == 1 else noise * parameter.shape[-1] ** -0.5
    return model


class _PackedForward(ModelGreenlet):
    """One pass of a micro-batch: the given new tokens of each sequence behind those whose K and V are kept."""

    def __init__(self, model: PreTrainedModel, new_tokens: list[torch.Tensor], kept: list[dict[int, Any]]) -> None:
        super().__init__(self._forward)
        self._model, self._new_tokens, self._kept = model, new_tokens, kept
        self._layer = -1
        self.logits: list[torch.Tensor] = []

    def _forward(self) -> None:
        starts = [kept[0][0].shape[1] if kept else 0 for kept in self._kept]
        positions = [start + i for start, new in zip(starts, self._new_tokens, strict=True) for i in range(len(new))]
        output = self._model(
            input_ids=torch.cat(self._new_tokens)[None], position_ids=torch.tensor([positions]), use_cache=False
        )
        self.logits = list(output.logits[0].split([len(new) for new in self._new_tokens]))

    def attend(self, call: AttentionCall) -> torch.Tensor:
        self._layer += 1
        layer = self._layer
        assert isinstance(self.parent, greenlet.greenlet)
        self.parent.switch()  # another micro-batch runs now
        outputs, row = [], 0
        for new, kept in zip(self._new_tokens, self._kept, strict=True):
            rows = slice(row, row + len(new))
            keys_GSD, values_GSE = call.key_BGTD[0, :, rows], call.value_BGTE[0, :, rows]
            if layer in kept:
                keys_GSD = torch.cat([kept[layer][0], keys_GSD], dim=1)
                values_GSE = torch.cat([kept[layer][1], values_GSE], dim=1)
            kept[layer] = (keys_GSD, values_GSE)
            outputs.append(causal_attention(call, rows, keys_GSD, values_GSE))
            row += len(new)
        return torch.cat(outputs)[None]


def largest_error(theirs: PreTrainedModel, ours: PreTrainedModel) -> float:
    """Largest difference of the logits of all tokens, relative to the largest logit."""
    generator = torch.Generator().manual_seed(1)
    vocab = theirs.config.vocab_size
    batches = [[torch.randint(vocab, (length + STEPS,), generator=generator) for length in group] for group in LENGTHS]
    found: dict[tuple[int, int], list[torch.Tensor]] = defaultdict(list)
    kept: list[list[dict[int, Any]]] = [[{} for _ in group] for group in LENGTHS]
    with torch.no_grad():
        for step in range(STEPS + 1):
            forwards = []
            for k, (group, tokens) in enumerate(zip(LENGTHS, batches, strict=True)):
                ends = [length + step for length in group]
                begins = [0 if step == 0 else end - 1 for end in ends]
                new = [t[begin:end] for t, begin, end in zip(tokens, begins, ends, strict=True)]
                forwards.append(_PackedForward(ours, new, kept[k]))
            while not all(forward.dead for forward in forwards):
                for forward in forwards:
                    if not forward.dead:
                        forward.switch()
            for k, forward in enumerate(forwards):
                for i, logits in enumerate(forward.logits):
                    found[k, i].append(logits)
        error, largest = 0.0, 1e-9
        for (k, i), parts in found.items():
            expected = theirs(input_ids=batches[k][i][None], use_cache=False).logits[0]
            error = max(error, float((torch.cat(parts) - expected).abs().max()))
            largest = max(largest, float(expected.abs().max()))
    return error / largest if error == error else float("inf")  # a NaN is no proof
