"""Weights of 8 and 4 bits, in packing.py's order for int8, to float32: columns `[K, N]` of some blocks, for products
that others compute. Any vector unit will do.

Memory is named by address.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, types
from numba.core import cgutils

from flexgen_lite.model.packing import COLUMNS, SCALE_BYTES, ZERO_BYTES, Packing, num_blocks
from flexgen_lite.workers import simd
from flexgen_lite.workers.compute import prefill_cpu
from flexgen_lite.workers.compute.prefill_packing import OPTIONS, kernel
from flexgen_lite.workers.compute.product_panels import BFLOAT16, E4M3, FLOAT32, SCALE_KINDS, scale_bytes
from flexgen_lite.workers.compute.product_unpack import of_e4m3, table_address
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
        *((name, np.int64) for name in ("zero_bytes", "table", "halves", "storage")),  # 4 bytes: offsets; 0: no table
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


def _unpack_other(bits: int, decode: Callable[..., Any]) -> Any:
    """unpack(values, scales, zeros, count, target, stride, table, offsets, halves, kind): the same of codes of any
    kind, perhaps with offsets, perhaps with products that are rounded to float16.

    Args:
        decode: gives the values of an item of each word.
    """
    items, middle = 32 // bits, 8.0 if bits == 4 else 128.0

    def build(
        b: Any, kind: str, values: Any, scales: Any, zeros: Any, count: Any, target: Any, stride: Any, table: Any,
        offsets: Any, halves: Any,
    ) -> None:  # fmt: skip
        size = 4 if kind == "float32" else 2
        rounds = b.icmp_unsigned("!=", halves, halves.type(0))
        parts = [simd.load_from(b, b.add(table, table.type(4 * i))) for i in range(0, 16, LANES)] if bits == 4 else []
        for group in range(_VECTORS):
            scale = simd.load_stored(b, kind, b.add(scales, scales.type(group * LANES * size)))
            zero, offset = (cgutils.alloca_once_value(b, simd.same(0.0)) for _ in range(2))
            with b.if_then(b.icmp_unsigned("!=", zeros, zeros.type(0))):
                codes = simd.load_from(b, b.add(zeros, zeros.type(group * LANES)), _BYTES, align=1)
                b.store(b.fsub(b.uitofp(codes, VECTOR), simd.same(middle)), zero)
            with b.if_then(b.icmp_unsigned("!=", offsets, offsets.type(0))):
                b.store(simd.load_from(b, b.add(offsets, offsets.type(4 * group * LANES))), offset)
            less, more = b.load(zero), b.load(offset)
            with cgutils.for_range(b, count) as loop:
                at = b.add(values, b.mul(loop.index, count.type(4 * COLUMNS)))
                words = simd.load_from(b, b.add(at, at.type(group * _ROW)), WORDS)
                to = b.add(target, b.mul(b.mul(loop.index, count.type(items)), stride))
                for item in range(items):
                    product = b.fmul(b.fsub(decode(b, words, item, parts), less), scale)
                    half = b.fpext(b.fptrunc(product, ir.VectorType(ir.HalfType(), LANES)), VECTOR)
                    value = b.fadd(b.select(rounds, half, product), more)
                    simd.store_to(b, value, b.add(to, to.type(group * _ROW)))
                    to = b.add(to, stride)

    return simd.operation_of_kind(build, types.void, *[types.int64] * 9)


def _whole(b: Any, words: Any, item: int, parts: list[Any]) -> Any:
    shifted = b.lshr(words, simd.same(8 * item, WORDS)) if item else words
    code = b.uitofp(b.and_(shifted, simd.same(255, WORDS)), VECTOR)
    return b.fsub(code, simd.same(128.0))


def _looked_up(b: Any, words: Any, item: int, parts: list[Any]) -> Any:
    """In a table of 16 float32, in one vector or two: a permutation looks at the lowest bits alone."""
    part = 2 * (item % 4) + item // 4
    codes = b.lshr(words, simd.same(4 * part, WORDS)) if part else words
    if len(parts) == 1:
        return simd.call(b, "llvm.x86.avx512.permvar.sf.512", VECTOR, [parts[0], codes])
    low, high = (simd.call(b, "llvm.x86.avx2.permps", VECTOR, [part, codes]) for part in parts)
    is_high = b.icmp_unsigned("!=", b.and_(codes, simd.same(8, WORDS)), simd.same(0, WORDS))
    return b.select(is_high, high, low)


_unpack_8, _unpack_4 = _unpack(8), _unpack(4)
_unpack_e4m3, _unpack_whole, _unpack_table = (
    _unpack_other(8, of_e4m3),
    _unpack_other(8, _whole),
    _unpack_other(4, _looked_up),
)


@kernel
def _unpack_group(call, values, scales, zeros, target, stride, kind):  # type: ignore[no-untyped-def]
    count = call.group * call.bits // 32
    if call.table != 0:
        codes, offsets = (zeros, 0) if call.zero_bytes == 1 else (0, zeros)
        if call.storage == E4M3:
            _unpack_e4m3(values, scales, codes, count, target, stride, call.table, offsets, call.halves, kind)
        elif call.bits == 8:
            _unpack_whole(values, scales, codes, count, target, stride, call.table, offsets, call.halves, kind)
        else:
            _unpack_table(values, scales, codes, count, target, stride, call.table, offsets, call.halves, kind)
    elif call.bits == 8:
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
            zeros = 0 if call.zeros == 0 else call.zeros + place * call.zero_bytes
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


def _table_of(packing: Packing) -> int:
    """The address of what codes stand for; 0: whole numbers, which need none."""
    is_whole = packing.kind == "int" and packing.zeros != "float32" and not packing.finish
    return 0 if is_whole else table_address(packing.kind if packing.bits == 4 else "int")


_FIELDS = struct.Struct(f"{len(CALL.names or ())}q")


def unpack_blocks(
    memory: torch.Tensor, packing: Packing, shape: tuple[int, ...], index: int, first: int, target_KN: torch.Tensor
) -> None:
    """Blocks from `first` on of weight number `index` to `target_KN`, float32 and contiguous, as many as it has room
    for. Runs on PyTorch's threads."""
    blocks, num_scales = num_blocks(packing.dimensions(shape)[1]), packing.num_scales(shape)
    assert packing.order == "int8" and first + target_KN.shape[1] // COLUMNS <= blocks
    size, zero_bytes = SCALE_BYTES[packing.scale_dtype], ZERO_BYTES[packing.zeros]
    start = memory.data_ptr()
    record = ctypes.create_string_buffer(
        _FIELDS.pack(
            0, 0,
            start + index * packing.value_bytes(shape),
            start + packing.scales_at(shape) + index * num_scales * size,
            start + packing.zeros_at(shape) + index * num_scales * zero_bytes if packing.zeros else 0,
            target_KN.data_ptr(), first, target_KN.shape[1] // COLUMNS,
            packing.bits, packing.group, target_KN.shape[0], SCALE_KINDS[packing.scale_dtype],
            zero_bytes, _table_of(packing), packing.finish == "float16", E4M3 if packing.kind == "e4m3" else 0,
        )
    )  # fmt: skip
    prefill_cpu.parallel()(ctypes.c_void_p(compiled().address), record, torch.get_num_threads(), 0)
