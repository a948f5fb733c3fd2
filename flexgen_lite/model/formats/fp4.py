"""Weights of 4 bits in floating point (E2M1), two in a byte, the first in its lower half: MXFP4, with a power of two
for 32 of them, and NVFP4, with a scale in FP8 for 16 and one number for all.

    gpt-oss             X_blocks [E, N, K / 32, 16], X_scales [E, N, K / 32]; the model has X as [E, K, N]
    compressed-tensors  X.weight_packed, X.weight_scale; NVFP4: X.weight_global_scale, which divides
    ModelOpt            X.weight (uint8), X.weight_scale, X.weight_scale_2, which multiplies
    DeepSeek V4         X.weight (int8), X.scale

Sources: OCP Microscaling Formats 1.0; Transformers 5.24, `integrations/mxfp4.py` and `finegrained_fp8.py`; the packages
compressed-tensors 0.20 and nvidia-modelopt 0.47.
"""

from __future__ import annotations

from dataclasses import replace

from flexgen_lite.model.formats.fp8 import POWERS, kept_scales
from flexgen_lite.model.formats.layers import FP8, REMEDY, StoredLayers, member, several
from flexgen_lite.model.spec import StoredPart
from flexgen_lite.model.stored_tensor import StoredBits, StoredTensor

_BLOCKS, _SCALES = "_blocks", "_scales"
_MX_GROUP = 32


def join(layers: StoredLayers) -> None:
    """Puts the parts of gpt-oss's, ModelOpt's and DeepSeek's weights together. Raises CheckpointError."""
    for name, blocks in list(layers.layers(_BLOCKS)):
        if blocks.dtype == "uint8" and len(blocks.shape) == 4:
            layers.take(blocks.name)
            with layers.apart(name, blocks):
                _join_experts(layers, name, blocks, layers.needed(name, _SCALES, blocks))
    for layer, values in list(layers.layers(".weight")):
        if values.dtype == "uint8" and f"{layer}.weight_scale_2" in layers.tensors:
            factor = layers.needed(layer, ".weight_scale_2", values)
            with layers.apart(values.name, values):
                _refuse_scaled_inputs(layers, layer, values)
                _join(layers, layer, values, layers.needed(layer, ".weight_scale", values), factor)
        elif values.dtype == "int8" and f"{layer}.scale" in layers.tensors:
            with layers.apart(values.name, values):
                _join(layers, layer, values, layers.needed(layer, ".scale", values))


def join_packed(layers: StoredLayers, layer: str, values: StoredTensor) -> None:
    """A layer of compressed-tensors, whose `values` are taken."""
    scales = layers.needed(layer, ".weight_scale", values)
    _join(layers, layer, values, scales, layers.take(f"{layer}.weight_global_scale"), divides=True)


def _join(
    layers: StoredLayers,
    layer: str,
    values: StoredTensor,
    scales: StoredTensor,
    factor: StoredTensor | None = None,
    divides: bool = False,
) -> None:
    if len(values.shape) != 2 or len(scales.shape) != 2 or scales.dtype not in (FP8, *POWERS):
        raise layers.misfit(layer, values, scales)
    columns, width, groups = values.shape[0], 2 * values.shape[1], scales.shape[1]
    if scales.shape[0] != columns:
        raise layers.misfit(layer, values, scales)
    layers.each(layer, values, width, groups)
    bits = _bits(layers, layer, values, scales, width)
    if factor is not None:
        if factor.dtype != "float32" or factor.num_bytes != 4:
            raise layers.misfit(layer, factor)
        part = StoredPart("factors", "one", block=(columns, width))
        bits = replace(
            bits, parts=(*bits.parts, (part, factor)), factors="float32", factor_group=width, divides=divides
        )
    layers.add(f"{layer}.weight", (columns, width), bits, values)


def _bits(layers: StoredLayers, layer: str, values: StoredTensor, scales: StoredTensor, width: int) -> StoredBits:
    each = width // scales.shape[1]
    group = layers.group(layer, values, width, each)
    parts = (
        (StoredPart("values", "stream", 4), values),
        (StoredPart("scales", "items", block=(1, each)), scales),
    )
    return StoredBits("e2m1", 4, group, kept_scales(scales.dtype), "", parts)


def _join_experts(layers: StoredLayers, name: str, blocks: StoredTensor, scales: StoredTensor) -> None:
    count, columns, groups, size = blocks.shape
    if size != _MX_GROUP // 2 or scales.dtype != "uint8" or scales.shape != blocks.shape[:3]:
        raise layers.misfit(name, blocks, scales)
    width = groups * _MX_GROUP
    bits = [
        _bits(
            layers,
            name,
            member(blocks, i, count, (columns, width // 2)),
            member(scales, i, count, (columns, groups)),
            width,
        )
        for i in range(count)
    ]
    layers.check_alone(name, blocks)
    layers.tensors[name] = several(name, blocks, bits, (columns, width), is_turned=True)


def _refuse_scaled_inputs(layers: StoredLayers, layer: str, values: StoredTensor) -> None:
    if f"{layer}.pre_quant_scale" in layers.tensors:
        raise layers.error(layer, values, f"multiplies its inputs by pre_quant_scale, which is not supported: {REMEDY}")
