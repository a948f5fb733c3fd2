"""Made-up weights at memory speed, for benchmarks of models whose weights are not at hand.

Every tensor is a stretch of one repeated pseudo-random pattern, uniform with standard deviation 0.02, that
begins at an element chosen by the tensor's name and unit: the same in every run and in every slot.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from flexgen_lite.memory.arena import Memory
from flexgen_lite.model.packing import Packing
from flexgen_lite.model.spec import ITEM_BYTES, TensorSpec, UnitSpec
from flexgen_lite.workers.loader.weight_cast import Bits, bits_type

PATTERN_ELEMENTS = 131_071  # a prime: the rows of a matrix do not line up with the pattern; it stays in the L2 cache
FILL_BYTES = 8 << 20
_LIMIT = 0.02 * 3**0.5
_LARGEST = {"e4m3": 240, "e2m1": 6, "nf4": 1, "fp4": 1, "uint": 15}  # of what codes stand for
_FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Fill:
    """Elements of one tensor: `num_bytes` at `offset` of the slot.

    `phase` is where in the pattern they begin, or None where every element is `value`.
    """

    dtype: str
    offset: int
    num_bytes: int
    phase: int | None
    value: int


class DummyWeights:
    def __init__(self) -> None:
        uniform = np.random.default_rng(0).uniform(-_LIMIT, _LIMIT, PATTERN_ELEMENTS)
        single = uniform.astype(np.float32).view(np.uint32)
        self._patterns: dict[str, Bits] = {
            "float32": single,
            "bfloat16": ((single + 0x8000) >> 16).astype(np.uint16),
            "float16": uniform.astype(np.float16).view(np.uint16),
            "uint8": np.random.default_rng(1).integers(0, 256, PATTERN_ELEMENTS, dtype=np.uint8),
        }
        self._patterns["float8_e4m3fn"] = self._patterns["uint8"] & np.uint8(0xF7)  # none of them is no number

    def fills(self, index: int, unit: UnitSpec) -> Iterator[Fill]:
        """The parts of unit `index`, which may be filled in any order and by several threads."""
        for tensor in unit.tensors:
            if tensor.packing is not None:
                yield from _packed(index, tensor, tensor.packing)
                continue
            phase: int | None = None
            value = 0
            if tensor.dtype in _FLOATS and not tensor.name.endswith("bias"):
                if len(tensor.shape) == 1 and tensor.name.endswith("weight"):
                    value = {"float32": 0x3F800000, "bfloat16": 0x3F80, "float16": 0x3C00}[tensor.dtype]
                else:
                    phase = zlib.crc32(f"{index}:{tensor.name}".encode())
            for start in range(0, tensor.num_bytes, FILL_BYTES):
                shift = None if phase is None else (phase + start // ITEM_BYTES[tensor.dtype]) % PATTERN_ELEMENTS
                length = min(FILL_BYTES, tensor.num_bytes - start)
                yield Fill(tensor.dtype, tensor.offset + start, length, shift, value)

    def write(self, fill: Fill, arena: Memory, slot_offset: int) -> int:
        count = fill.num_bytes // ITEM_BYTES[fill.dtype]
        target = np.ndarray((count,), bits_type(fill.dtype), arena, slot_offset + fill.offset)
        if fill.phase is None:
            target[:] = fill.value
            return fill.num_bytes
        pattern = self._patterns[fill.dtype]
        start, phase = 0, fill.phase
        while start < count:
            length = min(count - start, PATTERN_ELEMENTS - phase)
            target[start : start + length] = pattern[phase : phase + length]
            start, phase = start + length, 0
        return fill.num_bytes


def _packed(index: int, tensor: TensorSpec, packing: Packing) -> Iterator[Fill]:
    """Any values, scales that give weights their size, zeros in the middle."""
    scales, zeros = packing.scales_at(tensor.shape), packing.zeros_at(tensor.shape)
    phase = zlib.crc32(f"{index}:{tensor.name}".encode())
    codes = "float8_e4m3fn" if packing.kind == "e4m3" else "uint8"
    for start in range(0, scales, FILL_BYTES):
        shift = (phase + start) % PATTERN_ELEMENTS
        yield Fill(codes, tensor.offset + start, min(FILL_BYTES, scales - start), shift, 0)
    factors = packing.factors_at(tensor.shape)
    size = _LIMIT / _LARGEST.get(packing.kind, 1 << (packing.bits - 1))
    scale, factor = (1.0, 1 / size if packing.divides else size) if packing.factors else (size, 0.0)
    yield Fill(packing.scale_dtype, tensor.offset + scales, zeros - scales, None, _bits(scale, packing.scale_dtype))
    middle = 0 if packing.zeros != "uint8" else 8 if packing.bits == 4 else 128
    yield Fill("uint8", tensor.offset + zeros, factors - zeros, None, middle)
    place = packing.order_at(tensor.shape)
    if packing.factors:
        yield Fill(packing.factors, tensor.offset + factors, place - factors, None, _bits(factor, packing.factors))
    yield Fill("uint8", tensor.offset + place, tensor.num_bytes - place, None, 0)


def _bits(value: float, dtype: str) -> int:
    """Of a scale or a factor; powers of two alone, where that is all there is."""
    if dtype in ("uint8", "int8"):
        return int(value)
    if dtype == "float8_e4m3fn":
        return {1.0: 0x38}[value]
    single = int(np.float32(value).view(np.uint32))
    if dtype == "float16":
        return int(np.float16(value).view(np.uint16))
    return {"float32": single, "bfloat16": single >> 16, "float8_e8m0fnu": single >> 23}[dtype]
