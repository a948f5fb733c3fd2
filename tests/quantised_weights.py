"""What is left of weights that are quantised as the loader does it."""

from __future__ import annotations

import mmap
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, PreTrainedModel

from flexgen_lite.model.packing import Packing
from flexgen_lite.model.quantization import Quantization
from flexgen_lite.workers.compute.unpacked_weights import rounded, unpacked
from flexgen_lite.workers.loader.weight_packing import PackedTensor
from flexgen_lite.workers.model.quantization import packings


def quantised(weight: torch.Tensor, packing: Packing) -> torch.Tensor:
    """A parameter of float32 after its way through the loader, packed and unpacked."""
    shape = tuple(weight.shape)
    arena = mmap.mmap(-1, packing.num_bytes(shape))
    bits = weight.contiguous().numpy().view(np.uint32)
    PackedTensor(packing, "float32", shape, 0).fill(bits, "float32", 0, bits.strides, arena, 0)
    memory = torch.frombuffer(arena, dtype=torch.uint8)
    count = packing.dimensions(shape)[0]
    parts = torch.stack([unpacked(memory, packing, shape, index, torch.float32) for index in range(count)])
    return (parts.transpose(1, 2) if packing.is_transposed else parts).reshape(shape)


def quantised_model(directory: Path, wanted: Quantization, read: frozenset[nn.Module] = frozenset()) -> PreTrainedModel:
    """Transformers' model in float32 with weights that are quantised and made float32 again."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for path, packing in packings(model, wanted, read).items():
        parameter = model.get_parameter(path)
        parameter.data = quantised(parameter.data, packing)
        if wanted.activations == "int8":
            module = model.get_submodule(path.rpartition(".")[0])
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda _, rows, group=packing.group: rounded(rows[0], group))
            else:
                module.forward = MethodType(_experts_of_rounded_rows, module)
                module.group = packing.group
    return model


def _experts_of_rounded_rows(
    module: Any, hidden: torch.Tensor, chosen: torch.Tensor, share: torch.Tensor
) -> torch.Tensor:
    """One by one, as Transformers describes its classes of experts."""
    output = torch.zeros_like(hidden)
    for token, (experts, weights) in enumerate(zip(chosen, share, strict=True)):
        for expert, weight in zip(experts, weights, strict=True):
            inner = linear(rounded(hidden[token], module.group), module.gate_up_proj[expert])
            inner = module._apply_gate(inner[None])[0]
            output[token] += weight * linear(rounded(inner, module.group), module.down_proj[expert])
    return output
