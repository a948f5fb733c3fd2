"""Puts parts of weights into 8 or 4 bits, where they belong in a packed tensor. Arrays hold the elements' bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flexgen_lite.memory.arena import Memory
from flexgen_lite.model.packing import ZERO_BYTES, Packing
from flexgen_lite.model.spec import ITEM_BYTES, TensorSpec
from flexgen_lite.workers.loader.weight_cast import Bits, bits_type, copy_cast

_PART_ELEMENTS = 1 << 18  # at once: what is made of them in float32 stays in the cache


class PackedParts(NamedTuple):
    """Values as words of 32 bits, scales, zeros or offsets as bytes, factors of scales, and those of offsets."""

    values: Bits
    scales: Bits
    zeros: Bits
    factors: Bits
    lows: Bits


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A tensor in few bits, at `offset` of a slot, and the shape and strides of what it would be in 16 bits."""

    packing: Packing
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: TensorSpec) -> PackedTensor | None:
        if tensor.packing is None:
            return None
        return cls(tensor.packing, tensor.dtype, tensor.shape, tensor.offset)

    @property
    def group_stride(self) -> int:
        """From an item of K to the next, in bytes of 16 bits each."""
        _, columns, _ = self.packing.dimensions(self.shape)
        return ITEM_BYTES[self.dtype] * (columns if self.packing.is_transposed else 1)

    def group_axis(self, shape: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
        """The dimension of a part along which K runs, in whole groups; None: there is none."""
        for axis, (size, stride) in enumerate(zip(shape, strides, strict=True)):
            if stride == self.group_stride and size % self.packing.group == 0:
                return axis
        return None

    def fill(
        self, source: Bits, source_dtype: str, offset: int, strides: tuple[int, ...], arena: Memory, slot_offset: int
    ) -> None:
        """Packs a part of the tensor; `offset` and `strides` say where its elements would be in 16 bits."""
        from flexgen_lite.workers.loader.quantise_kernels import LANES, SCRATCH_ROWS, quantise

        axis = self.group_axis(source.shape, strides)
        assert axis is not None
        packing, item = self.packing, ITEM_BYTES[self.dtype]
        count, columns, width = packing.dimensions(self.shape)
        runs = np.moveaxis(source, axis, -1)
        begins: Bits = np.full(runs.shape[:-1], offset // item, np.int64)
        for dim, (size, stride) in enumerate(zip(runs.shape[:-1], _without(strides, axis), strict=True)):
            steps = np.arange(size, dtype=np.int64) * (stride // item)
            begins += steps.reshape(-1, *[1] * (begins.ndim - dim - 1))
        begins = begins.reshape(-1)
        if packing.is_transposed:  # [E, K, N]
            rows = begins // (columns * width) * columns + begins % columns
            first = begins % (columns * width) // columns
        else:
            rows, first = begins // width, begins % width
        length = runs.shape[-1]
        runs = runs.reshape(-1, length)
        values, scales, zeros = self.parts(arena, slot_offset, count)[:3]
        scratch = np.empty((SCRATCH_ROWS + 3 * packing.group) * LANES, np.uint32)
        step = max(1, _PART_ELEMENTS // length // LANES) * LANES
        for start in range(0, len(runs), step):
            part = runs[start : start + step]
            padded = np.zeros((-(-len(part) // LANES) * LANES, length), np.uint32)
            copy_cast(part, source_dtype, padded[: len(part)], "float32")
            quantise(
                padded.view(np.float32), rows[start : start + step], first[start : start + step], packing.bits,
                packing.group, packing.order == "int8", columns, width, values, scales, zeros, scratch,
            )  # fmt: skip

    def parts(self, arena: Memory, slot_offset: int, count: int) -> PackedParts:
        """Of the `count` weights of the tensor."""
        packing, shape, start = self.packing, self.shape, slot_offset + self.offset
        scales, factors = count * packing.num_scales(shape), count * packing.num_factors(shape)
        factor = bits_type(packing.factors) if packing.factors else np.uint8
        lows = factors if packing.zeros == "scaled" else 0
        return PackedParts(
            np.ndarray(packing.scales_at(shape) // 4, np.uint32, arena, start),
            np.ndarray(scales, bits_type(packing.scale_dtype), arena, start + packing.scales_at(shape)),
            np.ndarray(scales * ZERO_BYTES[packing.zeros], np.uint8, arena, start + packing.zeros_at(shape)),
            np.ndarray(factors, factor, arena, start + packing.factors_at(shape)),
            np.ndarray(lows, factor, arena, start + packing.lows_at(shape)),
        )

    def order(self, arena: Memory, slot_offset: int) -> Bits:
        """The numbers of the inputs, `[E, K]`, where they are sorted by group."""
        count, _, width = self.packing.dimensions(self.shape)
        start = slot_offset + self.offset + self.packing.order_at(self.shape)
        return np.ndarray((count, width), np.int32, arena, start)


def _without(strides: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return strides[:axis] + strides[axis + 1 :]
