"""Weights of one byte each with scales: FP8 (E4M3) of DeepSeek, Qwen, MiniMax and others, of FBGEMM and ModelOpt, and
whole numbers of 8 bits.

Of a layer X there are X.weight and a scale by one of several names: one number, one for each output, or one for each
block of rows and inputs; blocks at the edges are cut. Experts may be one tensor X, `[E, N, K]`, with X_scale_inv.

Sources: Transformers 5.24, `integrations/finegrained_fp8.py` and `fbgemm_fp8.py`; DeepSeek-V3's
`inference/fp8_cast_bf16.py`; nvidia-modelopt 0.47.
"""

from __future__ import annotations

import math
from dataclasses import replace

from flexgen_lite.model.formats.layers import AGAIN, FLOATS, FP8, REMEDY, StoredLayers, member, several
from flexgen_lite.model.spec import StoredPart
from flexgen_lite.model.stored_tensor import StoredBits, StoredTensor

POWERS = ("float8_e8m0fnu", "uint8")
_SCALES = (".weight_scale_inv", ".weight_scale", ".scale", ".qscale_weight")
_JOINED = "_scale_inv"
_UNUSED = (".input_scale", ".activation_scale", ".input_scale_ub", ".qscale_act", ".k_scale", ".v_scale")
_BLOCK = (128, 128)


def join(layers: StoredLayers) -> None:
    """Puts the parts of its weights together. Raises CheckpointError."""
    block = _block(layers)
    for layer, values in list(layers.layers(".weight")):
        if values.dtype == FP8 and not values.fault:
            with layers.apart(values.name, values):
                suffix = next((suffix for suffix in _SCALES if layer + suffix in layers.tensors), None)
                if suffix is None:
                    raise layers.error(layer, values, f"is in FP8 and has no scale: {AGAIN}")
                join_bytes(layers, layer, values, suffix, block)
    for name, scales in list(layers.layers(_JOINED)):
        joined = layers.tensors.get(name)
        if joined is not None and joined.dtype == FP8 and len(joined.shape) == 3:
            layers.take(scales.name)
            with layers.apart(name, joined):
                _join_experts(layers, name, joined, scales, block)
    if layers.section.format in ("fp8", "modelopt"):
        for suffix in _UNUSED:
            for _, tensor in layers.layers(suffix):
                layers.take(tensor.name)
    for name, tensor in list(layers.tensors.items()):
        if tensor.dtype.startswith("float8") and not tensor.fault:
            with layers.apart(name, tensor):
                raise layers.error(name, tensor, f"is in {tensor.dtype}, and no scale is known for it: {REMEDY}")


def join_bytes(
    layers: StoredLayers,
    layer: str,
    values: StoredTensor,
    suffix: str,
    block: tuple[int, int] | None,
    zeros: StoredTensor | None = None,
    in_scales: bool = False,
) -> None:
    """A layer's weight of bytes, with scales by the name `suffix`; `block` where these are by blocks.

    Args:
        in_scales: the product is rounded to what scales are in.
    """
    scales = layers.needed(layer, suffix, values)
    if len(values.shape) != 2 or scales.dtype not in (*FLOATS, *POWERS):
        raise layers.misfit(layer, values, scales)
    columns, width = values.shape
    each = _covered(layers, layer, values, scales, block)
    if zeros is not None:
        wanted = 1 if each == (columns, width) else columns
        is_whole = zeros.dtype in ("int8", "int32") and math.prod(zeros.shape) == wanted
        if not is_whole or each[1] != width:
            raise layers.misfit(layer, values, scales, zeros)
    stored = _bits(layers, layer, values, scales, each, (columns, width))
    if zeros is not None and values.dtype == "int8":
        part = StoredPart("zeros", "items", 8, each)
        parts = (*stored.parts, (part, zeros))
        stored = replace(stored, zeros="uint8", parts=parts)
    if in_scales:
        stored = replace(stored, finish=finish_in(scales.dtype))
    layers.add(f"{layer}.weight", (columns, width), stored, values)


def _bits(
    layers: StoredLayers,
    layer: str,
    values: StoredTensor,
    scales: StoredTensor,
    each: tuple[int, int],
    shape: tuple[int, int],
) -> StoredBits:
    group = layers.group(layer, values, shape[1], each[1])
    is_whole = values.dtype == "int8"
    return StoredBits(
        "int" if is_whole else "e4m3", 8, group, kept_scales(scales.dtype), "",
        (
            (StoredPart("values", "signed" if is_whole else "stream", 8), values),
            (StoredPart("scales", "items", block=each), scales),
        ),
    )  # fmt: skip


def _covered(
    layers: StoredLayers, layer: str, values: StoredTensor, scales: StoredTensor, block: tuple[int, int] | None
) -> tuple[int, int]:
    """Rows and items of K that a scale is for."""
    columns, width = values.shape
    is_one = scales.shape in ((), (1,), (1, 1))
    if is_one and (scales.shape != (1, 1) or not _is_cut(layers, (columns, width))):
        return columns, width
    if block is not None and scales.shape == (-(-columns // block[0]), -(-width // block[1])):
        return block
    if scales.shape in ((columns, 1), (columns,)):
        return 1, width
    if len(scales.shape) == 2 and scales.shape[0] == columns and width % scales.shape[1] == 0:
        return 1, width // scales.shape[1]
    raise layers.misfit(layer, values, scales)


def _is_cut(layers: StoredLayers, shape: tuple[int, int]) -> bool:
    """Whether config.json says that such a weight has several blocks."""
    block = layers.section.values.get("weight_block_size")
    return block is not None and any(size > most for size, most in zip(shape, _block(layers), strict=True))


def _join_experts(
    layers: StoredLayers, name: str, values: StoredTensor, scales: StoredTensor, block: tuple[int, int]
) -> None:
    count, columns, width = values.shape
    grid = (-(-columns // block[0]), -(-width // block[1]))
    if scales.shape != (count, *grid) or scales.dtype not in (*FLOATS, *POWERS):
        raise layers.misfit(name, values, scales)
    shape = (columns, width)
    bits = [
        _bits(layers, name, member(values, i, count, shape), member(scales, i, count, grid), block, shape)
        for i in range(count)
    ]
    layers.tensors[name] = several(name, values, bits, shape)


def finish_in(dtype: str) -> str:
    """Of products that are rounded to the dtype of the scales."""
    return "float16" if dtype == "float16" else ""


def kept_scales(dtype: str) -> str:
    """What scales are kept in: powers of two are bytes, by either name."""
    return "float8_e8m0fnu" if dtype in POWERS else dtype


def _block(layers: StoredLayers) -> tuple[int, int]:
    """From config.json alone: what the shapes allow is not always what is meant."""
    stated = layers.section.values.get("weight_block_size")
    if isinstance(stated, list) and len(stated) == 2 and all(type(size) is int and size > 0 for size in stated):
        return stated[0], stated[1]
    return _BLOCK
