"""Model shapes with random weights, written as checkpoints layer by layer: the model is never in memory as a whole.

python -m benchmarks.peers.shapes opt-6.7b FOLDER
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Shape:
    name: str
    model_type: str  # as Transformers calls it
    config: dict[str, int]
    group_bytes: int  # memory of workload D
    group_tokens: int = 16  # generated per prompt in workload D
    dtype: str = "bfloat16"  # of the checkpoint; all is computed in bfloat16

    @property
    def vocab_size(self) -> int:
        return self.config["vocab_size"]


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


SHAPES = {
    shape.name: shape
    for shape in (
        _opt("opt-1.3b", 2048, 24, 32, 2 * GIB),
        _opt("opt-6.7b", 4096, 32, 32, 6 * GIB, group_tokens=8),
        # as OPT is published; a cast keeps Transformers from mapping the file as it is
        _opt("opt-1.3b-fp16", 2048, 24, 32, 2 * GIB, dtype="float16"),
        _opt("opt-6.7b-fp16", 4096, 32, 32, 6 * GIB, group_tokens=8, dtype="float16"),
        _llama("llama-1.1b", 2048, 5632, 22, 32, 4, 3 * GIB // 2),
        # to try the command itself with
        _opt("tiny-opt", 256, 4, 4, GIB),
        _llama("tiny-llama", 256, 512, 4, 4, 2, GIB),
    )
}


def write_checkpoint(shape: Shape, folder: Path) -> None:
    """Safetensors, a file per layer, with an index; weights as Transformers initialises them."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(shape.model_type, **shape.config, dtype=shape.dtype)
    config.architectures = [{"opt": "OPTForCausalLM", "llama": "LlamaForCausalLM"}[shape.model_type]]
    if shape.model_type == "llama":
        config.tie_word_embeddings = False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    files: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in tied:
            files.setdefault(_file_of(name), {})[name] = parameter.shape
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


def _file_of(name: str) -> str:
    layer = re.search(r"\.layers\.(\d+)\.", name)
    return f"model-layer-{int(layer[1]):02}.safetensors" if layer else "model-outside.safetensors"


def _random(name: str, size: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    import torch

    if name.endswith("bias"):
        return torch.zeros(size, dtype=dtype)
    if "norm" in name:
        return torch.ones(size, dtype=dtype)
    return torch.empty(size, dtype=dtype).normal_(0.0, 0.02, generator=generator)


if __name__ == "__main__":
    write_checkpoint(SHAPES[sys.argv[1]], Path(sys.argv[2]))
