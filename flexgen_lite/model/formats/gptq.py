"""Checkpoints of GPTQ (AutoGPTQ, gptqmodel, auto-round) and of AWQ: whole numbers of 2, 3, 4 or 8 bits with zeros.

    GPTQ             X.qweight [K * bits / 32, N], X.qzeros [groups, N * bits / 32], X.scales [groups, N], X.g_idx [K]
    AWQ, gemm        X.qweight [K, N / 8], X.qzeros [groups, N / 8], X.scales [groups, N]
    AWQ, gemv        X.qweight [N, K / 8], X.qzeros [N, Z], X.scales [N, 8 Z], 8 Z groups or fewer
    AWQ, gemv_fast   X.qweight [N / 4, K] (int16), X.qzeros and X.scales [8 Z, N], qzeros float16: -zero * scale

All other words are int32. Which of these it is, shapes tell. Zeros of GPTQ's first version are one less than they are;
which version it is, config.json does not always say right: where weights are symmetric, the first zero tells.
auto-round's zeros are less by one only in those of its files that are made for AutoGPTQ.

Sources: gptqmodel 7.7, `nn_modules/qlinear/`; AutoAWQ 0.2.9, `modules/linear/`; auto-round, `export/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from flexgen_lite.model.files import CheckpointError
from flexgen_lite.model.formats.input_order import part_of, read_order
from flexgen_lite.model.formats.layers import AGAIN, FLOATS, REMEDY, Part, StoredLayers, small
from flexgen_lite.model.formats.section import is_auto_round
from flexgen_lite.model.spec import StoredPart
from flexgen_lite.model.stored_tensor import StoredBits, StoredTensor
from flexgen_lite.text.shown import shown, shown_text

VALUES, ZEROS, SCALES, ORDER = ".qweight", ".qzeros", ".scales", ".g_idx"
_BITS = (2, 3, 4, 8)
_GPTQ: tuple[str, ...] = ("gptq", "gptq_v2")
_AWQ: tuple[str, ...] = ("gemm", "gemv", "gemv_fast")


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer's tensors."""

    name: str
    values: StoredTensor
    scales: StoredTensor


def join(layers: StoredLayers) -> None:
    """Puts the parts of its weights together. Raises CheckpointError."""
    found = list(layers.layers(VALUES))
    if found:
        _check(layers.section.values, layers.section.where, layers.section.format)
    for name, values in found:
        layers.take(values.name)
        with layers.apart(f"{name}.weight", values):
            _join(layers, name, values)


def _join(layers: StoredLayers, name: str, values: StoredTensor) -> None:
    layer = _Layer(name, values, layers.needed(name, SCALES, values))
    shape, scales = values.shape, layer.scales.shape
    if len(shape) != 2 or len(scales) != 2 or layer.scales.dtype not in FLOATS or 0 in (*shape, *scales):
        raise layers.misfit(name, values, layer.scales)
    if values.dtype == "int16":
        _join_gemv_fast(layers, layer)
    elif values.dtype != "int32":
        raise layers.misfit(name, values, layer.scales)
    elif shape[1] * 8 == scales[1]:
        _join_gemm(layers, layer)
    elif shape[1] == scales[1]:
        _join_gptq(layers, layer)
    elif shape[0] == scales[0]:
        _join_gemv(layers, layer)
    else:
        raise layers.misfit(name, values, layer.scales)


def _check(values: Mapping[str, Any], where: str, method: str) -> None:
    known: tuple[str, ...]
    if method == "awq":
        version, known = values.get("version", values.get("format", "gemm")), _AWQ
    else:
        version, known = values.get("checkpoint_format", values.get("format", "gptq")), _GPTQ
    if str(version).lower() not in known and method in ("awq", "gptq") and not is_auto_round(values):
        raise CheckpointError(
            f"{where}: the layout {shown_text(str(version))} is not read, only {', '.join(known)}: {REMEDY}"
        )
    kind = values.get("pack_dtype", "int32")
    if kind != "int32":
        raise CheckpointError(f"{where}: words of {shown_text(str(kind))} are not read, only int32: {REMEDY}")


def _join_gemm(layers: StoredLayers, layer: _Layer) -> None:
    width, columns, groups = layer.values.shape[0], layer.values.shape[1] * 8, layer.scales.shape[0]
    zeros = layers.take(layer.name + ZEROS)
    if zeros is not None and (zeros.dtype != "int32" or zeros.shape != (groups, columns // 8)):
        raise layers.misfit(layer.name, layer.values, layer.scales, zeros)
    each = layers.each(layer.name, layer.values, width, groups)
    parts = [_values(layer, "awq_words", 4), _turned("scales", layer.scales, each)]
    if zeros is not None:
        parts.append((StoredPart("zeros", "awq_zeros", 4, (1, each)), zeros))
    _add(layers, layer, (columns, width), each, parts, "" if zeros is None else "uint8")


def _join_gemv(layers: StoredLayers, layer: _Layer) -> None:
    columns, width = layer.values.shape[0], layer.values.shape[1] * 8
    zeros = layers.needed(layer.name, ZEROS, layer.values)
    stored = layer.scales.shape[1]
    each = _stated_group(layers, layer, width, stored)
    if zeros.dtype != "int32" or zeros.shape != (columns, stored // 8) or stored % 8:
        raise layers.misfit(layer.name, layer.values, layer.scales, zeros)
    parts = [
        _values(layer, "stream", 4),
        (StoredPart("scales", "filled_items", block=(1, each), number=stored), layer.scales),
        (StoredPart("zeros", "filled_zeros", 4, (1, each), number=stored), zeros),
    ]
    _add(layers, layer, (columns, width), each, parts, "uint8")


def _join_gemv_fast(layers: StoredLayers, layer: _Layer) -> None:
    columns, width = layer.values.shape[0] * 4, layer.values.shape[1]
    zeros = layers.needed(layer.name, ZEROS, layer.values)
    stored, found = layer.scales.shape
    each = _stated_group(layers, layer, width, stored)
    if found != columns or width % 64 or zeros.dtype not in FLOATS or zeros.shape != layer.scales.shape:
        raise layers.misfit(layer.name, layer.values, layer.scales, zeros)
    parts = [
        _values(layer, "awq_stretches", 4), _turned("scales", layer.scales, each), _turned("offsets", zeros, each)
    ]  # fmt: skip
    _add(layers, layer, (columns, width), each, parts, "float32", kind="uint")


def _stated_group(layers: StoredLayers, layer: _Layer, width: int, stored: int) -> int:
    """By config.json: there may be more scales than groups."""
    values = layers.section.values
    size = values.get("group_size", values.get("q_group_size", 128))
    size = width if size == -1 else size
    if type(size) is not int or size <= 0 or width % size or width // size > stored:
        raise layers.error(
            layer.name, layer.values,
            f"has {stored} scales for {width} inputs, which does not fit the group_size {shown(size)} of config.json: "
            f"{AGAIN}",
        )  # fmt: skip
    return size


def _join_gptq(layers: StoredLayers, layer: _Layer) -> None:
    columns, groups = layer.scales.shape[1], layer.scales.shape[0]
    zeros, order = layers.needed(layer.name, ZEROS, layer.values), layers.take(layer.name + ORDER)
    bits = _bits(layers, layer, zeros, columns)
    width = layer.values.shape[0] * 32 // bits
    if width % 32 or zeros.dtype != "int32" or zeros.shape != (groups, columns * bits // 32):
        raise layers.misfit(layer.name, layer.values, layer.scales, zeros)
    each = layers.each(layer.name, layer.values, width, groups)
    digest = read_order(layers, layer.name, order, width, each)
    layout = "lessened_words" if _is_lessened(layers, zeros, bits) else "packed_words"
    values = _values(layer, "words", bits)
    parts = [
        values,
        _turned("scales", layer.scales, each),
        (StoredPart("zeros", layout, bits, (1, each)), zeros),
    ]
    if digest and order is not None:
        parts[0] = (replace(values[0], layout="sorted_words", others=(small(order),)), layer.values)
        parts.append(part_of(order, columns))
    _add(layers, layer, (columns, width), each, parts, "uint8", 8 if bits == 8 else 4, digest)


def _values(layer: _Layer, layout: str, bits: int) -> Part:
    return StoredPart("values", layout, bits), layer.values


def _turned(fills: str, items: StoredTensor, each: int) -> Part:
    return StoredPart(fills, "turned_items", block=(1, each)), items


def _add(
    layers: StoredLayers,
    layer: _Layer,
    shape: tuple[int, int],
    each: int,
    parts: list[Part],
    zeros: str,
    kept: int = 4,
    order: bytes = b"",
    kind: str = "int",
) -> None:
    group = layers.group(layer.name, layer.values, shape[1], each)
    stored = StoredBits(kind, kept, group, layer.scales.dtype, zeros, tuple(parts), order)
    layers.add(f"{layer.name}.weight", shape, stored, layer.values)


def _bits(layers: StoredLayers, layer: _Layer, zeros: StoredTensor, columns: int) -> int:
    """By the width of the zeros: layers of one checkpoint may differ."""
    width = zeros.shape[-1] if zeros.shape else 0
    bits, rest = divmod(width * 32, columns)
    if rest:
        raise layers.misfit(layer.name, layer.values, layer.scales, zeros)
    if bits not in _BITS:
        raise layers.error(layer.name, layer.values, f"has {bits} bits, and only 2, 3, 4 and 8 are read: {REMEDY}")
    return bits


def _is_lessened(layers: StoredLayers, zeros: StoredTensor, bits: int) -> bool:
    """Whether zeros are stored as one less."""
    if layers.section.values.get("sym", False) is True and 32 % bits == 0:
        first = int(layers.number(StoredTensor("", zeros.file, zeros.offset, 4, "int32", ()))) & ((1 << bits) - 1)
        if first in ((1 << (bits - 1)) - 1, 1 << (bits - 1)):
            return first != 1 << (bits - 1)
    values = layers.section.values
    if is_auto_round(values):  # which keeps its own files as they are
        kind = str(values.get("packing_format", values.get("backend", "")))
        return "gptq" in kind and "gptqmodel" not in kind
    return bool(values.get("checkpoint_format", values.get("format", "gptq")) != "gptq_v2")
