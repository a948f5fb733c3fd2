"""What a model directory has that is to be written anew: which tensors are packed, and which layers stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flexgen_lite.model.checkpoint import Checkpoint, check_config, open_checkpoint
from flexgen_lite.model.files import CheckpointError
from flexgen_lite.model.formats.compressed_tensors import section_of
from flexgen_lite.model.formats.gguf_header import is_gguf
from flexgen_lite.model.packing import Packing
from flexgen_lite.model.quantization import Quantization
from flexgen_lite.model.spec import TensorSpec
from flexgen_lite.workers.compute import attention_call, experts, probe
from flexgen_lite.workers.compute.latents import projections
from flexgen_lite.workers.compute.trial import find_text_path
from flexgen_lite.workers.conversion.shards import Item
from flexgen_lite.workers.model import builder
from flexgen_lite.workers.model.quantization import is_experts, packings, warnings_of
from flexgen_lite.workers.model.weight_map import map_weights
from flexgen_lite.workers.serve import UserError

_ZERO_EXPERTS = (
    "Transformers does not read experts of 4 bits with zeros: for it, leave quantization_symmetric=false out"
)
_INSTEAD = "quantise it while it is loaded: give the engine this model and `quantization`"


@dataclass(frozen=True, slots=True)
class SourceModel:
    """
    Attributes:
        items: all tensors of the checkpoint, in the order of its files.
        section: the `quantization_config` of the new checkpoint. Layers that are not packed are named in it as modules
            are; where a module holds what are several layers in the checkpoint, by the names that these have there.
        warnings: what whoever wants it so may not know.
    """

    directory: Path
    checkpoint: Checkpoint
    items: tuple[Item, ...]
    section: dict[str, Any]
    warnings: tuple[str, ...]


def open_source(directory: Path, wanted: Quantization) -> SourceModel:
    """
    Raises:
        CheckpointError: the checkpoint is not whole, or cannot be written in few bits.
        UserError: the model is not one that is served, or `wanted` does not fit it.
    """
    if is_gguf(directory):
        raise CheckpointError(
            f"{directory}: this command reads safetensors: give `quantization` to run a GGUF file of 16 or 32 bits"
        )
    if check_config(directory).format or open_checkpoint(directory).in_few_bits:
        raise CheckpointError(f"{directory} is quantised already: give the unquantised model")
    config = builder.load_config(directory)
    attention_call.register()
    experts.register()
    builder.language_model_class(config)
    builder.check_sizes(directory, config)
    keeps_latents = config.model_type in probe.TESTED_TYPES or probe.prove(config)
    checkpoint = open_checkpoint(directory)
    model = builder.build(config, torch.bfloat16)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    path = find_text_path(model, keeps_latents)
    packed = packings(model, wanted, projections(model.modules()))
    units, _ = map_weights(model, path.layers, checkpoint, torch.bfloat16, path.unused, packed)
    tensors = [tensor for unit in units for tensor in unit.tensors]
    sources = _packed_sources(tensors, checkpoint)
    ordered = sorted(checkpoint.tensors.values(), key=lambda stored: (stored.file, stored.offset))
    kept = {name for name in linear if f"{name}.weight" not in packed}
    kept.update(_kept_layers(model, [tensor for tensor in tensors if tensor.packing is None], checkpoint))
    order = {name: number for number, name in enumerate([*linear, *checkpoint.tensors])}
    ignored = sorted(kept, key=lambda name: (order.get(name, len(order)), name))
    has_zero_experts = any(
        packing.has_zeros and is_experts(model.get_submodule(name.rpartition(".")[0]))
        for name, packing in packed.items()
    )
    return SourceModel(
        directory,
        checkpoint,
        tuple(Item(stored, sources.get(stored.name)) for stored in ordered),
        section_of({name.removesuffix(".weight"): packing for name, packing in sources.items()}, ignored),
        (*warnings_of(model, wanted), *([_ZERO_EXPERTS] if has_zero_experts else [])),
    )


def _packed_sources(tensors: Sequence[TensorSpec], checkpoint: Checkpoint) -> Mapping[str, Packing]:
    """How each tensor of the checkpoint is packed that fills weights in few bits."""
    found: dict[str, Packing] = {}
    used: dict[str, int] = {}
    for tensor in tensors:
        if tensor.packing is None:
            continue
        _, _, width = tensor.packing.dimensions(tensor.shape)
        for piece in tensor.pieces:
            shape = checkpoint.tensors[piece.source_name].shape
            where = f"{tensor.name}: {piece.source_name} {list(shape)}"
            if len(shape) > 2:
                raise UserError(f"{where} joins all experts, which compressed-tensors has no form for: {_INSTEAD}")
            turned = tensor.packing.is_transposed or any(kind == "transpose" for kind, *_ in piece.views)
            if turned or shape[-1] != width or not piece.source_name.endswith(".weight"):
                raise UserError(f"{where} is no weight of a linear layer as compressed-tensors has it: {_INSTEAD}")
            found[piece.source_name] = replace(tensor.packing, order="bfloat16")
            used[piece.source_name] = used.get(piece.source_name, 0) + piece.num_bytes
    for name, num_bytes in used.items():
        if num_bytes != checkpoint.tensors[name].num_bytes:
            raise UserError(f"{name} fills layers that are to be quantised and others that are not: name all or none")
    return found


def _kept_layers(model: nn.Module, tensors: Sequence[TensorSpec], checkpoint: Checkpoint) -> Iterator[str]:
    """Weights of what is no linear layer in Transformers, but may be one elsewhere: routers, and experts one by one."""
    for tensor in tensors:
        module = model.get_submodule(tensor.name.rpartition(".")[0])
        if isinstance(module, nn.Linear | nn.Embedding):
            continue
        for piece in tensor.pieces:
            name = piece.source_name
            if name.endswith(".weight") and len(checkpoint.tensors[name].shape) == 2:
                yield name.removesuffix(".weight")
