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

from flexgen_lite.model.packing import COLUMNS, Packing, num_blocks
from flexgen_lite.workers import simd
from flexgen_lite.workers.compute import prefill_cpu, scale_loads
from flexgen_lite.workers.compute.prefill_packing import OPTIONS, kernel
from flexgen_lite.workers.compute.product_panels import E4M3
from flexgen_lite.workers.compute.product_unpack import table_address
from flexgen_lite.workers.compute.scale_loads import (
    Scales,
    at_place,
    factor_place,
    load_offsets,
    load_scales,
    load_zeros,
    of_e4m3,
    scale_bytes,
)
from flexgen_lite.workers.kernel_cache import from_cache
from flexgen_lite.workers.simd import LANES, VECTOR, WORDS

_ROW = 4 * LANES

CALL = np.dtype(
    [
        *((name, np.int64) for name in ("begun", "taken")),  # counters, 0 before a call
        *((name, np.int64) for name in ("values", "target")),  # addresses
        *((name, np.int64) for name in ("first", "blocks")),  # of the weight: which are wanted
        *((name, np.int64) for name in scale_loads.FIELDS),
        *((name, np.int64) for name in ("bits", "group", "width")),
        *((name, np.int64) for name in ("table", "halves", "storage")),  # address; 0: there is none
    ]
)
_call: Any = simd.record(CALL)
_SCALES = [types.int64] * 8


def _unpack(bits: int) -> Any:
    """unpack(*scales, values, count, target, stride): `count` words' steps of a group of a block, to rows of float32
    `stride` bytes apart. `scales` as scale_loads.Scales has them; there are no offsets."""
    middle = 8 if bits == 4 else 128
    items = 32 // bits  # of a word

    def build(b: Any, *arguments: Any) -> None:
        (values, count, target, stride), at = arguments[8:], Scales(*arguments[:8])
        vectors = zip(load_scales(b, at), load_zeros(b, at, simd.same(float(middle))), strict=True)
        for group, (scale, zero) in enumerate(vectors):
            with cgutils.for_range(b, count) as loop:
                begin = b.add(values, b.mul(loop.index, count.type(4 * COLUMNS)))
                words = simd.load_from(b, b.add(begin, begin.type(group * _ROW)), WORDS)
                to = b.add(target, b.mul(b.mul(loop.index, count.type(items)), stride))
                for item in range(items):
                    part = item if bits == 8 else 2 * (item % 4) + item // 4
                    shifted = b.lshr(words, simd.same(bits * part, WORDS)) if part else words
                    code = b.uitofp(b.and_(shifted, simd.same((1 << bits) - 1, WORDS)), VECTOR)
                    value = b.fmul(b.fsub(code, zero), scale)
                    simd.store_to(b, value, b.add(to, to.type(group * _ROW)))
                    to = b.add(to, stride)

    return simd.operation(build, types.void, *_SCALES, *[types.int64] * 4)


def _unpack_other(bits: int, decode: Callable[..., Any]) -> Any:
    """unpack(*scales, values, count, target, stride, table, halves): the same of codes of any kind, perhaps with
    offsets, perhaps with products that are rounded to float16.

    Args:
        decode: gives the values of an item of each word.
    """
    items, middle = 32 // bits, simd.same(8.0 if bits == 4 else 128.0)

    def build(b: Any, *arguments: Any) -> None:
        (values, count, target, stride, table, halves), at = arguments[8:], Scales(*arguments[:8])
        rounds = b.icmp_unsigned("!=", halves, halves.type(0))
        parts = [simd.load_from(b, b.add(table, table.type(4 * i))) for i in range(0, 16, LANES)] if bits == 4 else []
        vectors = zip(load_scales(b, at), load_zeros(b, at, middle), load_offsets(b, at), strict=True)
        for group, (scale, zero, offset) in enumerate(vectors):
            less = b.fsub(zero, middle)
            with cgutils.for_range(b, count) as loop:
                begin = b.add(values, b.mul(loop.index, count.type(4 * COLUMNS)))
                words = simd.load_from(b, b.add(begin, begin.type(group * _ROW)), WORDS)
                to = b.add(target, b.mul(b.mul(loop.index, count.type(items)), stride))
                for item in range(items):
                    product = b.fmul(b.fsub(decode(b, words, item, parts), less), scale)
                    half = b.fpext(b.fptrunc(product, ir.VectorType(ir.HalfType(), LANES)), VECTOR)
                    value = b.fadd(b.select(rounds, half, product), offset)
                    simd.store_to(b, value, b.add(to, to.type(group * _ROW)))
                    to = b.add(to, stride)

    return simd.operation(build, types.void, *_SCALES, *[types.int64] * 6)


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
def _unpack_group(call, scales, values, target, stride):  # type: ignore[no-untyped-def]
    count = call.group * call.bits // 32
    if call.table != 0:
        if call.storage == E4M3:
            _unpack_e4m3(*scales, values, count, target, stride, call.table, call.halves)
        elif call.bits == 8:
            _unpack_whole(*scales, values, count, target, stride, call.table, call.halves)
        else:
            _unpack_table(*scales, values, count, target, stride, call.table, call.halves)
    elif call.bits == 8:
        _unpack_8(*scales, values, count, target, stride)
    else:
        _unpack_4(*scales, values, count, target, stride)


def unpack(address: int) -> None:
    """One thread's part."""
    call = _call(address)
    groups, stride = call.width // call.group, 4 * COLUMNS * call.blocks
    block = simd.fetch_add(address + 8)
    while block < call.blocks:
        values = call.values + (call.first + block) * COLUMNS * call.width * call.bits // 8
        for group in range(groups):
            place = ((call.first + block) * groups + group) * COLUMNS
            factor = factor_place(call, call.first + block, group * call.group, call.width)
            scales = (
                call.scales + place * scale_bytes(call.scale_kind), call.scale_kind,
                at_place(call.zeros, place, call.zero_bytes), call.zero_bytes,
                at_place(call.factors, factor, call.factor_bytes), at_place(call.lows, factor, call.factor_bytes),
                call.factor_bytes, call.divides,
            )  # fmt: skip
            target = call.target + group * call.group * stride + block * COLUMNS * 4
            at = values + group * COLUMNS * call.group * call.bits // 8
            _unpack_group(call, scales, at, target, stride)
        block = simd.fetch_add(address + 8)


@cache
def compiled() -> Any:
    """`unpack` as a C function, `void f(CALL *)`, to be run by every thread."""
    return from_cache(lambda: cfunc(types.void(types.int64), cache=True, **OPTIONS)(unpack), unpack.__name__)


def _table_of(packing: Packing) -> int:
    """The address of what codes stand for; 0: whole numbers, which need none."""
    is_whole = packing.kind == "int" and packing.zeros in ("", "uint8") and not packing.finish
    return 0 if is_whole else table_address(packing.kind if packing.bits == 4 else "int")


_FIELDS = struct.Struct(f"{len(CALL.names or ())}q")


def unpack_blocks(
    memory: torch.Tensor, packing: Packing, shape: tuple[int, ...], index: int, first: int, target_KN: torch.Tensor
) -> None:
    """Blocks from `first` on of weight number `index` to `target_KN`, float32 and contiguous, as many as it has room
    for. Runs on PyTorch's threads."""
    blocks = num_blocks(packing.dimensions(shape)[1])
    assert packing.order == "int8" and first + target_KN.shape[1] // COLUMNS <= blocks
    start = memory.data_ptr()
    record = ctypes.create_string_buffer(
        _FIELDS.pack(
            0, 0, start + index * packing.value_bytes(shape), target_KN.data_ptr(),
            first, target_KN.shape[1] // COLUMNS,
            *scale_loads.fields_of(packing, shape, start, index),
            packing.bits, packing.group, target_KN.shape[0],
            _table_of(packing), packing.finish == "float16", E4M3 if packing.kind == "e4m3" else 0,
        )
    )  # fmt: skip
    prefill_cpu.parallel()(ctypes.c_void_p(compiled().address), record, torch.get_num_threads(), 0)
