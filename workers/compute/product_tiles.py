"""Tiles of the product of few rows with a packed weight (see product_kernels.py).

A *step* is two neighbouring items of K, of which a *word* holds a row's or a column's. A block of weights is
`[step][COLUMNS]` words, rows are packed as `[step][rows]` words, and sums are `[row][COLUMNS]` of float32. Where the
processor's products of words do not pay (WIDENED), a row's word is two float32, and those of columns are widened in
registers.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from flexgen_lite.workers import simd
from flexgen_lite.workers.simd import I32, LANES, VECTOR, WORDS

ROW = 4 * LANES  # bytes of a vector
COLUMNS = 64  # of a block
STEP = 4 * COLUMNS  # bytes of a block's step
LINE = 64  # bytes of a cache line
_VECTORS = COLUMNS // LANES
WIDENED = simd.PAIRS and not simd.PAIRS_PAY
WORD_BYTES = 8 if WIDENED else 4  # of a row

_PAIRS = ir.VectorType(simd.BFloatType(), 2 * LANES)
_address = types.int64


def _forward(builder: Any, address: Any, offset: int) -> Any:
    return builder.add(address, address.type(offset)) if offset else address


def prefetch_line(builder: Any, address: Any) -> None:
    """Into the second-level cache: more of these can be under way than of those into the first."""
    pointer = builder.inttoptr(address, ir.IntType(8).as_pointer())
    simd.call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, I32(0), I32(2), I32(1)])


def product_tile(rows: int, lines: int) -> Any:
    """tile(words, weights, steps, sums, keep, ahead): sums[i, n] = keep * sums[i, n] + words[i] . weights[n].

    Of `rows` rows and a block of columns; `keep` is 0 or 1. Meanwhile `lines` cache lines per step are prefetched from
    `ahead` on.
    """

    def build(builder: Any, words: Any, weights: Any, steps: Any, sums: Any, keep: Any, ahead: Any) -> None:
        places = [cgutils.alloca_once_value(builder, simd.same(0.0)) for _ in range(rows * _VECTORS)]
        with builder.if_then(builder.icmp_unsigned("!=", keep, keep.type(0)), likely=True):
            for i, place in enumerate(places):
                builder.store(simd.load_from(builder, _forward(builder, sums, i * ROW), align=ROW), place)
        with cgutils.for_range(builder, steps) as loop:
            weights_at = builder.add(weights, builder.mul(loop.index, steps.type(_VECTORS * ROW)))
            words_at = builder.add(words, builder.mul(loop.index, steps.type(WORD_BYTES * rows)))
            if lines:
                ahead_at = builder.add(ahead, builder.mul(loop.index, steps.type(lines * LINE)))
                for line in range(lines):
                    prefetch_line(builder, _forward(builder, ahead_at, line * LINE))
            add_step = _add_floats if WIDENED else _add_pairs
            add_step(builder, rows, words_at, weights_at, places)
        for i, place in enumerate(places):
            simd.store_to(builder, builder.load(place), _forward(builder, sums, i * ROW), align=ROW)

    return simd.operation(build, types.void, *[types.int64] * 6)


def _add_pairs(builder: Any, rows: int, words: Any, weights: Any, places: list[Any]) -> None:
    """A step's products to the sums in `places`, `[row][vector]`."""
    columns = [
        builder.bitcast(simd.load_from(builder, _forward(builder, weights, v * ROW), align=4), _PAIRS)
        for v in range(_VECTORS)
    ]
    for i in range(rows):
        word = simd.load_from(builder, _forward(builder, words, 4 * i), I32)
        pairs = builder.bitcast(simd.spread(builder, word), _PAIRS)
        for v, column in enumerate(columns):
            place = places[i * _VECTORS + v]
            arguments = [builder.load(place), pairs, column]
            builder.store(simd.call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", VECTOR, arguments), place)


def _add_floats(builder: Any, rows: int, words: Any, weights: Any, places: list[Any]) -> None:
    """The same in float32, with two vectors of columns at a time: registers are left for no more. Where LLVM may load a
    row's items once for all four, it keeps sums in memory instead."""
    for first in range(0, _VECTORS, 2):
        # Nothing that was loaded before this is taken for what is loaded behind it.
        builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], side_effect=True)
        vectors = range(first, first + 2)
        columns = [simd.load_from(builder, _forward(builder, weights, v * ROW), WORDS, align=4) for v in vectors]
        parts = [_widened(builder, column) for column in columns]
        for i in range(rows):
            for half in range(2):
                item = simd.load_from(builder, _forward(builder, words, 8 * i + 4 * half), simd.FLOAT)
                x = simd.spread(builder, item)
                for v, part in zip(vectors, parts, strict=True):
                    place = places[i * _VECTORS + v]
                    builder.store(simd.fused(builder, part[half], x, builder.load(place)), place)


def _widened(builder: Any, words: Any) -> tuple[Any, Any]:
    """The even and the odd items of words in float32."""
    even = builder.shl(words, simd.same(16, WORDS))
    odd = builder.and_(words, simd.same(0xFFFF0000, WORDS))
    return builder.bitcast(even, VECTOR), builder.bitcast(odd, VECTOR)


def _widen(builder: Any, source: Any, target: Any, count: Any) -> None:
    """`count` words, a multiple of LANES, to two float32 each. They may lie in the second half of the target."""
    with cgutils.for_range(builder, builder.udiv(count, count.type(LANES))) as loop:
        words = simd.load_from(builder, builder.add(source, builder.mul(loop.index, count.type(ROW))), WORDS)
        even, odd = _widened(builder, words)
        to = builder.add(target, builder.mul(loop.index, count.type(2 * ROW)))
        for part in range(2):
            lanes = [place // 2 + LANES * (place % 2) for place in range(part * LANES, (part + 1) * LANES)]
            both = builder.shuffle_vector(even, odd, ir.Constant(WORDS, lanes))
            simd.store_to(builder, both, _forward(builder, to, part * ROW))


widen = simd.operation(_widen, types.void, *[types.int64] * 3)


def pack_tile(rows: int) -> Any:
    """tile(source, stride, target): LANES steps of `rows` rows, `stride` bytes apart, to `[step][rows]` words.

    Overwrites what lies in the half vector behind `target`'s last step.
    """
    half = LANES // 2
    assert rows <= half

    def build(builder: Any, source: Any, stride: Any, target: Any) -> None:
        turned: list[Any] = [ir.Constant(WORDS, ir.Undefined)] * LANES
        for i in range(rows):
            turned[i] = simd.load_from(builder, source, WORDS)
            source = builder.add(source, stride)
        turned = simd.turned(builder, turned)
        first = ir.Constant(ir.VectorType(I32, half), list(range(half)))
        for step, words in enumerate(turned):
            to = _forward(builder, target, step * 4 * rows)
            simd.store_to(builder, builder.shuffle_vector(words, words, first), to)

    return simd.operation(build, types.void, _address, types.int64, _address)


prefetch = simd.operation(prefetch_line, types.void, _address)  # starts to fetch a cache line
