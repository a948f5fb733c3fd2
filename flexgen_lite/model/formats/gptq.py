"""Checkpoints of GPTQ (AutoGPTQ, gptqmodel, auto-round) and of AWQ: whole numbers of 2, 3, 4 or 8 bits with zeros.

    GPTQ       X.qweight [K * bits / 32, N], X.qzeros [groups, N * bits / 32], X.scales [groups, N], perhaps X.g_idx [K]
    AWQ, gemm  X.qweight [K, N / 8], X.qzeros [groups, N / 8], X.scales [groups, N]

All words are int32. Zeros of GPTQ's first version are one less than they are; which version it is, config.json does not
always say right: where weights are symmetric, the first zero tells.

Sources: gptqmodel 7.7, `nn_modules/qlinear/`; AutoAWQ 0.2.9, `modules/linear/gemm.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import cache
from typing import Any

from flexgen_lite.model.files import CheckpointError
from flexgen_lite.model.formats.layers import AGAIN, FLOATS, REMEDY, StoredLayers, small
from flexgen_lite.model.spec import StoredPart
from flexgen_lite.model.stored_tensor import StoredBits, StoredTensor
from flexgen_lite.text.shown import shown, shown_text

VALUES, ZEROS, SCALES, ORDER = ".qweight", ".qzeros", ".scales", ".g_idx"
_BITS = (2, 3, 4, 8)
_VERSIONS = ("gptq", "gptq_v2")


def join(layers: StoredLayers) -> None:
    """Puts the parts of its weights together. Raises CheckpointError."""
    found = list(layers.layers(VALUES))
    if not found:
        return
    is_awq = _is_awq(layers, *found[0])
    _check(layers.section.values, layers.section.where, is_awq)
    for layer, values in found:
        layers.take(values.name)
        scales = layers.needed(layer, SCALES, values)
        if values.dtype != "int32" or len(values.shape) != 2 or scales.dtype not in FLOATS or len(scales.shape) != 2:
            raise layers.misfit(layer, values, scales)
        if is_awq:
            _join_awq(layers, layer, values, scales)
        else:
            _join_gptq(layers, layer, values, scales)


def _is_awq(layers: StoredLayers, layer: str, values: StoredTensor) -> bool:
    if layers.section.format:
        packing = str(layers.section.values.get("packing_format", ""))
        return layers.section.format == "awq" or packing.endswith("awq")
    scales = layers.tensors.get(layer + SCALES)
    return scales is not None and len(values.shape) == 2 and values.shape[1] * 8 == scales.shape[-1]


def _check(values: Mapping[str, Any], where: str, is_awq: bool) -> None:
    version = str(values.get("version", "gemm") if is_awq else values.get("checkpoint_format", "gptq")).lower()
    if version not in (("gemm",) if is_awq else _VERSIONS):
        raise CheckpointError(f"{where}: the layout {shown_text(version)} is not read: {REMEDY}")
    kind = values.get("pack_dtype", "int32")
    if kind != "int32":
        raise CheckpointError(f"{where}: words of {shown_text(kind)} are not read, only int32: {REMEDY}")


def _join_awq(layers: StoredLayers, layer: str, values: StoredTensor, scales: StoredTensor) -> None:
    width, columns, groups = values.shape[0], values.shape[1] * 8, scales.shape[0]
    zeros = layers.take(layer + ZEROS)
    fits = scales.shape[1] == columns and groups and width % groups == 0
    if zeros is not None:
        fits = fits and zeros.dtype == "int32" and zeros.shape == (groups, columns // 8)
    if not fits:
        raise layers.misfit(layer, values, scales, zeros)
    _add(layers, layer, 4, (columns, width), groups, values, "awq_words", scales, zeros, "awq_zeros")


def _join_gptq(layers: StoredLayers, layer: str, values: StoredTensor, scales: StoredTensor) -> None:
    columns, groups = scales.shape[1], scales.shape[0]
    zeros, order = layers.needed(layer, ZEROS, values), layers.take(layer + ORDER)
    bits = _bits(layers, layer, values, zeros, columns)
    width = values.shape[0] * 32 // bits
    fits = values.shape[1] == columns and width % 32 == 0 and groups and width % groups == 0
    if not fits or zeros.dtype != "int32" or zeros.shape != (groups, columns * bits // 32):
        raise layers.misfit(layer, values, scales, zeros)
    if order is not None:
        _check_order(layers, layer, order, width, groups)
    layout = "lessened_words" if _is_lessened(layers, zeros, bits) else "packed_words"
    _add(layers, layer, bits, (columns, width), groups, values, "words", scales, zeros, layout)


def _add(
    layers: StoredLayers,
    layer: str,
    bits: int,
    shape: tuple[int, int],
    groups: int,
    values: StoredTensor,
    layout: str,
    scales: StoredTensor,
    zeros: StoredTensor | None,
    zeros_layout: str,
) -> None:
    each = shape[1] // groups
    group = layers.group(layer, values, shape[1], each)
    parts = [
        (StoredPart("values", layout, bits), values),
        (StoredPart("scales", "turned_items", block=(1, each)), scales),
        *([(StoredPart("zeros", zeros_layout, bits, (1, each)), zeros)] if zeros is not None else []),
    ]
    kept = 8 if bits == 8 else 4
    stored = StoredBits("int", kept, group, scales.dtype, "" if zeros is None else "uint8", tuple(parts))
    layers.add(f"{layer}.weight", shape, stored, values)


def _bits(layers: StoredLayers, layer: str, values: StoredTensor, zeros: StoredTensor, columns: int) -> int:
    """By the width of the zeros: layers of one checkpoint may differ."""
    bits = zeros.shape[-1] * 32 // columns if columns else 0
    if bits not in _BITS:
        stated = layers.section.values.get("bits")
        raise layers.error(
            layer, values, f"has {bits or shown(stated)} bits, and only 2, 3, 4 and 8 are read: {REMEDY}"
        )
    return bits


def _is_lessened(layers: StoredLayers, zeros: StoredTensor, bits: int) -> bool:
    """Whether zeros are stored as one less."""
    if layers.section.values.get("sym", False) is True and 32 % bits == 0:
        first = int(layers.number(StoredTensor("", zeros.file, zeros.offset, 4, "int32", ()))) & ((1 << bits) - 1)
        if first in ((1 << (bits - 1)) - 1, 1 << (bits - 1)):
            return first != 1 << (bits - 1)
    return bool(layers.section.values.get("checkpoint_format", "gptq") != "gptq_v2")


def _check_order(layers: StoredLayers, layer: str, order: StoredTensor, width: int, groups: int) -> None:
    if order.dtype != "int32" or order.shape != (width,):
        raise layers.error(
            layer, order, f"has a g_idx of {order.dtype} {list(order.shape)}, not {width} int32: {AGAIN}"
        )
    if layers.read(small(order)) != _in_order(width, groups):
        raise layers.error(
            layer,
            order,
            "has inputs that are ordered by g_idx, which is not supported: quantise it without reordering (desc_act), "
            f"or {REMEDY}",
        )


@cache
def _in_order(width: int, groups: int) -> bytes:
    """A g_idx that says nothing: each group has the inputs that follow those of the group before."""
    each = width // groups
    return struct.pack(f"<{width}i", *(item // each for item in range(width)))
