"""Weights of 8 and 4 bits where no kernel of ours multiplies with them as they lie: unpacked before, some columns at a
time, so that a weight of any size takes no more memory than the plan has for it (plan/need.py, UNPACKING_BYTES)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flexgen_lite.model.packing import COLUMNS, TABLES, Packing, num_blocks
from flexgen_lite.workers.compute import prefill_cpu, product_onednn
from flexgen_lite.workers.compute.product_weights import Weights, weights_of_bits
from flexgen_lite.workers.compute.unpack_kernels import unpack_blocks
from flexgen_lite.workers.model.weight_map import packed_weights

ROUNDED_ROWS = 256  # that are made float32 at once
SLAB_ITEMS = {"cpu": 2 << 20, "cuda": 8 << 20}  # of a weight, unpacked at once


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

    def in_order(self, rows: torch.Tensor, index: int = 0) -> torch.Tensor:
        """Rows `[..., K]` for weight number `index`: their items sorted by group where its are."""
        if not self.packing.is_sorted:
            return rows
        order = order_of_inputs(self.memory, self.packing, self.shape, index)
        return rows.index_select(-1, order)

    def ours(self) -> Weights | None:
        """As our own kernels see it; None where they do not serve it."""
        memory = self.memory
        if self.dtype != torch.bfloat16 or memory.device.type != "cpu":
            return None
        return weights_of_bits(memory, self.packing, self.shape)


def unpacked(
    memory: torch.Tensor,
    packing: Packing,
    shape: tuple[int, ...],
    index: int,
    dtype: torch.dtype,
    first: int = 0,
    count: int | None = None,
) -> torch.Tensor:
    """Weight number `index`, `[N, K]` in `dtype`: value * scale + offset, rounded once.

    Args:
        first, count: blocks of columns; None: all that follow.
    """
    sorted_NK = _unpacked(memory, packing, shape, index, dtype, first, count)
    if not packing.is_sorted:
        return sorted_NK
    weight_NK = torch.empty_like(sorted_NK)
    weight_NK[:, order_of_inputs(memory, packing, shape, index)] = sorted_NK
    return weight_NK


def order_of_inputs(memory: torch.Tensor, packing: Packing, shape: tuple[int, ...], index: int) -> torch.Tensor:
    """The inputs of weight number `index` as they are sorted by group, int32 `[K]`."""
    width = packing.dimensions(shape)[2]
    start = packing.order_at(shape) + 4 * width * index
    return memory[start : start + 4 * width].view(torch.int32)


def _unpacked(
    memory: torch.Tensor,
    packing: Packing,
    shape: tuple[int, ...],
    index: int,
    dtype: torch.dtype,
    first: int,
    count: int | None,
) -> torch.Tensor:
    """The same, its inputs sorted by group where they are."""
    _, columns, width = packing.dimensions(shape)
    blocks, groups, middle = num_blocks(columns), width // packing.group, 8 if packing.bits == 4 else 128
    count = blocks - first if count is None else count
    begin, size = index * blocks + first, packing.value_bytes(shape) // blocks

    def by_column(start: int, kind: torch.dtype, groups: int = groups) -> torch.Tensor:
        block_bytes = groups * COLUMNS * kind.itemsize
        found = memory[start + begin * block_bytes : start + (begin + count) * block_bytes].view(kind)
        return found.view(count, groups, COLUMNS).transpose(1, 2).reshape(-1, groups, 1).float()

    def factors(start: int) -> torch.Tensor:
        of_group = width // packing.factor_group
        found = by_column(start, getattr(torch, packing.factors), of_group)
        return found.repeat_interleave(groups // of_group, 1)

    codes = _codes(memory[begin * size : (begin + count) * size], packing, count).view(-1, groups, packing.group)
    if packing.kind == "int":
        values = codes.float()
        values -= by_column(packing.zeros_at(shape), torch.uint8) if packing.has_zeros else middle
    elif packing.bits == 4:
        values = torch.tensor(TABLES[packing.kind], device=memory.device)[codes.int()]
    else:
        values = codes.view(torch.float8_e4m3fn).float()
    scales = by_column(packing.scales_at(shape), getattr(torch, packing.scale_dtype))
    if packing.factors:
        factor = factors(packing.factors_at(shape))
        scales = scales / factor if packing.divides else scales * factor
    values *= scales
    if packing.finish == "127":
        values *= 1 / 127
    elif packing.finish == "float16":
        values = values.half().float()
    if packing.zeros == "float32":
        values += by_column(packing.zeros_at(shape), torch.float32)
    elif packing.zeros == "scaled":
        values -= by_column(packing.zeros_at(shape), torch.uint8) * factors(packing.lows_at(shape))
    return values.view(-1, width)[: columns - first * COLUMNS].to(dtype)


def _codes(values: torch.Tensor, packing: Packing, blocks: int) -> torch.Tensor:
    """q + 8, or + 128, or what else a code is, `[columns of all blocks, K]`, uint8."""
    if packing.order == "bfloat16":
        words = values.view(blocks, -1, COLUMNS, 2, 4)
        halves = torch.stack((words & 15, words >> 4), dim=-1)
        codes = (words ^ 128 if packing.kind == "int" else words) if packing.bits == 8 else halves.flatten(-2)
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
        rows: their items sorted by group where the weight's are.
    """
    packing, memory = bits.packing, bits.memory
    _, columns, width = packing.dimensions(bits.shape)
    x_TK = rows.reshape(-1, width)
    dtype = torch.float32 if packing.rounds_rows else rows.dtype
    together = ROUNDED_ROWS if packing.rounds_rows else max(1, len(x_TK))  # rows; in float32 they take more memory
    has_kernel = dtype == torch.float32 and packing.order == "int8" and memory.device.type == "cpu"
    has_kernel = has_kernel and prefill_cpu.parallel() is not None
    blocks = max(1, SLAB_ITEMS.get(memory.device.type, SLAB_ITEMS["cpu"]) // (COLUMNS * width))
    output_TN = rows.new_empty((len(x_TK), columns))
    for first in range(0, num_blocks(columns), blocks):
        count = min(blocks, num_blocks(columns) - first)
        part = slice(first * COLUMNS, min(columns, (first + count) * COLUMNS))
        bias = None if bias_N is None else bias_N[part].to(dtype)
        if has_kernel:
            slab_KN = x_TK.new_empty((width, count * COLUMNS), dtype=dtype)
            unpack_blocks(memory, packing, bits.shape, index, first, slab_KN)
            weight_NK = (
                slab_KN.t()
            )  # with the columns that fill up a block: oneDNN has no kernel for a part of a matrix
            bias = None if bias is None else nn.functional.pad(bias, (0, len(weight_NK) - len(bias)))
        else:
            weight_NK = _unpacked(memory, packing, bits.shape, index, dtype, first, count)
        for row in range(0, len(x_TK), together):
            x = x_TK[row : row + together]
            x = rounded(x.float(), packing.group) if packing.rounds_rows else x
            product_TN = _product(x, weight_NK, bias) if has_kernel else multiply(x, weight_NK, bias)
            output_TN[row : row + together, part] = product_TN[:, : part.stop - part.start]
    return output_TN.view(*rows.shape[:-1], columns)


def _product(x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
    """By oneDNN, where there is one: with it a row's product does not depend on how many others there are."""
    if torch.backends.mkldnn.is_available():
        return product_onednn.multiply(x_TK, weight_NK, bias_N)
    return torch.nn.functional.linear(x_TK, weight_NK, bias_N)


def rounded(rows: torch.Tensor, group: int) -> torch.Tensor:
    """What 8 bits keep of rows `[..., K]`, with a scale for every `group` items."""
    parts = rows.unflatten(-1, (-1, group))
    most = parts.abs().amax(-1, keepdim=True)
    factor = torch.where(most > 0, torch.full_like(most, 127) / most, 0)
    factor.clamp_(max=torch.finfo(most.dtype).max)  # of tiny items it is infinite
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
