"""Checkpoints of compressed-tensors: llm-compressor's, our own, and those of others that write its formats.

Its config.json has a `quantization_config`. Of a layer X there are

    pack-quantized      X.weight_packed (int32), X.weight_scale, X.weight_shape; not symmetric: X.weight_zero_point;
                        actorder: X.weight_g_idx
    int-quantized       X.weight (int8), X.weight_scale
    float-quantized     X.weight (FP8), X.weight_scale: one for all, for each output, or for blocks
    nvfp4-pack-quantized  X.weight_packed (uint8), X.weight_scale (FP8), X.weight_global_scale
    mxfp4-pack-quantized  X.weight_packed (uint8), X.weight_scale (uint8)

Source: the package compressed-tensors 0.20, `compressors/`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexgen_lite.model.files import CheckpointError
from flexgen_lite.model.formats import fp4, fp8
from flexgen_lite.model.formats.input_order import part_of, read_order
from flexgen_lite.model.formats.layers import AGAIN, FLOATS, FP8, REMEDY, Part, StoredLayers, small
from flexgen_lite.model.formats.section import Section
from flexgen_lite.model.packing import Packing
from flexgen_lite.model.spec import StoredPart
from flexgen_lite.model.stored_tensor import StoredBits, StoredTensor
from flexgen_lite.text.shown import shown, shown_text

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
VALUES, SCALES, ZEROS, SHAPE, ORDER = (
    f".weight_{part}" for part in ("packed", "scale", "zero_point", "shape", "g_idx")
)
_FORMATS = (
    FORMAT, "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized",
    "mxfp8-quantized",
)  # fmt: skip
LINEAR = "Linear"
EXPERTS = r"re:.*\.experts\..*"
"""The target for experts one by one, by the name that they have in all known checkpoints. Transformers looks for it."""
_UNUSED = (
    ".input_scale",
    ".input_zero_point",
    ".input_global_scale",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".output_scale",
    ".weight_zero_point",
)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the layers that `targets` name are stored: by name, by regular expression behind "re:", or by class.

    Attributes:
        block: rows and items of K that have one scale, where it is by blocks.
    """

    targets: tuple[str, ...]
    num_bits: int
    is_symmetric: bool  # there are no zeros
    block: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Schemes:
    """What a config.json says of its checkpoint's layers."""

    schemes: tuple[Scheme, ...]

    def num_bits(self, layer: str) -> int | None:
        """Of a layer's weight; None where no scheme or several may be meant."""
        bits = {scheme.num_bits for scheme in self._schemes(layer)}
        return bits.pop() if len(bits) == 1 else None

    def has_zeros(self, layer: str) -> bool:
        """Whether whatever scheme may be meant for a layer has zeros."""
        return not any(scheme.is_symmetric for scheme in self._schemes(layer))

    def block(self, layer: str) -> tuple[int, int] | None:
        return next((scheme.block for scheme in self._schemes(layer) if scheme.block is not None), None)

    def _schemes(self, layer: str) -> Sequence[Scheme]:
        named = [s for s in self.schemes if any(_names(target, layer) for target in s.targets)]
        return named[:1] or [s for s in self.schemes if any(_is_class(t) for t in s.targets)] or self.schemes


def read_schemes(section: Section) -> Schemes:
    """Raises CheckpointError where they are not of the kind that can be read."""
    values, where = section.values, section.where
    groups = values.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"{where}: its quantization_config has no config_groups: download it again")
    schemes = []
    for name, group in groups.items():
        if isinstance(group, dict) and "weights" in group and group["weights"] is None:
            continue  # it is for activations or the KV cache
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise CheckpointError(
                f"{where}: {shown_text(name)} of config_groups has no weights, which is not supported"
            )
        schemes.append(_scheme(group, values, f"{where}: {shown_text(name)} of config_groups"))
    return Schemes(tuple(schemes))


def _refuse_changed(section: Section) -> None:
    """Weights that are other than their numbers say."""
    values, where = section.values, section.where
    sparsity = values.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise CheckpointError(f"{where}: sparse weights ({shown_text(sparsity['format'])}) are not supported: {REMEDY}")
    transforms = values.get("transform_config")
    if isinstance(transforms, dict) and transforms.get("config_groups"):
        raise CheckpointError(f"{where}: weights that are rotated (transform_config) are not supported: {REMEDY}")


def _scheme(group: Mapping[str, Any], section: Mapping[str, Any], where: str) -> Scheme:
    weights, kind = group["weights"], group.get("format") or section.get("format")
    if kind not in _FORMATS and kind != "mixed-precision" and kind is not None:
        raise CheckpointError(f"{where} is stored as {shown_text(kind)}, which is not read: {REMEDY}")
    bits, number = weights.get("num_bits"), weights.get("type", "int")
    if bits not in ({"int": range(1, 9), "float": (4, 8)}.get(number, ()) if type(number) is str else ()):
        raise CheckpointError(
            f"{where} has weights of {shown(bits)} bits, {shown_text(str(number))}: only whole numbers of 1 to 8 bits "
            f"and floats of 4 or 8 bits are read: {REMEDY}"
        )
    block = weights.get("block_structure") if weights.get("strategy") == "block" else None
    if block is not None and not (isinstance(block, list) and len(block) == 2 and all(type(b) is int for b in block)):
        raise CheckpointError(f"{where} has a block_structure of {shown(block)}: download it again")
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"{where} has no list of targets: download it again")
    for target in targets:
        try:
            re.compile(target.removeprefix("re:"))
        except re.error as error:
            raise CheckpointError(f"{where}: {shown(target)} is no regular expression: {error}") from None
    blocks = None if block is None else (block[0], block[1])
    return Scheme(tuple(targets), bits, weights.get("symmetric") is not False, blocks)


def join(layers: StoredLayers) -> None:
    """Puts the parts of its weights together. Raises CheckpointError."""
    packed, is_named = list(layers.layers(VALUES)), layers.section.format == METHOD
    whole = [(layer, values) for layer, values in layers.layers(".weight") if _is_whole(layers, layer, values)]
    floats = [(layer, values) for layer, values in layers.layers(".weight") if is_named and values.dtype == FP8]
    if is_named:
        _refuse_changed(layers.section)
    schemes = read_schemes(layers.section) if is_named and (packed or whole or floats) else None
    for layer, values in packed:
        layers.take(values.name)
        with layers.apart(f"{layer}.weight", values):
            if values.dtype == "uint8":
                fp4.join_packed(layers, layer, values)
            else:
                _join_whole_numbers(layers, schemes, layer, values)
    for layer, values in whole:
        with layers.apart(values.name, values):
            fp8.join_bytes(layers, layer, values, SCALES, None, layers.take(layer + ZEROS), in_scales=True)
    for layer, values in floats:
        with layers.apart(values.name, values):
            block = schemes.block(layer) if schemes is not None else None
            fp8.join_bytes(layers, layer, values, SCALES, block, in_scales=True)
    if not is_named:
        return
    for suffix in _UNUSED:
        for _, tensor in layers.layers(suffix):
            layers.take(tensor.name)


def _is_whole(layers: StoredLayers, layer: str, values: StoredTensor) -> bool:
    """Whether it is a weight of bytes with a sign, with scales as other formats do not have them."""
    has_scales = layer + SCALES in layers.tensors or layers.section.format == METHOD
    return values.dtype == "int8" and len(values.shape) == 2 and has_scales


def _join_whole_numbers(layers: StoredLayers, schemes: Schemes | None, layer: str, values: StoredTensor) -> None:
    shape, order = layers.take(layer + SHAPE), layers.take(layer + ORDER)
    scales, zeros = layers.needed(layer, SCALES, values), layers.take(layer + ZEROS)
    bits = _bits(layers, schemes, layer, values, shape)
    if zeros is None and schemes is not None and schemes.has_zeros(layer):
        raise layers.error(
            layer, values, f"has no weight_zero_point, and config.json says that it is not symmetric: {AGAIN}"
        )
    if values.dtype != "int32" or len(values.shape) != 2 or scales.dtype not in FLOATS or len(scales.shape) != 2:
        raise layers.misfit(layer, values, scales)
    columns, words, groups = *values.shape, scales.shape[1]
    width = words * 32 // bits if bits in (4, 8) else _width(layers, layer, values, shape)
    in_word = 0 if words == -(-width * bits // 32) else 32 // bits  # items; 0: what does not fit goes on in the next
    fits = scales.shape[0] == columns and words == -(-width * bits // 32 if in_word == 0 else -width // in_word)
    if zeros is not None:
        fits = fits and zeros.dtype == "int32" and zeros.shape == (-(-columns * bits // 32), groups)
        fits = fits and (32 % bits == 0 or columns % 32 == 0)
    if not fits:
        raise layers.misfit(layer, values, scales, zeros)
    each = layers.each(layer, values, width, groups)
    group, digest = layers.group(layer, values, width, each), read_order(layers, layer, order, width, each)
    others = (small(order),) if digest and order is not None else ()
    as_kept = bits in (4, 8) and words * 32 == width * bits
    layout, number = ("stream", 0) if as_kept else ("bit_stream", in_word)
    parts: list[Part] = [
        (StoredPart("values", layout, bits, others=others, number=number), values),
        (StoredPart("scales", "items", block=(1, each)), scales),
    ]
    if zeros is not None:
        parts.append((StoredPart("zeros", "packed_zeros", bits, (1, group)), zeros))
    if digest and order is not None:
        parts.append(part_of(order, columns))
    kept = 4 if bits <= 4 else 8
    zeros_as = "" if zeros is None else "uint8"
    stored = StoredBits("int", kept, group, scales.dtype, zeros_as, tuple(parts), digest, fp8.finish_in(scales.dtype))
    layers.add(f"{layer}.weight", (columns, width), stored, values)


def _bits(
    layers: StoredLayers, schemes: Schemes | None, layer: str, values: StoredTensor, shape: StoredTensor | None
) -> int:
    """By config.json, or where that says nothing, by the shape."""
    bits = None if schemes is None else schemes.num_bits(layer)
    if bits is None and shape is not None and shape.num_bytes and len(values.shape) == 2:
        width = _width(layers, layer, values, shape)
        bits = next((bits for bits in (4, 8) if width and values.shape[1] * 32 == width * bits), None)
    if bits is None:
        raise layers.error(layer, values, f"does not say how many bits its weight has in config.json: {AGAIN}")
    return bits


def _width(layers: StoredLayers, layer: str, values: StoredTensor, shape: StoredTensor | None) -> int:
    """K, as its weight_shape says."""
    if shape is None or shape.shape != (2,) or shape.dtype not in ("int64", "int32"):
        raise layers.error(layer, values, f"has no weight_shape of two whole numbers: {AGAIN}")
    return int(layers.number(shape, 1))


def _names(target: str, layer: str) -> bool:
    return re.match(target[3:], layer) is not None if target.startswith("re:") else target == layer


def _is_class(target: str) -> bool:
    return not target.startswith("re:") and "." not in target


def section_of(packings: Mapping[str, Packing], ignored: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint.

    Args:
        packings: by layer. They are alike, but that experts may have no zeros where others have.
        ignored: layers that are not packed.

    Raises:
        CheckpointError: a layer's name does not tell whether it belongs to experts.
    """
    kinds = {packing.has_zeros: packing for packing in packings.values()}
    if len(kinds) == 1:
        groups = [_group(LINEAR, packing) for packing in kinds.values()]
    else:
        for layer, packing in packings.items():
            if _names(EXPERTS, layer) == packing.has_zeros:
                raise CheckpointError(
                    f"{shown_text(layer)} is not told from experts by its name, so that it cannot be stored in another "
                    "way: give quantization_symmetric=true or quantization_symmetric=false"
                )
        groups = [_group(LINEAR, kinds[True]), _group(EXPERTS, kinds[False])]
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": list(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _group(target: str, packing: Packing) -> dict[str, Any]:
    weights = {
        "num_bits": packing.bits, "type": "int", "symmetric": not packing.has_zeros, "strategy": "group",
        "group_size": packing.group, "block_structure": None, "dynamic": False, "actorder": None, "observer": None,
        "observer_kwargs": {},
    }  # fmt: skip
    return {"targets": [target], "weights": weights, "input_activations": None, "output_activations": None}
