"""Large models in the formats that they are published in, with random bytes: run within budgets that only these fit.

    python -m benchmarks.published [--shapes gpt-oss-20b-6,qwen3-30b-12] [--prompts N] [--generate N] [--folder FOLDER]

gpt-oss-20b's shape cut to 6 layers, its experts in MXFP4; Qwen3-30B-A3B's cut to 12 layers, in FP8 with scales by
blocks. Tells what the checkpoint takes, what 16 bits would take, what a pass reads from disk, and the engine's peak.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from flexgen_lite import FlexGenLite, SamplingParams
from flexgen_lite.text.sizes import format_size

GIB = 1 << 30
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """Attributes:
    stored: the tensors that a weight is stored as, from its name and shape; itself where it stays in bfloat16.
    budget: memory of the engine.
    """

    model_type: str
    config: dict[str, Any]
    quantization: dict[str, Any]
    stored: Callable[[str, tuple[int, ...]], Tensors]
    budget: str


def _floats(shape: tuple[int, ...], size: float = 0.02) -> torch.Tensor:
    return (size * torch.randn(shape)).bfloat16()


def _bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _plain(name: str, shape: tuple[int, ...]) -> Tensors:
    return {name: torch.ones(shape).bfloat16() if "norm" in name else _floats(shape)}


def _mxfp4(name: str, shape: tuple[int, ...]) -> Tensors:
    """Of gpt-oss: experts alone; the model has them as `[E, K, N]`."""
    if not name.endswith(("gate_up_proj", "down_proj")):
        return _plain(name, shape)
    count, width, columns = shape
    exponents = torch.randint(118, 121, (count, columns, width // 32), dtype=torch.uint8)
    return {f"{name}_blocks": _bytes(count, columns, width // 32, 16), f"{name}_scales": exponents}


def _block_fp8(name: str, shape: tuple[int, ...]) -> Tensors:
    """Of Qwen3: all linear layers but the head and routers, experts one by one."""
    if name.endswith("experts.gate_up_proj"):
        prefix, inner = name.removesuffix("gate_up_proj"), (shape[1] // 2, shape[2])
        parts = [(f"{prefix}{i}.{part}_proj.weight", inner) for i in range(shape[0]) for part in ("gate", "up")]
    elif name.endswith("experts.down_proj"):
        prefix = name.removesuffix("down_proj")
        parts = [(f"{prefix}{i}.down_proj.weight", shape[1:]) for i in range(shape[0])]
    elif name.endswith("_proj.weight"):
        parts = [(name, shape)]
    else:
        return _plain(name, shape)
    found = {}
    for part, (columns, width) in parts:
        found[part] = (6 * torch.randn(columns, width)).to(torch.float8_e4m3fn)
        blocks = (math.ceil(columns / 128), math.ceil(width / 128))
        found[f"{part}_scale_inv"] = 0.003 * (1 + torch.rand(blocks))
    return found


SHAPES = {
    "gpt-oss-20b-6": Shape(
        "gpt_oss",
        {
            "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 6, "num_attention_heads": 64,
            "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088, "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 3, "tie_word_embeddings": False,
        },
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]},
        _mxfp4,
        "5GiB",
    ),
    "qwen3-30b-12": Shape(
        "qwen3_moe",
        {
            "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 12,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
            "num_experts_per_tok": 8, "norm_topk_prob": True, "vocab_size": 151936, "tie_word_embeddings": False,
        },
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
        _block_fp8,
        "6GiB",
    ),
}  # fmt: skip


def write(shape: Shape, folder: Path) -> tuple[int, int]:
    """Bytes of the checkpoint's weights, and what they would be in 16 bits; a file for each layer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(shape.model_type, **shape.config, dtype="bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    files: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, parameter in model.named_parameters():
        layer = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{layer}.safetensors", []).append((name, tuple(parameter.shape)))
    folder.mkdir(parents=True, exist_ok=True)
    weight_map, stored, plain = {}, 0, 0
    for file, parameters in files.items():
        tensors: Tensors = {}
        for name, size in parameters:
            tensors |= shape.stored(name, size)
            plain += 2 * math.prod(size)
        save_file(tensors, folder / file)
        stored += sum(tensor.nbytes for tensor in tensors.values())
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": shape.quantization}))
    return stored, plain


def run(shape: Shape, folder: Path, num_prompts: int, generate: int) -> None:
    prompts = [[(7 * i + j) % 5000 + 10 for j in range(64)] for i in range(num_prompts)]
    params = SamplingParams(max_tokens=generate, temperature=0.0, ignore_eos=True)
    with FlexGenLite(str(folder), dtype="bfloat16", ram=shape.budget) as engine:
        begun = time.perf_counter()
        answers = engine.generate(prompts, params)
        seconds = time.perf_counter() - begun
        status = engine.status()
    assert all(len(answer.outputs[0].token_ids) == generate for answer in answers)
    read = int(status.totals["disk_read_bytes"] / status.totals["passes"])
    rate = num_prompts * generate / seconds
    print(
        f"  {num_prompts} prompts of 64, {generate} generated: {seconds:.1f} s, {rate:.1f} tok/s, "
        f"{format_size(read)} read in a pass, peak {format_size(status.memory['peak'])}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--generate", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where checkpoints are kept; else they are removed")
    args = parser.parse_args()
    for name in args.shapes.split(","):
        with tempfile.TemporaryDirectory() as temporary:
            folder = (args.folder or Path(temporary)) / name
            if not (folder / "config.json").exists():
                stored, plain = write(SHAPES[name], folder)
                print(f"{name}: {format_size(stored)}, in 16 bits {format_size(plain)}; budget {SHAPES[name].budget}")
            run(SHAPES[name], folder, args.prompts, args.generate)


if __name__ == "__main__":
    main()
