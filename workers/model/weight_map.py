"""From a model on the meta device and a checkpoint to the units that are loaded, and back to its parameters.

A unit is what is loaded together: one decoder layer, or everything outside the layers. `map_weights` says
what fills each tensor of a unit and where it lies in the unit's slot; `Binding` points the modules at a slot.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from flexgen_lite.memory.slot_layout import TensorSource, layout_unit
from flexgen_lite.model.checkpoint import Checkpoint
from flexgen_lite.model.files import CheckpointError, open_file, read
from flexgen_lite.model.packing import Packing
from flexgen_lite.model.spec import ITEM_BYTES, UnitSpec
from flexgen_lite.model.stored_tensor import StoredTensor
from flexgen_lite.text.shown import shown_names
from flexgen_lite.workers.model.quantization import HeldBits, stored_packing
from flexgen_lite.workers.model.weight_sources import FoundWeights, TargetDtypes, dtype_name, find_weights
from flexgen_lite.workers.model.weight_trace import to_pieces

_COMPARE_BYTES = 8 << 20
Place = tuple[nn.Module, str]


@dataclass(frozen=True, slots=True)
class _SharedTensor:
    """A parameter or persistent buffer, under all its names (a tie's source first)."""

    names: tuple[str, ...]
    tensor: torch.Tensor
    unit: int


def map_weights(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    checkpoint: Checkpoint | None,
    dtype: torch.dtype,
    unused: frozenset[str] = frozenset(),
    packings: Mapping[str, Packing] | None = None,
    held: HeldBits | None = None,
) -> tuple[tuple[UnitSpec, ...], tuple[str, ...]]:
    """The units of `model`, whose parameters are on the meta device, and warnings for the user.

    `model` must have been built with `dtype` as the default dtype, and its weights tied: a tensor that its
    class makes in another dtype, or keeps in float32, stays so. Units `0 .. len(layers) - 1` are the layers,
    the last one is the rest. Without a checkpoint the tensors have no pieces. `unused` names tensors that the model has
    no more: the checkpoint may have them; `packings` those that are quantised while they are loaded. What is in few
    bits in the checkpoint stays so, as `held` says. Raises CheckpointError.
    """
    floats = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if floats and dtype not in floats:
        raise ValueError(f"the model was built in {floats}, not in {dtype}")
    dtypes = TargetDtypes(model, dtype)
    packings, held = packings or {}, held or HeldBits({}, "bfloat16", False)
    units: list[list[TensorSource]] = [[] for _ in range(len(layers) + 1)]
    found = None if checkpoint is None else find_weights(model, checkpoint, dtypes, unused)
    missing: list[str] = []
    unlike: list[str] = []  # joined from tensors that are not alike
    for shared in _shared_tensors(model, layers):
        shape = tuple(shared.tensor.shape)
        if checkpoint is None or found is None:
            name = shared.names[0]
            target = dtype_name(dtypes.of(name, shared.tensor))
            units[shared.unit].append(TensorSource(name, target, shape, (), packings.get(name)))
            continue
        names = _distinct(shared.names, found, checkpoint)
        if not names and not _may_be_missing(model, shared):
            missing.append(shared.names[0])
        for name in names:
            traced = found.traced[name]
            stored = stored_packing(name, traced.parts, held)
            if stored is None and name in held.is_transposed and _is_in_few_bits(traced):
                unlike.append(name)
            pieces = tuple(piece for part in traced.parts for piece in to_pieces(part, shape, stored is not None))
            packing = stored or packings.get(name)
            units[shared.unit].append(TensorSource(name, dtype_name(traced.dtype), shape, pieces, packing))
    if missing and checkpoint is not None:
        raise CheckpointError(_missing_message(missing, checkpoint))
    paths = {module: path for path, module in model.named_modules()}
    unit_names = [*(paths[layer] for layer in layers), "outside the layers"]
    specs = tuple(layout_unit(name, sources) for name, sources in zip(unit_names, units, strict=True))
    return specs, (*_warnings(found), *_warnings_of_unlike(unlike))


def _shared_tensors(model: PreTrainedModel, layers: Sequence[nn.Module]) -> list[_SharedTensor]:
    owners = {id(module): index for index, layer in enumerate(layers) for module in layer.modules()}
    names: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor):
            names.setdefault(id(tensor), []).append(name)
            tensors[id(tensor)] = tensor
    tied_to_others = model.all_tied_weights_keys
    shared = []
    for key, tensor in tensors.items():
        units = {owners.get(id(_place(model, name)[0]), len(layers)) for name in names[key]}
        ordered = sorted(names[key], key=lambda name: name in tied_to_others)
        # What several layers share is loaded once, with the rest.
        shared.append(_SharedTensor(tuple(ordered), tensor, units.pop() if len(units) == 1 else len(layers)))
    return shared


def _place(model: nn.Module, name: str) -> Place:
    module, _, attribute = name.rpartition(".")
    return model.get_submodule(module), attribute


def _distinct(names: Sequence[str], found: FoundWeights, checkpoint: Checkpoint) -> list[str]:
    """The names under which the checkpoint has the tensor; of several with equal contents, the first.

    Where the config ties tensors that differ in the checkpoint, Transformers keeps both, and so does this.
    """
    distinct: list[str] = []
    for name in names:
        if name in found.traced and not any(_equal(found, checkpoint, name, other) for other in distinct):
            distinct.append(name)
    return distinct


def _equal(found: FoundWeights, checkpoint: Checkpoint, name: str, other: str) -> bool:
    parts, others = found.traced[name].parts, found.traced[other].parts
    if len(parts) != 1 or len(others) != 1 or parts[0].views != others[0].views:
        return False
    a, b = parts[0].stored, others[0].stored
    if a == b:
        return True
    if a.dtype != b.dtype or a.shape != b.shape or a.bits or b.bits:
        return False
    return all(x == y for x, y in zip(_contents(checkpoint, a), _contents(checkpoint, b), strict=True))


def _contents(checkpoint: Checkpoint, stored: StoredTensor) -> Iterator[bytes]:
    path = Path(checkpoint.files[stored.file])
    with open_file(path) as stream:
        for start in range(0, stored.num_bytes, _COMPARE_BYTES):
            length = min(_COMPARE_BYTES, stored.num_bytes - start)
            stream.seek(stored.offset + start)
            yield read(stream, path, length)
            os.posix_fadvise(stream.fileno(), stored.offset + start, length, os.POSIX_FADV_DONTNEED)


def _may_be_missing(model: PreTrainedModel, shared: _SharedTensor) -> bool:
    """True for a buffer that the class made with its value and allows checkpoints to lack."""
    patterns = model._keys_to_ignore_on_load_missing or ()
    return not shared.tensor.is_meta and any(re.search(pattern, name) for pattern in patterns for name in shared.names)


def _missing_message(missing: Sequence[str], checkpoint: Checkpoint) -> str:
    names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    files = ", ".join(checkpoint.files[:3]) + (", ..." if len(checkpoint.files) > 3 else "")
    count = "one file" if len(checkpoint.files) == 1 else f"{len(checkpoint.files)} files"
    return (
        f"the checkpoint lacks {names} (searched {count}: {files}): the download is incomplete, or {checkpoint.misfit}"
    )


def _is_in_few_bits(traced: Any) -> bool:
    return any(part.stored.bits is not None and part.stored.bits.kind for part in traced.parts)


def _warnings_of_unlike(names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        return ()
    return (
        f"{len(names)} weights are joined from tensors that are quantised in different ways, and are kept in 16 bits: "
        f"{shown_names(names)}",
    )


def _warnings(found: FoundWeights | None) -> tuple[str, ...]:
    if found is None or not found.unexpected:
        return ()
    names, count = shown_names(found.unexpected), len(found.unexpected)
    return (f"{count} tensors of the checkpoint have no place in the model and are ignored: {names}",)


@dataclass(frozen=True, slots=True)
class _BoundTensor:
    """`places` are modules' `_parameters` or `_buffers`, and the key in them."""

    places: tuple[tuple[dict[str, Any], str], ...]
    is_parameter: bool
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int  # in elements, from the start of the slot


class Binding:
    """Points the modules' parameters and persistent buffers at the slot that holds their unit; for weights in few bits
    see `packed_weights`.

    Make it before the first `bind`, while tied parameters are still one object.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[nn.Module], units: Sequence[UnitSpec]) -> None:
        in_units = {tensor.name for unit in units for tensor in unit.tensors}
        self.places: dict[str, tuple[Place, ...]] = {}
        self._packed = {tensor.name for unit in units for tensor in unit.tensors if tensor.packing is not None}
        for shared in _shared_tensors(model, layers):
            present = [name for name in shared.names if name in in_units]
            for name in present:
                followers = [other for other in shared.names if other not in in_units] if name == present[0] else []
                unique = {
                    (id(module), attribute): (module, attribute)
                    for module, attribute in (_place(model, one) for one in (name, *followers))
                }
                self.places[name] = tuple(unique.values())
        self._units = [[self._bound(tensor) for tensor in _strided(unit)] for unit in units]

    def _bound(self, tensor: tuple[str, torch.dtype, tuple[int, ...], tuple[int, ...], int]) -> _BoundTensor:
        name, dtype, shape, stride, start = tensor
        places = self.places[name]
        if name in self._packed:
            packed = tuple((packed_weights(module), attribute) for module, attribute in places)
            return _BoundTensor(packed, False, dtype, shape, stride, start)
        return _BoundTensor(
            tuple((_tensors_of(*place), place[1]) for place in places),
            places[0][1] in places[0][0]._parameters,
            dtype,
            shape,
            stride,
            start,
        )

    def bind(self, unit: int, buffer: torch.Tensor) -> None:
        """Use the weights of `unit` that lie in `buffer`: uint8, 1-D, at least as long as the unit's slot.

        `buffer` starts on a multiple of 8 bytes of its storage. Nothing is copied; the buffer must outlive
        the use.
        """
        typed: dict[torch.dtype, torch.Tensor] = {}
        buffer = buffer[: buffer.numel() // 8 * 8]
        for bound in self._units[unit]:
            base = typed.get(bound.dtype)
            if base is None:
                base = typed[bound.dtype] = buffer.view(bound.dtype)
            view = base.as_strided(bound.shape, bound.stride, base.storage_offset() + bound.start)
            value = nn.Parameter(view, requires_grad=False) if bound.is_parameter else view
            for tensors, attribute in bound.places:
                tensors[attribute] = value


def packed_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """The bytes of a module's weights that are kept in few bits, by parameter; the parameter itself has no data."""
    found: dict[str, torch.Tensor] = module.__dict__.setdefault("_packed_weights", {})
    return found


def _tensors_of(module: nn.Module, attribute: str) -> dict[str, Any]:
    return cast(dict[str, Any], module._parameters if attribute in module._parameters else module._buffers)


def _strided(unit: UnitSpec) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], tuple[int, ...], int]]:
    for tensor in unit.tensors:
        if tensor.packing is not None:
            yield tensor.name, torch.uint8, (tensor.num_bytes,), (1,), tensor.offset
            continue
        stride = tuple(torch.empty(tensor.shape, device="meta").stride())
        start = tensor.offset // ITEM_BYTES[tensor.dtype]
        yield tensor.name, getattr(torch, tensor.dtype), tensor.shape, stride, start
