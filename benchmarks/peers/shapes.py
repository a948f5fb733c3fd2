"""Model shapes with random weights, written as checkpoints layer by layer: the model is never in memory as a whole.

python -m benchmarks.peers.shapes opt-6.7b FOLDER
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers.room import require_room

if TYPE_CHECKING:
    import torch

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Shape:
    name: str
    model_type: str  # as Transformers calls it
    config: dict[str, Any]
    group_bytes: int  # memory of workload D
    group_tokens: int = 16  # generated per prompt in workload D
    dtype: str = "bfloat16"  # of the checkpoint; all is computed in bfloat16

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])


def _opt(name: str, hidden: int, layers: int, heads: int, group_bytes: int, **more: Any) -> Shape:
    config = {
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        "vocab_size": 50272,
    }
    return Shape(name, "opt", config, group_bytes, **more)


def _llama(name: str, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, group_bytes: int) -> Shape:
    config = {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048,
        "vocab_size": 32000,
    }
    return Shape(name, "llama", config, group_bytes)


def _olmoe(name: str, hidden: int, mlp: int, layers: int, heads: int, experts: int, group_bytes: int) -> Shape:
    config = {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 4096,
        "vocab_size": 50304,
    }
    return Shape(name, "olmoe", config, group_bytes)


def _qwen3_moe(
    name: str, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, experts: int, group_bytes: int
) -> Shape:
    config = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,  # of no layer: all have experts
        "moe_intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        "vocab_size": 151936,
        "bos_token_id": 151643,
        "eos_token_id": 151645,  # OpenVINO GenAI wants one
    }
    return Shape(name, "qwen3_moe", config, group_bytes)


ARCHITECTURES = {
    "opt": "OPTForCausalLM",
    "llama": "LlamaForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
SHAPES = {
    shape.name: shape
    for shape in (
        _opt("opt-1.3b", 2048, 24, 32, 2 * GIB),
        _opt("opt-6.7b", 4096, 32, 32, 6 * GIB, group_tokens=8),
        # as OPT is published; a cast keeps Transformers from mapping the file as it is
        _opt("opt-1.3b-fp16", 2048, 24, 32, 2 * GIB, dtype="float16"),
        _opt("opt-6.7b-fp16", 4096, 32, 32, 6 * GIB, group_tokens=8, dtype="float16"),
        _llama("llama-1.1b", 2048, 5632, 22, 32, 4, 3 * GIB // 2),
        _olmoe("olmoe", 2048, 1024, 16, 16, 64, 6 * GIB),
        # a quarter of its layers, so that it fits in 24 GiB
        _qwen3_moe("qwen3-30b-12", 2048, 768, 12, 32, 4, 128, 6 * GIB),
        # to try the command itself with
        _opt("tiny-opt", 256, 4, 4, GIB),
        _llama("tiny-llama", 256, 512, 4, 4, 2, GIB),
        _olmoe("tiny-olmoe", 256, 128, 4, 4, 16, GIB),
        _qwen3_moe("tiny-qwen3-moe", 256, 128, 4, 4, 2, 16, GIB),
    )
}


def write_checkpoint(shape: Shape, folder: Path) -> None:
    """Safetensors, a file per layer, with an index; weights as Transformers initialises them, names as published.

    Raises:
        RuntimeError: the disk has no room.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(shape.model_type, **shape.config, dtype=shape.dtype)
    config.architectures = [ARCHITECTURES[shape.model_type]]
    if shape.model_type != "opt":
        config.tie_word_embeddings = False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in tied:
            files.setdefault(_file_of(name), {}).update(published(name, tuple(parameter.shape)))
    require_room(folder.parent, 2 * sum(math.prod(size) for sizes in files.values() for size in sizes.values()))
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    total = 0
    folder.mkdir(parents=True)
    for file, parameters in files.items():
        tensors = {
            name: _random(name, size, getattr(torch, shape.dtype), generator) for name, size in parameters.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    config.save_pretrained(folder)


def published(name: str, size: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and sizes under which a parameter of Transformers is published: experts are stacked there, single here."""
    stem, _, projection = name.rpartition(".experts.")
    if projection == "gate_up_proj":
        for expert in range(size[0]):
            for half in ("gate_proj", "up_proj"):
                yield f"{stem}.experts.{expert}.{half}.weight", (size[1] // 2, size[2])
    elif projection == "down_proj":
        for expert in range(size[0]):
            yield f"{stem}.experts.{expert}.down_proj.weight", size[1:]
    else:
        yield name, size


def _file_of(name: str) -> str:
    layer = re.search(r"\.layers\.(\d+)\.", name)
    return f"model-layer-{int(layer[1]):02}.safetensors" if layer else "model-outside.safetensors"


def _random(name: str, size: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    import torch

    if name.endswith("bias"):
        return torch.zeros(size, dtype=dtype)
    if "norm" in name:
        return torch.ones(size, dtype=dtype)
    return torch.empty(size, dtype=dtype).normal_(0.0, 0.02, generator=generator)


if __name__ == "__main__":
    write_checkpoint(SHAPES[sys.argv[1]], Path(sys.argv[2]))
