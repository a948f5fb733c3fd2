"""Products on tiles of registers, and turning rows into columns, for the prefill attention kernel.

A *word* is the 32 bits that one step of a product takes per lane: a float32, or a pair of bfloat16 of neighbouring
steps. LLVM's loop vectoriser does not keep a tile of sums in registers by itself, so the products are spelled out.
Strides are in bytes; vectors, addresses and kinds are those of simd.py.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from flexgen_lite.workers import simd
from flexgen_lite.workers.simd import LANES, VECTOR

ROW = 4 * LANES  # bytes of a vector
ROWS = 8 if simd.WIDE else 4  # with three vectors each: the sums that fit into the registers

_PAIRS = ir.VectorType(simd.BFloatType(), 2 * LANES)
_address = types.int64


def _forward(builder: Any, address: Any, offset: int) -> Any:
    return builder.add(address, address.type(offset)) if offset else address


def _product_step(builder: Any, half: bool, word: Any, words: Any, total: Any) -> Any:
    if not half:
        return simd.fused(builder, simd.spread(builder, builder.bitcast(word, simd.FLOAT)), words, total)
    pairs = [builder.bitcast(value, _PAIRS) for value in (simd.spread(builder, word), words)]
    return simd.call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", VECTOR, [total, *pairs])


def _products(builder: Any, half: bool, a_rows: list[Any], a_step: Any, b: Any, steps: Any, sums: list[Any]) -> None:
    """Adds a[i, s] * b[s, v] for all steps s to sums[i * vectors + v], which are places of vectors."""
    vectors = len(sums) // len(a_rows)
    with cgutils.for_range(builder, steps) as loop:
        a_at = builder.mul(loop.index, a_step)
        b_at = builder.add(b, builder.mul(loop.index, b.type(vectors * ROW)))
        columns = [simd.load_from(builder, _forward(builder, b_at, v * ROW), align=ROW) for v in range(vectors)]
        for i, a_row in enumerate(a_rows):
            word = simd.load_from(builder, builder.add(a_row, a_at), simd.I32)
            for v, column in enumerate(columns):
                place = sums[i * vectors + v]
                builder.store(_product_step(builder, half, word, column, builder.load(place)), place)


def _zeros(builder: Any, count: int) -> list[Any]:
    return [cgutils.alloca_once_value(builder, simd.same(0.0)) for _ in range(count)]


def _store_all(builder: Any, places: list[Any], address: Any) -> None:
    for i, place in enumerate(places):
        simd.store_to(builder, builder.load(place), _forward(builder, address, i * ROW), align=ROW)


def score_tile(rows: int, vectors: int) -> Any:
    """tile(keys, key_stride, queries, steps, scores, kind): scores[j, v] = keys[j] . queries[:, v] of `rows` keys.

    `queries` and `scores` are `[steps or rows][vectors]` of LANES words, aligned to a vector.
    """

    def build(builder: Any, half: bool, keys: Any, key_stride: Any, queries: Any, steps: Any, scores: Any) -> None:
        sums = _zeros(builder, rows * vectors)
        key_rows = [builder.add(keys, builder.mul(key_stride, key_stride.type(j))) for j in range(rows)]
        _products(builder, half, key_rows, simd.I64(4), queries, steps, sums)
        _store_all(builder, sums, scores)

    return simd.operation_by_kind(build, types.void, *[types.int64] * 5)


def value_tile(rows: int, vectors: int) -> Any:
    """tile(values, value_stride, weights, steps, out, keep, kind): out[e, v] = keep[v] out[e, v] + values . weights.

    For `rows` columns e of `values`. `weights` and `out` are `[steps or rows][vectors]` of LANES words, aligned to a
    vector. keep = 0: nothing is kept, 1: all of `out`; else it is the address of the factors, a vector for each v.
    """

    def build(builder: Any, half: bool, values: Any, stride: Any, weights: Any, steps: Any, out: Any, keep: Any) -> None:  # fmt: skip # noqa: E501
        sums = _zeros(builder, rows * vectors)
        with builder.if_then(builder.icmp_unsigned("!=", keep, keep.type(0)), likely=True):
            for i, place in enumerate(sums):
                builder.store(simd.load_from(builder, _forward(builder, out, i * ROW), align=ROW), place)
        with builder.if_then(builder.icmp_unsigned(">", keep, keep.type(1)), likely=False):
            factors = [simd.load_from(builder, _forward(builder, keep, v * ROW), align=ROW) for v in range(vectors)]
            for i, place in enumerate(sums):
                builder.store(builder.fmul(builder.load(place), factors[i % vectors]), place)
        _products(builder, half, [_forward(builder, values, 4 * e) for e in range(rows)], stride, weights, steps, sums)
        _store_all(builder, sums, out)

    return simd.operation_by_kind(build, types.void, *[types.int64] * 6)


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(simd.I32, len(lanes)), lanes))


def _store_steps(builder: Any, half: bool, first: Any, second: Any, address: Any, stride: Any) -> None:
    if not half:
        simd.store_to(builder, first, address)
        simd.store_to(builder, second, builder.add(address, stride))
        return
    both = simd.call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", _PAIRS, [second, first])
    halves = builder.bitcast(both, ir.VectorType(simd.I16, 2 * LANES))
    lanes = [i // 2 + i % 2 * LANES for i in range(2 * LANES)]
    simd.store_to(builder, _shuffle(builder, halves, halves, lanes), address)


def _zip(builder: Any, first: Any, second: Any, address: Any, lanes: int) -> None:
    halves, words = ir.VectorType(simd.I16, lanes), ir.VectorType(simd.I32, lanes)
    low, high = (builder.zext(simd.load_from(builder, at, halves, align=2), words) for at in (first, second))
    simd.store_to(builder, builder.or_(low, builder.shl(high, simd.same(16, words))), address)


def _transpose(builder: Any, half: bool, source: Any, source_stride: Any, target: Any, target_stride: Any) -> None:
    rows = []
    for _ in range(LANES):
        rows.append(simd.load_widened(builder, half, source))
        source = builder.add(source, source_stride)
    for row in simd.turned(builder, rows):
        simd.store_to(builder, row, target)
        target = builder.add(target, target_stride)


# store_steps(first, second, address, stride, kind): two steps as words, a row of pairs or two rows `stride` apart.
store_steps = simd.operation_by_kind(_store_steps, types.void, simd.vector, simd.vector, _address, types.int64)
# zip_rows(first, second, address): words of an item of bfloat16 row `first` and the one of row `second`.
zip_rows = simd.operation(
    lambda b, one, other, to: _zip(b, one, other, to, LANES), types.void, _address, _address, _address
)
zip_item = simd.operation(
    lambda b, one, other, to: _zip(b, one, other, to, 1), types.void, _address, _address, _address
)
# transpose(source, source_stride, target, target_stride, kind): LANES rows of LANES items, as words.
transpose = simd.operation_by_kind(_transpose, types.void, _address, types.int64, _address, types.int64)
