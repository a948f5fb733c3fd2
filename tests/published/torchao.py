"""Weights as torchao 0.18 saves them: tensors of its classes, taken apart; the files' metadata tell the classes.

Source: torchao 0.18, `prototype/safetensors/` (names and metadata) and the classes' docstrings.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from tests.published.checkpoint import Written
from tests.published.floats import e4m3
from tests.published.whole_numbers import signed, with_offsets


def written(kind: str, weight: torch.Tensor) -> Written:
    """A weight as a tensor of the class `kind`."""
    if kind == "Int4Tensor":
        *parts, exact = with_offsets(weight, 32)
    elif kind == "Int8Tensor":
        *parts, exact = signed(weight, 8, None, True, torch.float32)
    elif kind == "IntxUnpackedToInt8Tensor":
        *parts, exact = signed(weight, 4, 32, False, torch.bfloat16)
    else:
        *parts, exact = e4m3(weight, (1, weight.shape[1]))
    names = ("qdata", "scale", "zero_point")
    return {f"._weight_{name}": part for name, part in zip(names, parts, strict=False)}, exact


def metadata(kind: str, names: list[str], layers: dict[str, torch.Tensor]) -> dict[str, str]:
    found: dict[str, Any] = {"tensor_names": names}
    for name in names:
        found[name] = {"_type": "Tensor"}
    for layer, weight in layers.items():
        data = {"block_size": [1, weight.shape[1]], "dtype": {"_type": "torch.dtype", "_data": "bfloat16"}}
        parts = ["qdata", "scale"] + ([] if kind == "Float8Tensor" else ["zero_point"])
        found[f"{layer}.weight"] = {"_type": kind, "_data": data, "_tensor_data_names": parts}
    return {name: json.dumps(value) for name, value in found.items()}
