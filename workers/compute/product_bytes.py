"""Products in whole numbers: rows are rounded to 8 bits, group by group of K, and multiplied with weights of 8 and 4
bits in int32; scales make the sums of a group float32.

    y[i, n] = sum over groups g of  x_scale[i, g] * scale[n, g] * sum over k of x[i, k] * (q[n, k] - zero[n, g])

Weights are without a sign (packing.py's order for int8), rows have one: what the bias of the weights adds is taken off
where a group's sum begins. A *step* is four items of K, of which a word holds a row's or a column's.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from flexgen_lite.workers import simd
from flexgen_lite.workers.compute.product_tiles import COLUMNS, LINE, ROW, STEP
from flexgen_lite.workers.compute.scale_loads import Scales, load_scales, load_zeros
from flexgen_lite.workers.simd import FLOAT, I32, LANES, VECTOR, WORDS

_VECTORS = COLUMNS // LANES
_BYTES = ir.VectorType(ir.IntType(8), LANES)
SCALES_BYTES = 2 * COLUMNS * 4  # of a group: scales, and -zero * scale
GROUP_FIELDS = 3  # of a row's group: scale, what its int32 sum begins with, scale * sum of the row's items


def _forward(builder: Any, address: Any, offset: int) -> Any:
    return builder.add(address, address.type(offset)) if offset else address


def _larger_bits(builder: Any, x: Any, y: Any) -> Any:
    return builder.select(builder.icmp_signed(">", x, y), x, y)


def _round_group(builder: Any, source: Any, count: Any, middle: Any, target: Any, numbers: Any, stride: Any) -> None:
    """`count` bfloat16 of a row, a multiple of LANES, to as many bytes; GROUP_FIELDS numbers, `stride` bytes apart. The
    scale is no number where an item is none, or infinite.

    Args:
        middle: what is added to the weights' numbers.
    """
    size = builder.udiv(count, count.type(LANES))
    most = cgutils.alloca_once_value(builder, simd.same(0, WORDS))  # bits: what is no number is larger than any
    with cgutils.for_range(builder, size) as loop:
        x = simd.load_widened(builder, True, builder.add(source, builder.mul(loop.index, size.type(2 * LANES))))
        bits = builder.and_(builder.bitcast(x, WORDS), simd.same(0x7FFFFFFF, WORDS))
        builder.store(_larger_bits(builder, bits, builder.load(most)), most)
    largest = builder.bitcast(simd.reduced(builder, builder.load(most), _larger_bits), FLOAT)
    scale = builder.fdiv(largest, ir.Constant(FLOAT, 127.0))
    is_positive = builder.fcmp_ordered(">", largest, ir.Constant(FLOAT, 0.0))
    inverse = builder.select(is_positive, builder.fdiv(ir.Constant(FLOAT, 127.0), largest), ir.Constant(FLOAT, 0.0))
    factor = simd.spread(builder, inverse)
    sums = cgutils.alloca_once_value(builder, simd.same(0, WORDS))
    with cgutils.for_range(builder, size) as loop:
        x = simd.load_widened(builder, True, builder.add(source, builder.mul(loop.index, size.type(2 * LANES))))
        whole = simd.whole(builder, builder.fmul(x, factor), 127)
        builder.store(builder.add(builder.load(sums), whole), sums)
        to = builder.add(target, builder.mul(loop.index, size.type(LANES)))
        simd.store_to(builder, builder.trunc(whole, _BYTES), to, align=1)
    total = simd.reduced(builder, builder.load(sums), lambda b, x, y: b.add(x, y))
    begin = builder.mul(total, builder.neg(builder.trunc(middle, I32)))
    simd.store_to(builder, scale, numbers)
    numbers = builder.add(numbers, stride)
    simd.store_to(builder, begin, numbers)
    simd.store_to(builder, builder.fmul(scale, builder.sitofp(total, FLOAT)), builder.add(numbers, stride))


def _load_scales(
    builder: Any, scales: Any, kind: Any, zeros: Any, zero_bytes: Any, factors: Any, factor_bytes: Any, divides: Any,
    middle: Any, target: Any,
) -> None:  # fmt: skip
    """A group's scales and -zero * scale of COLUMNS columns."""
    at = Scales(scales, kind, zeros, zero_bytes, factors, middle.type(0), factor_bytes, divides)
    bias = simd.spread(builder, builder.sitofp(builder.trunc(middle, I32), FLOAT))
    vectors = zip(load_scales(builder, at), load_zeros(builder, at, bias), strict=True)
    for group, (scale, zero) in enumerate(vectors):
        simd.store_to(builder, scale, _forward(builder, target, group * ROW))
        offset = builder.fmul(builder.fsub(bias, zero), scale)
        simd.store_to(builder, offset, _forward(builder, target, (_VECTORS + group) * ROW))


def _unpack_halves(builder: Any, values: Any, runs: Any, panel: Any, ahead: Any) -> None:
    """`runs` runs of 8 items of K of a block with 4 bits, to two steps of bytes each; fetches as much from `ahead`
    on."""
    low = simd.same(0x0F0F0F0F, WORDS)
    with cgutils.for_range(builder, runs) as loop:
        offset = builder.mul(loop.index, runs.type(STEP))
        to = builder.add(panel, builder.mul(loop.index, runs.type(2 * STEP)))
        for group in range(_VECTORS):
            words = simd.load_from(builder, _forward(builder, builder.add(values, offset), group * ROW), WORDS)
            simd.prefetch(builder, _forward(builder, builder.add(ahead, offset), group * ROW))
            simd.store_to(builder, builder.and_(words, low), _forward(builder, to, group * ROW))
            high = builder.and_(builder.lshr(words, simd.same(4, WORDS)), low)
            simd.store_to(builder, high, _forward(builder, to, STEP + group * ROW))


def byte_tile(rows: int) -> Any:
    """tile(words, weights, scales, zeros, numbers, groups, steps, sums, keep, ahead, lines): sums = keep * sums +
    rows . weights.

    Of `rows` rows, packed as `[step][rows]` words, a block of columns `[step][COLUMNS]`, and `groups` groups of `steps`
    steps. `numbers` are `[group][field][rows]`, scales `[group][scale or offset][COLUMNS]`, offsets only where `zeros`
    is not 0. `lines` cache lines are fetched from `ahead` on for each group.
    """

    def build(b: Any, words: Any, weights: Any, scales: Any, zeros: Any, numbers: Any, groups: Any, steps: Any, sums: Any, keep: Any, ahead: Any, lines: Any) -> None:  # fmt: skip # noqa: E501
        totals = [cgutils.alloca_once_value(b, simd.same(0.0)) for _ in range(rows * _VECTORS)]
        with b.if_then(b.icmp_unsigned("!=", keep, keep.type(0)), likely=True):
            for i, total in enumerate(totals):
                b.store(simd.load_from(b, _forward(b, sums, i * ROW)), total)
        with cgutils.for_range(b, groups) as group:
            numbers_at = b.add(numbers, b.mul(group.index, groups.type(4 * GROUP_FIELDS * rows)))
            scales_at = b.add(scales, b.mul(group.index, groups.type(SCALES_BYTES)))
            begins = [simd.spread(b, simd.load_from(b, _forward(b, numbers_at, 4 * (rows + i)), I32)) for i in range(rows)]  # fmt: skip # noqa: E501
            places = [cgutils.alloca_once_value(b, simd.same(0, WORDS)) for _ in range(rows * _VECTORS)]
            for i, place in enumerate(places):
                b.store(begins[i // _VECTORS], place)
            first = b.mul(group.index, steps)
            with cgutils.for_range(b, steps) as loop:
                at = b.add(first, loop.index)
                weights_at = b.add(weights, b.mul(at, at.type(STEP)))
                words_at = b.add(words, b.mul(at, at.type(4 * rows)))
                columns = [simd.load_from(b, _forward(b, weights_at, v * ROW), WORDS) for v in range(_VECTORS)]
                for i in range(rows):
                    word = simd.spread(b, simd.load_from(b, _forward(b, words_at, 4 * i), I32))
                    for v, column in enumerate(columns):
                        place = places[i * _VECTORS + v]
                        b.store(simd.add_products_of_bytes(b, b.load(place), column, word), place)
            ahead_at = b.add(ahead, b.mul(group.index, b.mul(lines, lines.type(LINE))))
            with cgutils.for_range(b, lines) as line:
                simd.prefetch(b, b.add(ahead_at, b.mul(line.index, lines.type(LINE))))
            for v in range(_VECTORS):
                scale = simd.load_from(b, _forward(b, scales_at, v * ROW))
                for i in range(rows):
                    row_scale = simd.spread(b, simd.load_from(b, _forward(b, numbers_at, 4 * i), FLOAT))
                    total, place = totals[i * _VECTORS + v], places[i * _VECTORS + v]
                    product = b.fmul(scale, row_scale)
                    b.store(simd.fused(b, b.sitofp(b.load(place), VECTOR), product, b.load(total)), total)
            with b.if_then(b.icmp_unsigned("!=", zeros, zeros.type(0))):
                for v in range(_VECTORS):
                    offset = simd.load_from(b, _forward(b, scales_at, (_VECTORS + v) * ROW))
                    for i in range(rows):
                        shift = simd.load_from(b, _forward(b, numbers_at, 4 * (2 * rows + i)), FLOAT)
                        total = totals[i * _VECTORS + v]
                        b.store(simd.fused(b, offset, simd.spread(b, shift), b.load(total)), total)
        for i, total in enumerate(totals):
            simd.store_to(b, b.load(total), _forward(b, sums, i * ROW))

    return simd.operation(build, types.void, *[types.int64] * 11)


round_group = simd.operation(_round_group, types.void, *[types.int64] * 6)
load_line = simd.operation(_load_scales, types.void, *[types.int64] * 9)
unpack_halves = simd.operation(_unpack_halves, types.void, *[types.int64] * 4)
