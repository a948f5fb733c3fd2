"""Scores of keys in int8 with the processor's own products of bytes (AVX-512 VNNI), exact in whole numbers.

A query is split into *planes* of bytes with a sign: an item is scale * (256 a + b) where queries are bfloat16, else
scale * (65536 a + 256 b + c), with a rest of half the scale at most; the scale is a power of two. A query lies as words
of four items, a word of each plane after another; behind them, at planes_end(), is what the sums of each plane begin
with, int32, and the scale, float32. The processor wants keys without a sign: 128 is added to each, and the sums begin
with that much less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from flexgen_lite.workers import simd
from flexgen_lite.workers.simd import I32, LANES, VECTOR, WORDS

_BYTES = ir.VectorType(ir.IntType(8), LANES)


def num_planes(kind: str) -> int:
    """Of queries of this kind."""
    return 2 if kind == "bfloat16" else 3


def unit(kind: str) -> float:
    """What the scale is, of a query whose largest item is 1."""
    return 2.0**-14 if kind == "bfloat16" else 2.0**-21


def planes_end(num_words: Any, planes: Any) -> Any:
    """Bytes of the planes of a query whose keys have so many words: LANES items, which are written at once, are whole
    words."""
    return (4 * num_words + LANES - 1) // LANES * LANES * planes


def build_scores(
    builder: Any, keys: Sequence[Any], wanted: Sequence[Any], queries: Sequence[Any], words: Any, scores: Sequence[Any],
    planes: int,
) -> None:  # fmt: skip
    """scores[i][g] = queries[i] . keys[g], addresses all; asks for what lies at `wanted`."""
    vectors_of_words = builder.udiv(builder.add(words, words.type(LANES // 4 - 1)), words.type(LANES // 4))
    end = builder.mul(vectors_of_words, words.type(LANES * planes))
    tails = [builder.add(query, end) for query in queries]
    sums = {
        (i, p, g): cgutils.alloca_once_value(
            builder, simd.spread(builder, simd.load_from(builder, builder.add(tail, tail.type(4 * p)), I32))
        )
        for i, tail in enumerate(tails)
        for p in range(planes)
        for g in range(len(keys))
    }
    with cgutils.for_range(builder, words) as loop:
        at = builder.mul(loop.index, loop.index.type(4 * LANES))
        vectors = []
        for key, ahead in zip(keys, wanted, strict=True):
            vector = simd.load_from(builder, builder.add(key, at), WORDS)
            vectors.append(builder.xor(vector, simd.same(0x80808080, WORDS)))
            simd.prefetch(builder, builder.add(ahead, at))
        first = builder.mul(loop.index, loop.index.type(4 * planes))
        for i, query in enumerate(queries):
            for p in range(planes):
                place = builder.add(builder.add(query, first), first.type(4 * p))
                four = simd.spread(builder, simd.load_from(builder, place, I32))
                for g, vector in enumerate(vectors):
                    total = sums[i, p, g]
                    builder.store(simd.add_products_of_bytes(builder, builder.load(total), vector, four), total)
    for i, tail in enumerate(tails):
        scale = simd.spread(builder, simd.load_from(builder, builder.add(tail, tail.type(4 * planes)), simd.FLOAT))
        for g in range(len(keys)):
            score = simd.same(0.0)
            for p in range(planes):
                part = builder.sitofp(builder.load(sums[i, p, g]), VECTOR)
                score = simd.fused(builder, score, simd.same(256.0), part)
            score = builder.fmul(score, scale)
            simd.store_to(builder, score, builder.add(scores[i], scores[i].type(4 * LANES * g)))


def _write_planes(builder: Any, kind: str, x: Any, scale: Any, target: Any, tail: Any) -> None:
    planes = num_planes(kind)
    most = sum(127 * 256**p for p in range(planes))
    left = simd.whole(builder, builder.fdiv(x, simd.spread(builder, scale)), most)
    for p in reversed(range(planes)):
        items = builder.trunc(left, _BYTES)
        words = builder.bitcast(items, ir.VectorType(I32, LANES // 4))
        for word in range(LANES // 4):
            at = builder.add(target, target.type(4 * (word * planes + p)))
            simd.store_to(builder, builder.extract_element(words, I32(word)), at)
        digits = builder.sext(items, WORDS)
        left = builder.ashr(builder.sub(left, digits), simd.same(8, WORDS))
        total = simd.call(builder, f"llvm.vector.reduce.add.v{LANES}i32", I32, [digits])
        place = builder.add(tail, tail.type(4 * p))
        begin = builder.sub(simd.load_from(builder, place, I32), builder.mul(total, I32(128)))
        simd.store_to(builder, begin, place)


# write_planes(x, scale, target, tail, kind): x / scale in the planes at `target`; `tail` is the query's planes_end.
write_planes = simd.operation_of_kind(_write_planes, types.void, simd.vector, types.float32, types.int64, types.int64)
# planes(kind), unit_of(kind)
planes = simd.operation_of_kind(lambda builder, kind: simd.I64(num_planes(kind)), types.int64)
unit_of = simd.operation_of_kind(lambda builder, kind: simd.FLOAT(unit(kind)), types.float32)
