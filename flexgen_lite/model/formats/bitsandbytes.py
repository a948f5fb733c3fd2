"""Checkpoints of bitsandbytes: 4 bits by one of two tables, with a scale for a run of items, and whole numbers of 8.

    4 bits  X.weight (bytes of all items, the first in the upper half), X.weight.absmax, X.weight.quant_map and
            X.weight.quant_state.bitsandbytes__nf4 or __fp4, a JSON text; scales that are quantised themselves:
            X.weight.nested_absmax and nested_quant_map
    8 bits  X.weight (int8), X.SCB: of each output, 127 times its scale

Source: bitsandbytes 0.50, `functional.py` and `backends/default/ops.py`.
"""

from __future__ import annotations

import json
import math
from typing import Any

from flexgen_lite.model.formats.layers import AGAIN, REMEDY, StoredLayers, small
from flexgen_lite.model.packing import TABLES
from flexgen_lite.model.spec import SmallSource, StoredPart
from flexgen_lite.model.stored_tensor import StoredBits, StoredTensor
from flexgen_lite.text.shown import shown

KINDS = ("nf4", "fp4")
_STATE, _SCALES_8, _ROW_MAJOR = ".weight.quant_state.bitsandbytes__", ".SCB", 0
_NESTED = 256  # scales that have one scale, where these are quantised
_MAX_STATE = 1 << 16  # bytes of a JSON text


def join(layers: StoredLayers) -> None:
    """Puts the parts of its weights together. Raises CheckpointError."""
    for kind in KINDS:
        for layer, state in list(layers.layers(_STATE + kind)):
            layers.take(state.name)
            values = layers.tensors.get(f"{layer}.weight")
            with layers.apart(f"{layer}.weight", values or state):
                if values is None:
                    raise layers.error(layer, state, f"has no weight: {AGAIN}")
                _join_4(layers, layer, kind, values, _state(layers, layer, state))
    for layer, scales in list(layers.layers(_SCALES_8)):
        layers.take(scales.name)
        with layers.apart(f"{layer}.weight", scales):
            _join_8(layers, layer, scales)


def _state(layers: StoredLayers, layer: str, state: StoredTensor) -> dict[str, Any]:
    text = layers.read(SmallSource(state.file, state.offset, min(state.num_bytes, _MAX_STATE), "uint8"))
    try:
        found = json.loads(text)
        shape, offset = found["shape"], found.get("nested_offset", 0.0)
        fits = len(shape) == 2 and all(type(size) is int and size > 0 for size in (*shape, found["blocksize"]))
        fits = fits and type(offset) in (int, float) and math.isfinite(offset)
    except (ValueError, KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise layers.error(layer, state, f"has a quant_state that cannot be read: {AGAIN}")
    return dict(found)


def _join_4(layers: StoredLayers, layer: str, kind: str, values: StoredTensor, state: dict[str, Any]) -> None:
    columns, width = state["shape"]
    prefix, block = f"{layer}.weight", state["blocksize"]
    absmax, table = layers.needed(prefix, ".absmax", values), layers.needed(prefix, ".quant_map", values)
    if values.num_bytes * 2 != columns * width or width % 2 or table.dtype != "float32" or table.shape != (16,):
        raise layers.misfit(layer, values, absmax, table)
    if any(abs(layers.number(table, i) - value) > 1e-7 for i, value in enumerate(TABLES[kind])):
        raise layers.error(layer, table, f"has a table of its own, not {kind}'s, which is not supported: {REMEDY}")
    others: tuple[SmallSource, ...] = ()
    num_blocks = -(-columns * width // block)
    if math.prod(absmax.shape) != num_blocks:
        raise layers.misfit(layer, values, absmax)
    if absmax.dtype == "uint8":
        nested, codes = (
            layers.needed(prefix, ".nested_absmax", values),
            layers.needed(prefix, ".nested_quant_map", values),
        )
        fits = nested.dtype == "float32" and math.prod(nested.shape) == -(-num_blocks // _NESTED)
        if not fits or codes.dtype != "float32" or codes.num_bytes != 1024:
            raise layers.misfit(layer, absmax, nested, codes)
        if state.get("nested_blocksize", _NESTED) != _NESTED:
            raise layers.error(
                layer,
                nested,
                f"has a scale for {shown(state['nested_blocksize'])} scales, and only one for {_NESTED} is read: "
                f"{REMEDY}",
            )
        others = (small(nested), small(codes))
    elif absmax.dtype != "float32":
        raise layers.misfit(layer, values, absmax)
    offset = state.get("nested_offset", 0.0)
    parts = (
        (StoredPart("values", "swapped_halves", 4), values),
        (StoredPart("scales", "absmax", block=(columns, block), others=others, number=offset), absmax),
    )
    finish = "float16" if state.get("dtype") == "float16" else ""
    group = layers.group(layer, values, width, block)
    stored = StoredBits(kind, 4, group, "float32", "", parts, finish=finish)
    layers.add(prefix, (columns, width), stored, values)


def _join_8(layers: StoredLayers, layer: str, scales: StoredTensor) -> None:
    values, order = layers.tensors.get(f"{layer}.weight"), layers.take(f"{layer}.weight_format")
    if values is None or values.dtype != "int8" or len(values.shape) != 2:
        raise layers.misfit(layer, values, scales)
    if order is not None and order.dtype == "uint8" and int(layers.number(order)) != _ROW_MAJOR:
        raise layers.error(layer, values, f"is in an order of a GPU's own (weight_format), which is not read: {REMEDY}")
    columns, width = values.shape
    if scales.dtype != "float32" or math.prod(scales.shape) != columns:
        raise layers.misfit(layer, values, scales)
    parts = (
        (StoredPart("values", "signed", 8), values),
        (StoredPart("scales", "absmax_8", block=(1, width)), scales),
    )
    group = layers.group(layer, values, width, width)
    stored = StoredBits("int", 8, group, "float32", "", parts, finish="127")
    layers.add(f"{layer}.weight", (columns, width), stored, values)
