"""Bytes of a sequence's state in models as they are published, without their weights: in bfloat16, of which recurrent
matrices are kept in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from flexgen_lite.model.spec import STATE_ALIGNMENT
from flexgen_lite.workers.compute import attention_call, experts
from flexgen_lite.workers.compute.trial import find_text_path
from flexgen_lite.workers.model import builder

LFM2 = ["full_attention" if layer in (2, 6, 10, 14, 18, 21) else "conv" for layer in range(24)]
GRANITE = ["full_attention" if layer in (5, 15, 25, 35) else "linear_attention" for layer in range(40)]
GRANITE_4_H_SMALL: dict[str, Any] = {
    "num_hidden_layers": 40, "hidden_size": 4096, "mamba_n_heads": 128, "mamba_d_head": 64, "mamba_d_state": 128,
    "mamba_n_groups": 1, "layer_types": GRANITE, "num_local_experts": 2,
}  # fmt: skip
NEMOTRON = ["linear_attention", "moe"] * 17 + ["full_attention", "linear_attention", "moe"] * 6
NEMOTRON_3_NANO: dict[str, Any] = {
    "num_hidden_layers": 52, "hidden_size": 2688, "mamba_num_heads": 64, "mamba_head_dim": 64, "ssm_state_size": 128,
    "n_groups": 8, "conv_kernel": 4, "layers_block_type": NEMOTRON, "n_routed_experts": 8,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any], int, int, int]] = {
    "Qwen3.5-35B-A3B": ("qwen3_5_moe_text", {"num_experts": 8}, 30, 65_536, 2_097_152),
    "Qwen3.5-9B": ("qwen3_5_text", {}, 24, 65_536, 2_097_152),
    "Qwen3-Next-80B-A3B": ("qwen3_next", {"num_experts": 16}, 36, 65_536, 2_097_152),
    "Granite-4.0-H-Small": ("granitemoehybrid", GRANITE_4_H_SMALL, 36, 67_584, 4_194_304),
    "Nemotron-3-Nano-30B-A3B": ("nemotron_h", NEMOTRON_3_NANO, 23, 49_152, 2_097_152),
    "LFM2-8B-A1B": ("lfm2_moe", {"num_hidden_layers": 24, "layer_types": LFM2}, 18, 12_288, 0),
    "LFM3": ("lfm3", {}, 13, 28_672, 0),
    "Kimi-Linear-48B-A3B": ("kimi_linear", {"num_experts": 8}, 21, 98_304, 2_097_152),
    "Bailing-Hybrid": ("bailing_hybrid", {"num_experts": 16}, 35, 98_304, 2_097_152),
    "Olmo-Hybrid-7B": ("olmo_hybrid", {}, 24, 92_160, 2_211_840),
}
"""By name: type, settings beside the type's own, layers with state, and bytes of one of them: columns of convolutions,
recurrent matrices."""
KINDS = ("layers_block_type", "layer_types")
WITH_STATE = {"linear_attention", "conv"}


@pytest.mark.parametrize("name", MODELS)
def test_bytes_of_a_sequence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first layers, of each kind at least one; the others are like these."""
    monkeypatch.setattr("flexgen_lite.workers.compute.trial.MOST_ROWS", 4)
    kind, settings, num_layers, conv, recurrent = MODELS[name]
    attention_call.register()
    experts.register()
    config = AutoConfig.for_model(kind, **settings)
    key = next(key for key in KINDS if getattr(config, key, None) is not None)
    kinds = list(getattr(config, key))
    assert sum(one in WITH_STATE for one in kinds) == num_layers
    few = 1 + max(map(kinds.index, kinds))
    if few < len(kinds):
        config = AutoConfig.for_model(kind, **settings | {"num_hidden_layers": few, key: kinds[:few]})
    found = find_text_path(builder.build(config, torch.bfloat16)).states
    layers = {state.layer for state in found}
    assert len(layers) == sum(one in WITH_STATE for one in kinds[:few])
    for layer in layers:
        own = [state for state in found if state.layer == layer]
        assert sum(state.num_bytes for state in own if state.kind == "conv") == conv
        assert sum(state.num_bytes for state in own if state.kind == "recurrent") == recurrent
        assert {state.dtype for state in own if state.kind == "recurrent"} <= {"float32"}
    end = found[-1].offset + found[-1].num_bytes
    assert 0 <= end - len(layers) * (conv + recurrent) <= STATE_ALIGNMENT * len(found)
