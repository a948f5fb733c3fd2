"""Weights of 8 and 4 bits where no kernel of ours multiplies with them as they lie: unpacked before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flexgen_lite.model.packing import COLUMNS, Packing, num_blocks
from flexgen_lite.workers.compute import prefill_cpu
from flexgen_lite.workers.compute.product_weights import Weights, weights_of_bits
from flexgen_lite.workers.compute.unpack_kernels import unpack_blocks
from flexgen_lite.workers.model.weight_map import packed_weights

SLAB_BYTES = 8 << 20  # of a weight that is unpacked, in float32


@dataclass(frozen=True, slots=True)
class PackedBits:
    """A parameter that is kept in few bits, in a slot that may change from pass to pass.

    Attributes:
        shape: of the parameter.
    """

    module: nn.Module
    name: str
    packing: Packing
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def memory(self) -> torch.Tensor:
        return packed_weights(self.module)[self.name]

    def ours(self) -> Weights | None:
        """As our own kernels see it; None where they do not serve it."""
        if self.dtype != torch.bfloat16 or self.memory.device.type != "cpu":
            return None
        return weights_of_bits(self.memory, self.packing, self.shape)

    def __getitem__(self, index: int) -> torch.Tensor:
        """One of the weights, `[N, K]`."""
        return unpacked(self.memory, self.packing, self.shape, index, self.dtype)


def unpacked(
    memory: torch.Tensor, packing: Packing, shape: tuple[int, ...], index: int, dtype: torch.dtype
) -> torch.Tensor:
    """Weight number `index`, `[N, K]` in `dtype`: (q - zero) * scale, rounded once."""
    _, columns, width = packing.dimensions(shape)
    blocks, groups, middle = num_blocks(columns), width // packing.group, 8 if packing.bits == 4 else 128
    size, num_scales = packing.value_bytes(shape), packing.num_scales(shape)

    def by_column(start: int, kind: torch.dtype) -> torch.Tensor:
        begin = start + index * num_scales * kind.itemsize
        found = memory[begin : begin + num_scales * kind.itemsize].view(kind)
        return found.view(blocks, groups, COLUMNS).transpose(1, 2).reshape(-1, groups, 1).float()

    codes = _codes(memory[index * size : (index + 1) * size], packing, blocks)
    values = codes.view(-1, groups, packing.group).float()
    values = values - (by_column(packing.zeros_at(shape), torch.uint8) if packing.has_zeros else middle)
    values = values * by_column(packing.scales_at(shape), getattr(torch, packing.scale_dtype))
    return values.view(-1, width)[:columns].to(dtype)


def _codes(values: torch.Tensor, packing: Packing, blocks: int) -> torch.Tensor:
    """q + 8, or + 128, `[columns of all blocks, K]`, uint8."""
    if packing.order == "bfloat16":
        words = values.view(blocks, -1, COLUMNS, 2, 4)
        halves = torch.stack((words & 15, words >> 4), dim=-1)
        codes = words ^ 128 if packing.bits == 8 else halves.flatten(-2)
        codes = codes.permute(0, 2, 1, 4, 3)
    else:
        words = values.view(blocks, -1, COLUMNS, 4)
        codes = words[..., None, :] if packing.bits == 8 else torch.stack((words & 15, words >> 4), dim=-2)
        codes = codes.permute(0, 2, 1, 3, 4)
    return codes.reshape(blocks * COLUMNS, -1)


def multiplied(
    multiply: Callable[..., torch.Tensor], rows: torch.Tensor, bits: PackedBits, index: int, bias_N: torch.Tensor | None
) -> torch.Tensor:
    """A product with weight number `index`, unpacked for it; rows that are to be rounded to 8 bits are multiplied in
    float32.

    Args:
        multiply: rows, weight and bias to the product.
    """
    packing = bits.packing
    if not packing.rounds_rows and rows.dtype != torch.float32:
        return multiply(rows, bits[index], bias_N)
    x = rounded(rows.float(), packing.group) if packing.rounds_rows else rows
    bias = None if bias_N is None else bias_N.float()
    if packing.order == "int8" and rows.device.type == "cpu" and prefill_cpu.parallel() is not None:
        return _in_slabs(x, bits, index, bias).to(rows.dtype)
    weight_NK = unpacked(bits.memory, packing, bits.shape, index, torch.float32)
    return multiply(x, weight_NK, bias).to(rows.dtype)


def _in_slabs(rows: torch.Tensor, bits: PackedBits, index: int, bias_N: torch.Tensor | None) -> torch.Tensor:
    """In float32, with some blocks of columns at a time."""
    _, columns, width = bits.packing.dimensions(bits.shape)
    x_TK = rows.reshape(-1, width)
    output_TN = x_TK.new_empty((len(x_TK), columns))
    blocks = max(1, SLAB_BYTES // (4 * COLUMNS * width))
    for first in range(0, num_blocks(columns), blocks):
        count = min(blocks, num_blocks(columns) - first)
        slab_KN = x_TK.new_empty((width, count * COLUMNS))
        unpack_blocks(bits.memory, bits.packing, bits.shape, index, first, slab_KN)
        part = slice(first * COLUMNS, min(columns, (first + count) * COLUMNS))
        product_TN = torch.mm(x_TK, slab_KN[:, : part.stop - part.start])
        output_TN[:, part] = product_TN if bias_N is None else product_TN.add_(bias_N[part])
    return output_TN.view(*rows.shape[:-1], columns)


def rounded(rows: torch.Tensor, group: int) -> torch.Tensor:
    """What 8 bits keep of rows `[..., K]`, with a scale for every `group` items."""
    parts = rows.unflatten(-1, (-1, group))
    most = parts.abs().amax(-1, keepdim=True)
    factor = torch.where(most > 0, torch.full_like(most, 127) / most, 0)
    near: torch.Tensor = ((parts * factor).round() * (most / 127)).flatten(-2)
    return near


def bits_of(model: nn.Module, packings: Any) -> dict[nn.Module, dict[str, PackedBits]]:
    """By module and parameter, those of `packings`, which are by the parameters' names."""
    found: dict[nn.Module, dict[str, PackedBits]] = {}
    for path, packing in packings.items():
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        parameter: Any = module._parameters[name]
        bits = PackedBits(module, name, packing, tuple(parameter.shape), parameter.dtype)
        found.setdefault(module, {})[name] = bits
    return found
