"""A checkpoint as GGUF in bfloat16: CHECKPOINT FILE; runs in llama.cpp's environment.

Tensor by tensor: the model is never in memory as a whole. The file has no tokenizer: prompts are token ids.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from safetensors import safe_open

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps", "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
EXPERT = re.compile(r"(.*\.mlp\.experts\.)(\d+)\.(.*)")


@dataclasses.dataclass(frozen=True)
class Family:
    """`norm_shift`: what llama.cpp wants added to the weights of norms. `interleave`: q and k rotate pairs there."""

    architecture: str
    names: dict[str, str]
    interleave: bool = False
    norm_shift: float = 0.0


FAMILIES = {
    "llama": Family("llama", NAMES, interleave=True),
    "olmoe": Family("olmoe", NAMES),
    "qwen3_moe": Family("qwen3moe", NAMES),
    "gemma3_text": Family("gemma3", NAMES | GEMMA_NAMES, norm_shift=1.0),
}


class Checkpoint:
    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if self.config["model_type"] not in FAMILIES:
            raise SystemExit(f"the conversion to GGUF does not know {self.config['model_type']}")
        self.family = FAMILIES[self.config["model_type"]]
        parts = [safe_open(part, framework="numpy") for part in sorted(folder.glob("*.safetensors"))]
        self._parts = {name: part for part in parts for name in part.keys()}  # noqa: SIM118
        self._heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}

    def tensors(self) -> Iterator[tuple[str, list[str]]]:
        """Each tensor of the GGUF, and what it is stacked from: the experts of a layer, or one."""
        sources: dict[str, dict[int, str]] = {}
        for name in self._parts:
            expert = EXPERT.fullmatch(name)
            whole = f"{expert[1]}{expert[3]}" if expert else name
            sources.setdefault(name_of(whole, self.family.names), {})[int(expert[2]) if expert else 0] = name
        for name, stacked in sources.items():
            yield name, [stacked[i] for i in sorted(stacked)]

    def shape(self, stacked: list[str]) -> list[int]:
        own = list(self._parts[stacked[0]].get_slice(stacked[0]).get_shape())
        return [len(stacked), *own] if ".experts." in stacked[0] else own

    def read(self, stacked: list[str]) -> np.ndarray:
        tensors = [self._parts[name].get_tensor(name) for name in stacked]
        if ".experts." in stacked[0]:
            return np.stack(tensors)
        projection = stacked[0].split(".")[-2]
        if self.family.interleave and projection in self._heads:
            return interleave(tensors[0], self.config[self._heads[projection]])
        return tensors[0]


def convert(checkpoint: Path, file: Path) -> None:
    source = Checkpoint(checkpoint)
    writer = gguf.GGUFWriter(file, source.family.architecture)
    add_values(writer, source.config)
    tensors = list(source.tensors())
    for name, stacked in tensors:
        shape = source.shape(stacked)
        kind = gguf.GGMLQuantizationType.F32 if in_float32(name) else gguf.GGMLQuantizationType.BF16
        num_bytes = int(np.prod(shape)) * (4 if in_float32(name) else 2)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), num_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, stacked in tensors:
        tensor = source.read(stacked)
        if in_float32(name):
            shift = source.family.norm_shift if name.endswith("norm.weight") else 0.0
            writer.write_tensor_data(tensor.astype(np.float32) + np.float32(shift))
        else:
            writer.write_tensor_data(tensor.astype(ml_dtypes.bfloat16))
    writer.close()


def in_float32(name: str) -> bool:
    """Norms and routers, as llama.cpp's own conversion has them."""
    return name.endswith(("norm.weight", "ffn_gate_inp.weight"))


def add_values(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    rope = config.get("rope_parameters") or {"rope_theta": config["rope_theta"]}
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "num_experts_per_tok" in config:
        writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if config.get("sliding_window"):  # llama.cpp knows which layers have it, and their rotation
        writer.add_sliding_window(config["sliding_window"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")


def name_of(name: str, names: dict[str, str]) -> str:
    module, kind = name.rsplit(".", 1)
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{names[rest]}.{kind}"


def interleave(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from halves, as Transformers rotates them, to pairs, as llama.cpp does."""
    halves = weight.reshape(num_heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
