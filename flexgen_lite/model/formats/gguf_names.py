"""What GGUF and Transformers call the same tensors and sizes, by the architectures of GGUF files that are read.

Sources: ggml's docs/gguf.md; llama.cpp's convert_hf_to_gguf.py and src/llama-model.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_OUTSIDE = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate", "ffn_gate_exps": "mlp.experts.{}.gate_proj", "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj", "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}  # fmt: skip
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate", "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2", "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
}  # fmt: skip
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
"""Tensors of all experts `[E, N, K]`; of their names {} is the number of one."""

SIZES = {
    "context_length": "max_position_embeddings", "block_count": "num_hidden_layers", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "expert_used_count": "num_experts_per_tok",
}  # fmt: skip
"""Values of every architecture, and their names in config.json."""
_HEAD = {"attention.key_length": "head_dim"}
_OF_EXPERTS = {"expert_count": "num_experts", "expert_feed_forward_length": "moe_intermediate_size"}
_SOFTCAPS = {
    "attention.sliding_window": "sliding_window", "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Architecture:
    """
    Attributes:
        model_type: Transformers'.
        sizes: values beside SIZES, and their names in config.json.
        fixed: what config.json has that the file does not say.
        layer: tensors of a layer that have other names than those of most.
        pairs_rows: rows of q and k are ordered by pairs.
        norm_shift: what is added to the weights of norms.
        with_experts: the model type where there are experts, if that is another one.
    """

    model_type: str
    sizes: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, object] = field(default_factory=dict)
    layer: Mapping[str, str] = field(default_factory=dict)
    pairs_rows: bool = False
    norm_shift: float = 0.0
    with_experts: str = ""

    @property
    def outside(self) -> Mapping[str, str]:
        return _OUTSIDE

    def names(self, num_experts: int) -> Mapping[str, str]:
        """Of a layer's tensors."""
        return {**_LAYER, **(_MIXTRAL if num_experts and self.with_experts else _EXPERTS), **self.layer}


ARCHITECTURES = {
    "llama": Architecture(
        "llama", {**_HEAD, "expert_count": "num_local_experts"}, pairs_rows=True, with_experts="mixtral"
    ),
    "qwen2": Architecture("qwen2"),
    "qwen2moe": Architecture(
        "qwen2_moe", {**_OF_EXPERTS, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
    ),
    "qwen3": Architecture("qwen3", _HEAD),
    "qwen3moe": Architecture("qwen3_moe", {**_HEAD, **_OF_EXPERTS}, {"norm_topk_prob": True}),
    "olmoe": Architecture("olmoe", {"expert_count": "num_experts"}),
    "gemma": Architecture("gemma", _HEAD, norm_shift=1.0),
    "gemma2": Architecture("gemma2", {**_HEAD, **_SOFTCAPS}, layer=_FOUR_NORMS, norm_shift=1.0),
    "gemma3": Architecture("gemma3_text", {**_HEAD, **_SOFTCAPS}, layer=_FOUR_NORMS, norm_shift=1.0),
    "phi3": Architecture(
        "phi3",
        {"attention.sliding_window": "sliding_window"},
        layer={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    ),
}
"""By `general.architecture`."""
