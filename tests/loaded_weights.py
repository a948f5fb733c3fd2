"""Weights as the disk loader leaves them in memory, without an engine."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch

from flexgen_lite.model.quantization import Quantization
from flexgen_lite.model.spec import ModelSpec
from flexgen_lite.wire.worker_messages import AttachLoader, Load, OpenModel
from flexgen_lite.workers.compute.device import open_device
from flexgen_lite.workers.compute.model_open import open_model
from flexgen_lite.workers.compute.unpacked_weights import unpacked
from flexgen_lite.workers.loader.state import LoaderState


def spec_of(
    model: Path, quantization: Quantization | None = None, dtype: str = "float32", activations: str = "auto"
) -> ModelSpec:
    (model.parent / "run").mkdir(exist_ok=True)
    order = OpenModel(str(model), "auto", dtype, "cpu", False, None, quantization, activations)
    return open_model(order, open_device("cpu"), str(model.parent / "run")).spec


def loaded(spec: ModelSpec) -> dict[str, bytes]:
    """Every tensor as the loader leaves it in a slot."""
    found = {}
    for number, unit in enumerate(spec.units):
        arena = mmap.mmap(-1, unit.num_bytes)
        order = AttachLoader(spec.files, spec.stamps, spec.units, (0,), unit.num_bytes, "auto", False, 2, ())
        state = LoaderState(order, arena)
        state.load(Load(number, 0))
        state.close()
        found |= {tensor.name: arena[tensor.offset : tensor.offset + tensor.num_bytes] for tensor in unit.tensors}
    return found


def unpacked_weights(spec: ModelSpec) -> dict[str, torch.Tensor]:
    """The same, unpacked and in the model's dtype and shapes."""
    memories, found = loaded(spec), {}
    for tensor in (tensor for unit in spec.units for tensor in unit.tensors):
        memory, packing = torch.frombuffer(bytearray(memories[tensor.name]), dtype=torch.uint8), tensor.packing
        if packing is None:
            found[tensor.name] = memory.view(getattr(torch, tensor.dtype)).view(tensor.shape)
            continue
        count, dtype = packing.dimensions(tensor.shape)[0], getattr(torch, spec.dtype)
        parts = torch.stack([unpacked(memory, packing, tensor.shape, index, dtype) for index in range(count)])
        found[tensor.name] = (parts.transpose(1, 2) if packing.is_transposed else parts).reshape(tensor.shape)
    return found
