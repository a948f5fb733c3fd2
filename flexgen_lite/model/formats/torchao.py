"""Checkpoints of torchao: tensors of its classes, taken apart; which class, the file's metadata say.

    Int8Tensor                  X._weight_qdata (int8), _weight_scale [N, 1]
    IntxUnpackedToInt8Tensor    X._weight_qdata (int8, of 4 bits or so), _weight_scale [N, groups], _weight_zero_point
    Float8Tensor                X._weight_qdata (FP8), _weight_scale [N, 1]
    Int4Tensor                  X._weight_qdata (int8, two in a byte), _weight_scale and _weight_zero_point [groups, N]

Source: torchao 0.18, `prototype/safetensors/` and `quantization/quantize_/workflows/`.
"""

from __future__ import annotations

import json
from typing import Any

from flexgen_lite.model.formats.layers import AGAIN, FLOATS, FP8, REMEDY, StoredLayers
from flexgen_lite.model.spec import StoredPart
from flexgen_lite.model.stored_tensor import StoredBits, StoredTensor
from flexgen_lite.text.shown import shown_text

VALUES, SCALES, ZEROS = "._weight_qdata", "._weight_scale", "._weight_zero_point"
_CLASSES = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor", "Int4Tensor")


def join(layers: StoredLayers) -> None:
    """Puts the parts of its weights together. Raises CheckpointError."""
    for layer, values in list(layers.layers(VALUES)):
        layers.take(values.name)
        with layers.apart(f"{layer}.weight", values):
            _join(layers, layer, values)


def _join(layers: StoredLayers, layer: str, values: StoredTensor) -> None:
    kind = _class_of(layers, layer, values)
    scales, zeros = layers.needed(layer, SCALES, values), layers.take(layer + ZEROS)
    for name in [name for name in layers.tensors if name.startswith(f"{layer}._weight_")]:
        raise layers.error(layer, values, f"has {name.removeprefix(layer)}, which is not supported: {REMEDY}")
    if len(values.shape) != 2 or scales.dtype not in FLOATS or len(scales.shape) != 2:
        raise layers.misfit(layer, values, scales)
    if kind == "Int4Tensor":
        _join_halves(layers, layer, values, scales, zeros)
    else:
        _join_bytes(layers, layer, values, scales, zeros)


def _class_of(layers: StoredLayers, layer: str, values: StoredTensor) -> str:
    text: Any = layers.metadata[values.file].get(f"{layer}.weight", "{}")
    try:
        kind = json.loads(text).get("_type", "Tensor")
    except (ValueError, AttributeError):
        kind = "?"
    if kind not in _CLASSES:
        raise layers.error(
            layer, values, f"is a {shown_text(kind)} of torchao, and only {', '.join(_CLASSES)} are read: {REMEDY}"
        )
    return str(kind)


def _join_bytes(
    layers: StoredLayers, layer: str, values: StoredTensor, scales: StoredTensor, zeros: StoredTensor | None
) -> None:
    columns, width = values.shape
    groups = scales.shape[1]
    fits = values.dtype in ("int8", FP8) and scales.shape[0] == columns and groups and width % groups == 0
    if zeros is not None:
        fits = (
            fits and values.dtype == "int8" and zeros.dtype == "int8" and zeros.num_bytes in (columns, columns * groups)
        )
    if not fits:
        raise layers.misfit(layer, values, scales, zeros)
    each = width // groups
    parts = [
        (StoredPart("values", "signed" if values.dtype == "int8" else "stream", 8), values),
        (StoredPart("scales", "items", block=(1, each)), scales),
    ]
    if zeros is not None:
        parts.append((StoredPart("zeros", "items", 8, (1, width if zeros.num_bytes == columns else each)), zeros))
    kind = "int" if values.dtype == "int8" else "e4m3"
    group = layers.group(layer, values, width, each)
    stored = StoredBits(kind, 8, group, scales.dtype, "" if zeros is None else "uint8", tuple(parts))
    layers.add(f"{layer}.weight", (columns, width), stored, values)


def _join_halves(
    layers: StoredLayers, layer: str, values: StoredTensor, scales: StoredTensor, offsets: StoredTensor | None
) -> None:
    columns, width, groups = values.shape[0], 2 * values.shape[1], scales.shape[0]
    if offsets is None:
        raise layers.error(layer, values, f"has no zero_point: {AGAIN}")
    fits = values.dtype == "int8" and offsets.dtype in FLOATS and offsets.shape == scales.shape == (groups, columns)
    if not fits or not groups or width % groups:
        raise layers.misfit(layer, values, scales, offsets)
    each = width // groups
    parts = (
        (StoredPart("values", "signed_halves", 4), values),
        (StoredPart("scales", "turned_items", block=(1, each)), scales),
        (StoredPart("offsets", "turned_items", block=(1, each)), offsets),
    )
    stored = StoredBits("int", 4, layers.group(layer, values, width, each), scales.dtype, "float32", parts)
    layers.add(f"{layer}.weight", (columns, width), stored, values)
