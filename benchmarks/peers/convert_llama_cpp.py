"""A Llama checkpoint as GGUF in bfloat16: CHECKPOINT FILE; runs in llama.cpp's environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def convert(checkpoint: Path, file: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(file, "llama", use_temp_file=False)
    add_values(writer, config)
    for part in sorted(checkpoint.glob("*.safetensors")):
        for name, tensor in load_file(part).items():
            projection = name.split(".")[-2]
            if projection in heads:
                tensor = interleave(tensor, heads[projection])
            if tensor.ndim == 1:
                writer.add_tensor(name_of(name), tensor.astype(np.float32))
            else:
                kind = gguf.GGMLQuantizationType.BF16
                writer.add_tensor(name_of(name), tensor.view(np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_values(writer: gguf.GGUFWriter, config: dict) -> None:
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")


def name_of(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{kind}"


def interleave(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from halves, as Transformers rotates them, to pairs, as llama.cpp does."""
    halves = weight.reshape(num_heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


if __name__ == "__main__":
    assert ml_dtypes.bfloat16  # safetensors' arrays need it
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
