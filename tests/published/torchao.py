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

GROUP = 32
_DTYPE = {"_type": "torch.dtype", "_data": "bfloat16"}
_INTX: dict[str, Any] = {
    "weight_dtype": {"_type": "torch.dtype", "_data": "int4"},
    "granularity": {"_type": "PerGroup", "_version": 1, "_data": {"group_size": GROUP}},
    "mapping_type": {"_type": "MappingType", "_data": "ASYMMETRIC"}, "scale_dtype": None,
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Int8Tensor": ("Int8WeightOnlyConfig", {"group_size": None}),
    "IntxUnpackedToInt8Tensor": ("IntxWeightOnlyConfig", _INTX),
    "Float8Tensor": ("Float8WeightOnlyConfig", {}),
    "Int4Tensor": ("Int4WeightOnlyConfig", {"group_size": GROUP}),
}
"""By class of tensor: what makes it, and with which settings."""


def section(kind: str) -> dict[str, Any]:
    name, data = CONFIGS[kind]
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": name, "_version": 2, "_data": data}}}


def written(kind: str, weight: torch.Tensor) -> Written:
    """A weight as a tensor of the class `kind`."""
    if kind == "Int4Tensor":
        *parts, exact = with_offsets(weight, GROUP)
    elif kind == "Int8Tensor":
        *parts, exact = signed(weight, 8, None, True, torch.float32)
    elif kind == "IntxUnpackedToInt8Tensor":
        *parts, exact = signed(weight, 4, GROUP, False, torch.bfloat16)
    else:
        *parts, exact = e4m3(weight, (1, weight.shape[1]))
    names = ("qdata", "scale", "zero_point")
    return {f"._weight_{name}": part for name, part in zip(names, parts, strict=False)}, exact


def metadata(kind: str, names: list[str], layers: dict[str, torch.Tensor]) -> dict[str, str]:
    """Of the file: the class of every tensor, and what it is made of."""
    found: dict[str, Any] = {"tensor_names": names} | {name: {"_type": "Tensor"} for name in names}
    parts = ["qdata", "scale"] + ([] if kind == "Float8Tensor" else ["zero_point"])
    for layer, weight in layers.items():
        columns, width = weight.shape
        data: dict[str, Any] = {"block_size": [1, width if kind in ("Int8Tensor", "Float8Tensor") else GROUP]}
        if kind == "Int4Tensor":
            data |= {"shape": [columns, width], "activation_dtype": _DTYPE}
        else:
            data["dtype"] = _DTYPE
        if kind == "IntxUnpackedToInt8Tensor":
            data |= {"target_dtype": _INTX["weight_dtype"], "activation_quantization": None}
        found[f"{layer}.weight"] = {"_type": kind, "_data": data, "_tensor_data_names": parts}
    return {name: json.dumps(value) for name, value in found.items()}
