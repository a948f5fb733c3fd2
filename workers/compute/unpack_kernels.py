"""Weights of 8 and 4 bits, in packing.py's order for int8, to float32: columns `[K, N]` of some blocks, for products
that others compute. Any vector unit will do.

Memory is named by address.
"""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, types
from numba.core import cgutils

from flexgen_lite.model.packing import COLUMNS, SCALE_BYTES, Packing, num_blocks
from flexgen_lite.workers import simd
from flexgen_lite.workers.compute import prefill_cpu
from flexgen_lite.workers.compute.prefill_packing import OPTIONS, kernel
from flexgen_lite.workers.compute.product_panels import BFLOAT16, FLOAT32, SCALE_KINDS, scale_bytes
from flexgen_lite.workers.kernel_cache import from_cache
from flexgen_lite.workers.simd import LANES, VECTOR, WORDS

_ROW = 4 * LANES
_VECTORS = COLUMNS // LANES
_BYTES = ir.VectorType(ir.IntType(8), LANES)

CALL = np.dtype(
    [
        *((name, np.int64) for name in ("begun", "taken")),  # counters, 0 before a call
        *((name, np.int64) for name in ("values", "scales", "zeros", "target")),  # addresses
        *((name, np.int64) for name in ("first", "blocks")),  # of the weight: which are wanted
        *((name, np.int64) for name in ("bits", "group", "width", "scale_kind")),
    ]
)
_call: Any = simd.record(CALL)


def _unpack(bits: int) -> Any:
    """unpack(values, scales, zeros, count, target, stride, kind): `count` words' steps of a group of a block, to rows
    of float32 `stride` bytes apart."""
    middle = 8 if bits == 4 else 128
    items = 32 // bits  # of a word

    def build(b: Any, kind: str, values: Any, scales: Any, zeros: Any, count: Any, target: Any, stride: Any) -> None:
        size = 4 if kind == "float32" else 2
        for group in range(_VECTORS):
            scale = simd.load_stored(b, kind, b.add(scales, scales.type(group * LANES * size)))
            place = cgutils.alloca_once_value(b, simd.same(float(middle)))
            with b.if_then(b.icmp_unsigned("!=", zeros, zeros.type(0))):
                codes = simd.load_from(b, b.add(zeros, zeros.type(group * LANES)), _BYTES, align=1)
                b.store(b.uitofp(codes, VECTOR), place)
            zero = b.load(place)
            with cgutils.for_range(b, count) as loop:
                at = b.add(values, b.mul(loop.index, count.type(4 * COLUMNS)))
                words = simd.load_from(b, b.add(at, at.type(group * _ROW)), WORDS)
                to = b.add(target, b.mul(b.mul(loop.index, count.type(items)), stride))
                for item in range(items):
                    part = item if bits == 8 else 2 * (item % 4) + item // 4
                    shifted = b.lshr(words, simd.same(bits * part, WORDS)) if part else words
                    code = b.uitofp(b.and_(shifted, simd.same((1 << bits) - 1, WORDS)), VECTOR)
                    value = b.fmul(b.fsub(code, zero), scale)
                    simd.store_to(b, value, b.add(to, to.type(group * _ROW)))
                    to = b.add(to, stride)

    return simd.operation_of_kind(build, types.void, *[types.int64] * 6)


_unpack_8, _unpack_4 = _unpack(8), _unpack(4)


@kernel
def _unpack_group(call, values, scales, zeros, target, stride, kind):  # type: ignore[no-untyped-def]
    count = call.group * call.bits // 32
    if call.bits == 8:
        _unpack_8(values, scales, zeros, count, target, stride, kind)
    else:
        _unpack_4(values, scales, zeros, count, target, stride, kind)


def unpack(address: int) -> None:
    """One thread's part."""
    call = _call(address)
    groups, stride = call.width // call.group, 4 * COLUMNS * call.blocks
    block = simd.fetch_add(address + 8)
    while block < call.blocks:
        values = call.values + (call.first + block) * COLUMNS * call.width * call.bits // 8
        for group in range(groups):
            place = ((call.first + block) * groups + group) * COLUMNS
            zeros = 0 if call.zeros == 0 else call.zeros + place
            target = call.target + group * call.group * stride + block * COLUMNS * 4
            at = values + group * COLUMNS * call.group * call.bits // 8
            scales = call.scales + place * scale_bytes(call.scale_kind)
            if call.scale_kind == BFLOAT16:
                _unpack_group(call, at, scales, zeros, target, stride, np.uint16(0))
            elif call.scale_kind == FLOAT32:
                _unpack_group(call, at, scales, zeros, target, stride, np.float32(0))
            else:
                _unpack_group(call, at, scales, zeros, target, stride, np.int16(0))
        block = simd.fetch_add(address + 8)


@cache
def compiled() -> Any:
    """`unpack` as a C function, `void f(CALL *)`, to be run by every thread."""
    return from_cache(lambda: cfunc(types.void(types.int64), cache=True, **OPTIONS)(unpack), unpack.__name__)


_FIELDS = struct.Struct(f"{len(CALL.names or ())}q")


def unpack_blocks(
    memory: torch.Tensor, packing: Packing, shape: tuple[int, ...], index: int, first: int, target_KN: torch.Tensor
) -> None:
    """Blocks from `first` on of weight number `index` to `target_KN`, float32 and contiguous, as many as it has room
    for. Runs on PyTorch's threads."""
    blocks, num_scales = num_blocks(packing.dimensions(shape)[1]), packing.num_scales(shape)
    assert packing.order == "int8" and first + target_KN.shape[1] // COLUMNS <= blocks
    size = SCALE_BYTES[packing.scale_dtype]
    start = memory.data_ptr()
    record = ctypes.create_string_buffer(
        _FIELDS.pack(
            0, 0,
            start + index * packing.value_bytes(shape),
            start + packing.scales_at(shape) + index * num_scales * size,
            start + packing.zeros_at(shape) + index * num_scales if packing.has_zeros else 0,
            target_KN.data_ptr(), first, target_KN.shape[1] // COLUMNS,
            packing.bits, packing.group, target_KN.shape[0], SCALE_KINDS[packing.scale_dtype],
        )
    )  # fmt: skip
    prefill_cpu.parallel()(ctypes.c_void_p(compiled().address), record, torch.get_num_threads(), 0)
