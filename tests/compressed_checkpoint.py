"""Checkpoints in the format of compressed-tensors, packed by NumPy item by item, and what their weights stand for."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

LINEAR = ("_proj.weight", "fc1.weight", "fc2.weight")


@dataclass(frozen=True)
class Form:
    """`group` None: one scale for each output."""

    bits: int = 4
    group: int | None = 32
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.bfloat16


def packed(codes: npt.NDArray[Any], bits: int) -> torch.Tensor:
    """Rows of codes from 0 on as int32, the first lowest."""
    items = 32 // bits
    rows = np.zeros((codes.shape[0], -(-codes.shape[1] // items) * items), np.uint32)
    rows[:, : codes.shape[1]] = codes
    words = np.zeros((rows.shape[0], rows.shape[1] // items), np.uint32)
    for item in range(items):
        words |= rows[:, item::items] << np.uint32(bits * item)
    return torch.from_numpy(words.view(np.int32))


def parts_of(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int) -> dict[str, torch.Tensor]:
    """By the end of their names; `q` `[N, K]`, `scale` and `zero` `[N, G]`."""
    middle = 1 << (bits - 1)
    found = {
        "weight_packed": packed((q + middle).numpy(), bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(q.shape),
    }
    if zero is not None:
        found["weight_zero_point"] = torch.from_numpy(
            np.array(packed((zero + middle).numpy().T, bits).numpy().T, order="C")
        )
    return found


def rounded(weight: torch.Tensor, form: Form) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """q, scales, zeros and the weight that they stand for, in float32."""
    columns, width = weight.shape
    group, most = form.group or width, 1 << (form.bits - 1)
    runs = weight.float().view(columns, -1, group)
    low, high = runs.amin(-1, keepdim=True).clamp(max=0), runs.amax(-1, keepdim=True).clamp(min=0)
    span = torch.maximum(-low, high) / (most - 1) if form.symmetric else (high - low) / (2 * most - 1)
    scale = span.clamp(min=1e-5).to(form.scale_dtype)
    zero = torch.zeros_like(low) if form.symmetric else (-most - low / scale.float()).round().clamp(-most, most - 1)
    q = (runs / scale.float() + zero).round().clamp(-most, most - 1)
    exact = ((q - zero) * scale.float()).reshape(columns, width)
    zeros = None if form.symmetric else zero[..., 0].int()
    return q.reshape(columns, width).int(), scale[..., 0], zeros, exact


def section(form: Form, **changes: Any) -> dict[str, Any]:
    weights = {"num_bits": form.bits, "type": "int", "symmetric": form.symmetric, "group_size": form.group}
    weights |= {"strategy": "channel" if form.group is None else "group"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group},
        "ignore": ["lm_head"], **changes,
    }  # fmt: skip


def compress(model: Path, target: Path, form: Form) -> dict[str, torch.Tensor]:
    """Writes the model in `model` with its linear layers rounded; the weights that are left, by their stored names."""
    target.mkdir()
    for path in model.iterdir():
        if not path.name.endswith((".safetensors", ".index.json")):
            shutil.copy(path, target)
    config = json.loads((model / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": section(form)}))
    new, left = {}, {}
    for path in sorted(model.glob("*.safetensors")):
        left |= load_file(path)
    for name, tensor in left.items():
        if not name.endswith(LINEAR):
            new[name] = tensor
            continue
        q, scale, zero, left[name] = rounded(tensor, form)
        new |= {name.replace("weight", part): t for part, t in parts_of(q, scale, zero, form.bits).items()}
    save_file(new, target / "model.safetensors", metadata={"format": "pt"})
    return left
