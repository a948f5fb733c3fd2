"""Tiny models of the types that keep other state than keys and values: their configs beside SHAPE of tiny_models.py."""

from __future__ import annotations

from typing import Any

KV: dict[str, Any] = {"num_hidden_layers": 3, "num_key_value_heads": 2}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
KINDS: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
DELTA: dict[str, Any] = (
    KV
    | KINDS
    | {
        "head_dim": 16, "linear_key_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_value_head_dim": 16,
    }
)  # fmt: skip
KDA: dict[str, Any] = KINDS | {
    "num_hidden_layers": 3, "num_key_value_heads": 4, "head_dim": 8, "kv_lora_rank": 16, "linear_head_dim": 16,
    "linear_num_heads": 4, "mlp_layer_types": ["dense", "sparse", "dense"], "moe_intermediate_size": 32,
    "num_experts": 4, "num_experts_per_token": 2, "qk_head_dim": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}  # fmt: skip
MAMBA2: dict[str, Any] = KV | {"mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_heads": 8}
BLOCKS = ["linear_attention", "moe", "full_attention", "mlp", "linear_attention", "mlp"]
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-next": ("qwen3_next", DELTA | EXPERTS | {"shared_expert_intermediate_size": 32}),
    "qwen3.5": ("qwen3_5_text", DELTA),
    "qwen3.5-moe": ("qwen3_5_moe_text", DELTA | EXPERTS | {"shared_expert_intermediate_size": 32}),
    "olmo-hybrid": ("olmo_hybrid", {key: value for key, value in DELTA.items() if key != "head_dim"}),
    "kimi-linear": ("kimi_linear", KDA),
    "bailing-hybrid": (
        "bailing_hybrid",
        KDA | {"first_k_dense_replace": 1, "num_expert_group": 1, "num_nextn_predict_layers": 0, "topk_group": 1},
    ),
    "lfm2": ("lfm2", KV | {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "conv", "full_attention"]}),
    "lfm2-moe": (
        "lfm2_moe",
        KV
        | EXPERTS
        | {
            "num_hidden_layers": 4,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        },
    ),
    "lfm3": (
        "lfm3",
        KV
        | {
            "conv_L_cache": 3, "head_dim": 16, "sliding_window": 8,
            "layer_types": ["conv", "full_attention", "sliding_attention"],
        },
    ),
    "bamba": ("bamba", MAMBA2 | {"attn_layer_indices": [1]}),
    "falcon-h1": ("falcon_h1", MAMBA2 | {"mamba_chunk_size": 16, "mamba_d_ssm": 128}),
    "granite-hybrid": ("granitemoehybrid", MAMBA2 | KINDS | {"num_local_experts": 4, "shared_intermediate_size": 48}),
    "nemotron-h": (
        "nemotron_h",
        {
            "num_hidden_layers": len(BLOCKS), "layers_block_type": BLOCKS, "head_dim": 16, "mamba_head_dim": 16,
            "mamba_num_heads": 8, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32, "n_group": 1,
            "n_groups": 1, "n_routed_experts": 4, "num_key_value_heads": 2, "ssm_state_size": 16,
        },
    ),
    "zamba2": (
        "zamba2",
        {
            "num_hidden_layers": 3, "attention_head_dim": 32, "attention_hidden_size": 128, "hybrid_layer_ids": [1],
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention"], "mamba_d_state": 16,
            "mamba_headdim": 16, "num_key_value_heads": 4,
        },
    ),
    "jamba": (
        "jamba",
        {"num_key_value_heads": 2, "attn_layer_offset": 1, "attn_layer_period": 2, "num_experts": 4,
         "mamba_dt_rank": 8},
    ),
    "mamba": ("mamba", {"num_hidden_layers": 3}),
    "falcon-mamba": ("falcon_mamba", {"num_hidden_layers": 3}),
    "mamba2": ("mamba2", {"num_hidden_layers": 3, "head_dim": 16, "n_groups": 1, "num_heads": 8, "state_size": 16}),
    "minimax": ("minimax", KV | KINDS | EXPERTS | {"head_dim": 16, "block_size": 16}),
    "zaya": (
        "zaya",
        KV
        | {
            "layer_types": ["hybrid", "hybrid_sliding", "hybrid"], "sliding_window": 7, "head_dim": 16,
            "moe_intermediate_size": 32, "num_experts": 4, "router_hidden_size": 32,
        },
    ),
    "zamba": (
        "zamba",
        {"num_hidden_layers": 5, "attn_layer_offset": 1, "attn_layer_period": 2, "mamba_dt_rank": 8,
         "num_key_value_heads": 4},
    ),
    "recurrent-gemma": (
        "recurrent_gemma", {"num_hidden_layers": 5, "num_key_value_heads": 1, "attention_window_size": 7},
    ),
}  # fmt: skip
"""By name: model type, and what its config has beside SHAPE."""
