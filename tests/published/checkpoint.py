"""Checkpoints in formats that are published, written from a tiny model; beside each the model that it stands for."""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import make_model

Parts = dict[str, torch.Tensor]
Written = tuple[Parts, torch.Tensor]
"""The tensors of a layer, by what follows its name, and the weight that they stand for, in float32."""
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
SIZES: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "opt": {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 192},
    "qwen3-moe": WIDE | {"moe_intermediate_size": 96},
    "mixtral": WIDE,
    "gpt-oss": WIDE,
    "deepseek-v3": WIDE
    | {"head_dim": 8, "moe_intermediate_size": 96, "q_lora_rank": 64, "kv_lora_rank": 32, "v_head_dim": 16},
}
"""By family: sizes that the formats allow. Blocks of 128 rows or inputs are cut at the edges; runs of 64 items go on in
the next row."""
_LINEAR = re.compile(r".*layers\..*(proj|proj_with_mqa|fc1|fc2|w1|w2|w3)(\.weight)?$")


@dataclass(frozen=True)
class Format:
    """
    Attributes:
        write: a layer, by its name; None leaves it as it is.
        section: what is said of it in `file`.
        num_files: that the tensors are dealt out to, so that a layer's parts are in several.
        metadata: of the files, from the names of all tensors and those of the layers that are written.
        joins_experts: of a layer are one tensor.
    """

    write: Callable[[str, torch.Tensor], Written | None]
    section: Mapping[str, Any]
    file: str = "config.json"
    num_files: int = 2
    metadata: Callable[[list[str], dict[str, torch.Tensor]], dict[str, str]] = lambda names, layers: {}
    joins_experts: bool = False


def base_model(family: str, directory: Path, **changes: Any) -> Path:
    return make_model(family, directory, torch.bfloat16, **SIZES[family] | changes)


def publish(model: Path, target: Path, form: Format, more: str = "nothing") -> Path:
    """Writes `model` in a format, with weights that make mistakes show.

    Args:
        more: what the names of layers have in them that are written so, too; an expression.

    Returns:
        Beside `target`: the model that it stands for, as Transformers saves it, in float32.
    """
    exact = target.with_name(f"{target.name}-exact")
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(model.glob("*.safetensors")):
        tensors |= load_file(path)
    tensors = _with_joined_experts(tensors) if form.joins_experts else tensors
    new, layers, left = {}, {}, {}
    for name, tensor in tensors.items():
        layer, written = name.removesuffix(".weight"), None
        if (_LINEAR.match(name) or re.search(more, name)) and tensor.dim() > 1:
            tensor = sharpened(name, tensor.float()).bfloat16()
            written = form.write(layer, tensor.float())
        if written is None:
            new[name], left[name] = tensor, tensor.float()
        else:
            new |= {layer + part: values.contiguous() for part, values in written[0].items()}
            left[name] = layers[layer] = written[1].contiguous()
    config = json.loads((model / "config.json").read_text())
    _save(exact, {"model.safetensors": left}, {"format": "pt"}, config)
    said = config | {"quantization_config": dict(form.section)} if form.file == "config.json" else config
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for number, (name, tensor) in enumerate(new.items()):
        file = f"model-{number % form.num_files + 1:05}-of-{form.num_files:05}.safetensors"
        shards.setdefault(file, {})[name] = tensor.clone()
    _save(target, shards, {"format": "pt"} | form.metadata(list(tensors), layers), said)
    if form.file != "config.json":
        (target / form.file).write_text(json.dumps(dict(form.section)))
    generation = model / "generation_config.json"
    for directory in (target, exact):
        if generation.exists():
            shutil.copy(generation, directory)
    return exact


def _save(
    target: Path, shards: dict[str, dict[str, torch.Tensor]], metadata: dict[str, str], config: dict[str, Any]
) -> None:
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    for file, tensors in shards.items():
        save_file(tensors, target / file, metadata=metadata)
    if "model.safetensors" not in shards:
        index = {name: file for file, tensors in shards.items() for name in tensors}
        (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def sharpened(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Neighbouring groups of 16 inputs are of other sizes and about another middle. A row is zero, another one in part,
    and one has no negative item; queries and keys are larger, so that positions count."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    turned = weight.transpose(1, 2) if weight.dim() == 3 else weight
    rows = turned.reshape(-1, turned.shape[-1]).clone()
    runs = rows.view(len(rows), -1, 16)
    shape = (*runs.shape[:2], 1)
    factors = torch.exp2(torch.randint(-2, 2, shape, generator=generator).float())
    middles = 0.5 * rows.std() * torch.randn(shape, generator=generator)
    new = ((runs + middles) * factors).reshape(rows.shape)
    new *= (1.5 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0) * rows.std() / new.std()
    new[3], new[5, 16:48], new[7] = 0, 0, new[7].abs()
    new = new.view(turned.shape)
    return new.transpose(1, 2) if weight.dim() == 3 else new


def _with_joined_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`[E, 2 I, H]` and `[E, H, I]` in the place of experts one by one."""
    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for gate in [name for name in tensors if name.endswith("experts.0.gate_proj.weight")]:
        prefix = gate.removesuffix("0.gate_proj.weight")
        count = sum(name.startswith(prefix) and name.endswith("gate_proj.weight") for name in tensors)
        every = [{p: tensors[f"{prefix}{e}.{p}_proj.weight"] for p in ("gate", "up", "down")} for e in range(count)]
        found[f"{prefix}gate_up_proj"] = torch.stack([torch.cat((one["gate"], one["up"])) for one in every])
        found[f"{prefix}down_proj"] = torch.stack([one["down"] for one in every])
    return found
