"""Weights of 8 and 4 bits in a checkpoint, in the format "pack-quantized" of compressed-tensors.

Its config.json has a `quantization_config`; a layer X has `X.weight_packed`, `X.weight_scale`, `X.weight_shape` and,
where it is not symmetric, `X.weight_zero_point` (stored_tensor.py says how they lie).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexgen_lite.model.files import CheckpointError
from flexgen_lite.model.packing import STEP, Packing
from flexgen_lite.model.stored_tensor import StoredBits, StoredTensor
from flexgen_lite.text.shown import shown, shown_text

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
VALUES, SCALES, ZEROS, SHAPE, ORDER = (
    f".weight_{part}" for part in ("packed", "scale", "zero_point", "shape", "g_idx")
)
BITS = (4, 8)
LINEAR = "Linear"
EXPERTS = r"re:.*\.experts\..*"
"""The target for experts one by one, by the name that they have in all known checkpoints. Transformers looks for it."""
_REMEDY = "use the unquantised model with `quantization`"
_FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the layers that `targets` name are stored: by name, by regular expression behind "re:", or by class."""

    targets: tuple[str, ...]
    num_bits: int
    is_symmetric: bool  # there are no zeros


@dataclass(frozen=True, slots=True)
class StoredQuantization:
    """What a config.json says of its checkpoint's weights.

    Attributes:
        rounds_activations: the checkpoint is meant for products with activations in few bits, too.
    """

    schemes: tuple[Scheme, ...]
    rounds_activations: bool

    def num_bits(self, layer: str) -> int | None:
        """Of a layer's weight; None where no scheme or several may be meant."""
        bits = {scheme.num_bits for scheme in self._schemes(layer)}
        return bits.pop() if len(bits) == 1 else None

    def has_zeros(self, layer: str) -> bool:
        """Whether whatever scheme may be meant for a layer has zeros."""
        return not any(scheme.is_symmetric for scheme in self._schemes(layer))

    def _schemes(self, layer: str) -> Sequence[Scheme]:
        named = [s for s in self.schemes if any(_names(target, layer) for target in s.targets)]
        return named[:1] or [s for s in self.schemes if any(_is_class(t) for t in s.targets)] or self.schemes


def read_quantization(section: Mapping[str, Any], where: str) -> StoredQuantization:
    """What a `quantization_config` of compressed-tensors says. `where` it is, for messages.

    Raises:
        CheckpointError: it is not of the kind that can be read.
    """
    sparsity = section.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise CheckpointError(
            f"{where}: sparse weights ({shown_text(sparsity['format'])}) are not supported: {_REMEDY}"
        )
    groups = section.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"{where}: its quantization_config has no config_groups: download it again")
    schemes, rounds = [], False
    for name, group in groups.items():
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise CheckpointError(
                f"{where}: {shown_text(name)} of config_groups has no weights, which is not supported"
            )
        rounds |= group.get("input_activations") is not None
        schemes.append(_scheme(group, section, f"{where}: {shown_text(name)} of config_groups"))
    return StoredQuantization(tuple(schemes), rounds)


def _scheme(group: Mapping[str, Any], section: Mapping[str, Any], where: str) -> Scheme:
    weights, kind = group["weights"], group.get("format") or section.get("format")
    if kind != FORMAT:
        raise CheckpointError(f"{where} is stored as {shown_text(kind)}, and only {FORMAT} is supported: {_REMEDY}")
    bits, number = weights.get("num_bits"), weights.get("type", "int")
    if bits not in BITS or number != "int":
        raise CheckpointError(
            f"{where} has weights of {shown(bits)} bits, {shown_text(number)}: only whole numbers of 4 or 8 bits are "
            f"supported: {_REMEDY}"
        )
    if (strategy := weights.get("strategy") or "group") not in ("group", "channel"):
        raise CheckpointError(
            f"{where} has scales by {shown_text(strategy)}: only group and channel are supported: {_REMEDY}"
        )
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"{where} has no list of targets: download it again")
    for target in targets:
        try:
            re.compile(target.removeprefix("re:"))
        except re.error as error:
            raise CheckpointError(f"{where}: {shown(target)} is no regular expression: {error}") from None
    return Scheme(tuple(targets), bits, weights.get("symmetric") is not False)


def join_parts(
    tensors: Mapping[str, StoredTensor], quantization: StoredQuantization, files: tuple[str, ...]
) -> dict[str, StoredTensor]:
    """The tensors, with a stand-in for a weight in the place of its parts. Raises CheckpointError."""
    joined = dict(tensors)
    for name, values in tensors.items():
        if not name.endswith(VALUES):
            continue
        layer = name.removesuffix(VALUES)
        if layer + ORDER in tensors:
            raise CheckpointError(
                f"{files[values.file]}: the inputs of {shown_text(layer)} are ordered by weight_g_idx, which is not "
                f"supported: quantise it without reordering (actorder), or {_REMEDY}"
            )
        weight = _joined(layer, tensors, quantization, files[values.file])
        if weight.name in tensors:
            raise CheckpointError(f"{files[values.file]}: {shown_text(weight.name)} is there twice, packed and not")
        for part in (VALUES, SCALES, ZEROS, SHAPE):
            joined.pop(layer + part, None)
        joined[weight.name] = weight
    return joined


def _joined(
    layer: str, tensors: Mapping[str, StoredTensor], quantization: StoredQuantization, file: str
) -> StoredTensor:
    where = f"{file}, layer {shown_text(layer)}"
    values, scales, zeros = (tensors.get(layer + part) for part in (VALUES, SCALES, ZEROS))
    assert values is not None
    bits = quantization.num_bits(layer)
    if bits is None:
        raise CheckpointError(f"{where}: config.json does not say how many bits its weight has: download both again")
    if scales is None:
        raise CheckpointError(f"{where} has no weight_scale: download the model again")
    if zeros is None and quantization.has_zeros(layer):
        raise CheckpointError(
            f"{where} has no weight_zero_point, and config.json says that it is not symmetric: download both again"
        )
    if values.dtype != "int32" or len(values.shape) != 2 or scales.dtype not in _FLOATS or len(scales.shape) != 2:
        raise CheckpointError(
            f"{where}: weight_packed is {values.dtype} {list(values.shape)} and weight_scale {scales.dtype} "
            f"{list(scales.shape)}, which is not supported: {_REMEDY}"
        )
    columns, width, groups = values.shape[0], values.shape[1] * 32 // bits, scales.shape[1]
    fits = scales.shape[0] == columns and groups and width % groups == 0
    if zeros is not None:
        fits = fits and zeros.dtype == "int32" and zeros.shape == (-(-columns * bits // 32), groups)
    if not fits:
        shapes = [list(part.shape) for part in (values, scales, zeros) if part is not None]
        raise CheckpointError(
            f"{where}: the shapes of its parts, {', '.join(map(str, shapes))}, do not fit {bits} bits: config.json "
            "does not belong to these weights, download both again"
        )
    group = width // groups
    if group % STEP:
        raise CheckpointError(
            f"{where} has a scale for every {group} inputs, and only multiples of {STEP} are supported: {_REMEDY}"
        )
    parts = StoredBits(bits, group, values, scales, zeros)
    return StoredTensor(
        f"{layer}.weight", values.file, values.offset, values.num_bytes, scales.dtype, (columns, width), parts
    )


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
