"""Weights of 8 and 4 bits into panels of bfloat16: value * scale + offset is rounded once, as it would be if the weight
had been made bfloat16 before. What is finished in another way (Packing.finish), and zeros whose product with a scale is
not exact, have variants of their own, which take longer: the zero is subtracted first, the product multiplied with a
factor and perhaps rounded to float16.

The order of the values is that of packing.py for bfloat16: a vector of words has eight columns, each with the even and
the odd items of K, so that two vectors of float32, narrowed together, are the words of sixteen columns in a panel.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from flexgen_lite.model.packing import TABLES
from flexgen_lite.workers import simd
from flexgen_lite.workers.compute.product_tiles import COLUMNS, LINE, ROW, STEP, prefetch_line
from flexgen_lite.workers.compute.scale_loads import Scales, load_offsets, load_scales, load_zeros, of_e4m3
from flexgen_lite.workers.simd import LANES, VECTOR, WORDS

_PAIRS = ir.VectorType(simd.BFloatType(), 2 * LANES)
_LINE_OF_BYTES = ir.VectorType(ir.IntType(8), LINE)
_VECTORS = 2 * COLUMNS // LANES  # of words
_LOW = ir.Constant(WORDS, [lane // 2 for lane in range(LANES)])
_HIGH = ir.Constant(WORDS, [LANES // 2 + lane // 2 for lane in range(LANES)])

_tables = {kind: np.array(values, np.float32) for kind, values in TABLES.items()}

Decode = Callable[[Any, Any, int, Any], Any]


def table_address(kind: str) -> int:
    """Of what codes of 4 bits stand for, float32."""
    return int(_tables[kind].ctypes.data)


def _four_bits(builder: Any, words: Any, item: int, table: Any) -> Any:
    """The float32 of half byte `item` of each word: a permutation looks at the lowest four bits alone."""
    shifted = builder.lshr(words, simd.same(4 * item, WORDS)) if item else words
    return simd.call(builder, "llvm.x86.avx512.permvar.sf.512", VECTOR, [table, shifted])


def _eight_bits(builder: Any, words: Any, item: int, table: Any) -> Any:
    left = builder.shl(words, simd.same(24 - 8 * item, WORDS)) if item < 3 else words
    return builder.sitofp(builder.ashr(left, simd.same(24, WORDS)), VECTOR)


def _load_scales(
    builder: Any, scales: Any, kind: Any, zeros: Any, zero_bytes: Any, factors: Any, lows: Any, factor_bytes: Any,
    divides: Any, bias: Any, finish: Any, target: Any,
) -> None:  # fmt: skip
    """A group's scales, and offsets or -zero * scale, of COLUMNS columns, each twice: `[scale or offset][column][2]`.

    Args:
        bias: zeros have it added to them.
        finish: but for 0, -zero as it is.
    """
    at = Scales(scales, kind, zeros, zero_bytes, factors, lows, factor_bytes, divides)
    middle = simd.spread(builder, builder.sitofp(builder.trunc(bias, simd.I32), simd.FLOAT))
    is_plain = builder.icmp_unsigned("==", finish, finish.type(0))
    vectors = zip(load_scales(builder, at), load_zeros(builder, at, middle), load_offsets(builder, at), strict=True)
    for group, (scale, zero, offset) in enumerate(vectors):
        less = builder.fsub(middle, zero)
        shift = builder.fadd(builder.select(is_plain, builder.fmul(less, scale), less), offset)
        for part, vector in enumerate((scale, shift)):
            for half_index, lanes in enumerate((_LOW, _HIGH)):
                place = target.type((part * _VECTORS + 2 * group + half_index) * ROW)
                simd.store_to(builder, builder.shuffle_vector(vector, vector, lanes), builder.add(target, place))


def _fused(builder: Any, value: Any, scale: Any, offset: Any) -> Any:
    return simd.fused(builder, value, scale, offset)


def _finished(builder: Any, value: Any, scale: Any, less: Any, factor: Any, halves: Any, adds: Any) -> Any:
    nothing = simd.same(-0.0)
    first, last = builder.select(adds, nothing, less), builder.select(adds, less, nothing)
    product = builder.fmul(builder.fmul(builder.fadd(value, first), scale), factor)
    half = builder.fpext(builder.fptrunc(product, ir.VectorType(ir.HalfType(), LANES)), VECTOR)
    return builder.fadd(builder.select(halves, half, product), last)


def _unpack(decode: Decode, items: int, is_finished: bool = False) -> Any:
    """unpack(values, scales, table, runs, panel, ahead): `runs` runs of 2 * `items` items of K of a block, all of one
    group, whose scales `load_line` has left. Meanwhile as much memory from `ahead` on is fetched.

    Where it `is_finished`, three more arguments are the factor of the products, whether they are rounded to float16,
    and whether what the line has beside scales is added to them, not to values.
    """

    def build(
        builder: Any, values: Any, scales: Any, table: Any, runs: Any, panel: Any, ahead: Any, *more: Any
    ) -> None:
        combine: Any = _fused
        if is_finished:
            halves, adds = (builder.icmp_unsigned("!=", flag, flag.type(0)) for flag in more[1:])
            combine = partial(_finished, factor=simd.spread(builder, more[0]), halves=halves, adds=adds)
        values_of_codes = simd.load_from(builder, table) if decode is _four_bits else None
        doubled = [
            simd.load_from(builder, builder.add(scales, scales.type(i * ROW)), align=ROW) for i in range(2 * _VECTORS)
        ]
        with cgutils.for_range(builder, runs) as loop:
            offset = builder.mul(loop.index, runs.type(_VECTORS * ROW))
            values_at, ahead_at = builder.add(values, offset), builder.add(ahead, offset)
            panel_at = builder.add(panel, builder.mul(loop.index, runs.type(items * STEP)))
            for pair in range(_VECTORS // 2):
                words = []
                for vector in (2 * pair, 2 * pair + 1):
                    place = values.type(vector * ROW)
                    words.append(simd.load_from(builder, builder.add(values_at, place), WORDS))
                    prefetch_line(builder, builder.add(ahead_at, place))
                for item in range(items):
                    low, high = (
                        combine(
                            builder,
                            decode(builder, word, item, values_of_codes),
                            doubled[vector],
                            doubled[_VECTORS + vector],
                        )
                        for vector, word in enumerate(words, start=2 * pair)
                    )
                    both = simd.call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", _PAIRS, [high, low])
                    place = panel.type(item * STEP + pair * LINE)
                    simd.store_to(builder, builder.bitcast(both, WORDS), builder.add(panel_at, place))

    more = [types.float32, types.int64, types.int64] if is_finished else []
    return simd.operation(build, types.void, *[types.int64] * 6, *more)


def _bits_of_e4m3() -> list[int]:
    """bfloat16 of all codes without their sign."""
    sizes = [m * 2.0**-9 if code < 8 else (8 + m) * 2.0 ** (code // 8 - 10) for code in range(127) for m in (code % 8,)]
    return [struct.unpack("<I", struct.pack("<f", size))[0] >> 16 for size in sizes] + [0x7FC0]


def _bytes_from(values: list[int]) -> Any:
    return ir.Constant(_LINE_OF_BYTES, values)


def _looked_up(builder: Any, codes: Any, table: list[int]) -> Any:
    """Bytes of `table` at the lower seven bits of each code."""
    name = "llvm.x86.avx512.vpermi2var.qi.512"
    return simd.call(builder, name, _LINE_OF_BYTES, [_bytes_from(table[:64]), codes, _bytes_from(table[64:])])


def _pairs_of_columns(first: int) -> Any:
    """Of two vectors of eight columns' bytes, `[column][2][4]`: by four columns, steps `first` and `first` + 1."""
    order = [
        (column // 8) * LINE + column % 8 * 8 + item * 4 + step
        for group in range(4)
        for step in (first, first + 1)
        for column in range(4 * group, 4 * group + 4)
        for item in range(2)
    ]
    return ir.Constant(ir.VectorType(simd.I32, LINE), order)


def _side_by_side(builder: Any, low: Any, high: Any, upper: bool) -> Any:
    """Words of low and high bytes, of the lower or the upper half of each 16."""
    begin = 8 if upper else 0
    order = [16 * lane + begin + i + part for lane in range(4) for i in range(8) for part in (0, LINE)]
    return builder.bitcast(builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(simd.I32, LINE), order)), WORDS)


def _unpack_by_table() -> Any:
    """unpack_e4m3 with a table of both bytes of a code's bfloat16; there are no offsets."""
    bits = _bits_of_e4m3()
    low_bytes, high_bytes = [x & 255 for x in bits], [x >> 8 for x in bits]
    even = ir.Constant(WORDS, list(range(0, 2 * LANES, 2)))
    mixed = ir.Constant(ir.VectorType(simd.I32, 2 * LANES), [i // 2 + LANES * (i % 2) for i in range(2 * LANES)])

    def scaled(b: Any, words: Any, scale: Any) -> Any:
        low = b.bitcast(b.shl(words, simd.same(16, WORDS)), VECTOR)
        high = b.bitcast(b.and_(words, simd.same(0xFFFF0000, WORDS)), VECTOR)
        arguments = [b.fmul(high, scale), b.fmul(low, scale)]
        both = simd.call(b, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", _PAIRS, arguments)
        halves = b.bitcast(both, ir.VectorType(simd.I16, 2 * LANES))
        return b.bitcast(b.shuffle_vector(halves, halves, mixed), WORDS)

    def build(b: Any, values: Any, scales: Any, table: Any, runs: Any, panel: Any, ahead: Any) -> None:
        columns = []
        for group in range(COLUMNS // LANES):
            first, second = (
                simd.load_from(b, b.add(scales, scales.type((2 * group + i) * ROW)), align=ROW) for i in range(2)
            )
            columns.append(b.shuffle_vector(first, second, even))
        with cgutils.for_range(b, runs) as loop:
            offset = b.mul(loop.index, runs.type(_VECTORS * ROW))
            values_at, ahead_at = b.add(values, offset), b.add(ahead, offset)
            panel_at = b.add(panel, b.mul(loop.index, runs.type(4 * STEP)))
            for group, scale in enumerate(columns):
                lines = []
                for vector in (2 * group, 2 * group + 1):
                    place = values.type(vector * ROW)
                    lines.append(simd.load_from(b, b.add(values_at, place), _LINE_OF_BYTES, align=1))
                    prefetch_line(b, b.add(ahead_at, place))
                for first_step in (0, 2):
                    codes = b.shuffle_vector(*lines, _pairs_of_columns(first_step))
                    low, high = (_looked_up(b, codes, part) for part in (low_bytes, high_bytes))
                    high = b.or_(high, b.and_(codes, _bytes_from([128] * LINE)))
                    for step in (0, 1):
                        words = scaled(b, _side_by_side(b, low, high, step == 1), scale)
                        place = panel.type((first_step + step) * STEP + group * LINE)
                        simd.store_to(b, words, b.add(panel_at, place))

    return simd.operation(build, types.void, *[types.int64] * 6)


SCALES_BYTES = 2 * _VECTORS * ROW  # of a group, as `load_line` leaves them
load_line = simd.operation(_load_scales, types.void, *[types.int64] * 11)
if simd.PAIRS:
    unpack_4, unpack_8 = _unpack(_four_bits, 8), _unpack(_eight_bits, 4)
    unpack_e4m3 = _unpack_by_table() if simd.BYTE_TABLES else _unpack(of_e4m3, 4)
    finish_4, finish_8, finish_e4m3 = (
        _unpack(decode, items, True) for decode, items in ((_four_bits, 8), (_eight_bits, 4), (of_e4m3, 4))
    )
