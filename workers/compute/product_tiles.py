"""Tiles of the product of few rows with a packed weight (see product_kernels.py).

A *step* is two neighbouring items of K, of which a *word* holds a row's or a column's. A block of weights is
`[step][COLUMNS]` words, rows are packed as `[step][rows]` words, and sums are `[row][COLUMNS]` of float32.
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
            words_at = builder.add(words, builder.mul(loop.index, steps.type(4 * rows)))
            columns = [
                builder.bitcast(simd.load_from(builder, _forward(builder, weights_at, v * ROW), align=4), _PAIRS)
                for v in range(_VECTORS)
            ]
            if lines:
                ahead_at = builder.add(ahead, builder.mul(loop.index, steps.type(lines * LINE)))
                for line in range(lines):
                    prefetch_line(builder, _forward(builder, ahead_at, line * LINE))
            for i in range(rows):
                word = simd.load_from(builder, _forward(builder, words_at, 4 * i), I32)
                pairs = builder.bitcast(simd.spread(builder, word), _PAIRS)
                for v, column in enumerate(columns):
                    place = places[i * _VECTORS + v]
                    arguments = [builder.load(place), pairs, column]
                    builder.store(simd.call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", VECTOR, arguments), place)
        for i, place in enumerate(places):
            simd.store_to(builder, builder.load(place), _forward(builder, sums, i * ROW), align=ROW)

    return simd.operation(build, types.void, *[types.int64] * 6)


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
