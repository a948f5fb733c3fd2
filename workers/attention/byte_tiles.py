"""Scores of keys in int8 with the processor's own products of bytes (AVX-512 VNNI), exact in whole numbers.

A query is split into *planes* of bytes with a sign: an item is scale * (256 a + b) where queries are bfloat16, which leaves
no rest but of the smallest, else scale * (65536 a + 256 b + c); the scale is a power of two. It lies as all a, all b, all
c, plane_bytes() each, and behind them what the sums of each begin with, int32, and the scale, float32. The processor wants
keys without a sign: 128 is added to each, which is what the sums begin with less.

Numba's disk cache watches attention/kernels.py alone: touch that file after an edit here.
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


def plane_bytes(num_words: Any) -> Any:
    """Of a query whose keys have so many words: whole vectors of bytes, and LANES items are 4 words at least."""
    return (4 * num_words + LANES - 1) // LANES * LANES


def build_scores(
    builder: Any, keys: Sequence[Any], wanted: Sequence[Any], queries: Sequence[Any], words: Any, scores: Sequence[Any],
    planes: int,
) -> None:  # fmt: skip
    """scores[i][g] = queries[i] . keys[g], addresses all; asks for what lies at `wanted`."""
    stride = builder.mul(builder.udiv(builder.add(words, words.type(3)), words.type(4)), words.type(16))
    tails = [builder.add(query, builder.mul(stride, stride.type(planes))) for query in queries]
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
        for i, query in enumerate(queries):
            for p in range(planes):
                place = builder.add(query, builder.mul(stride, stride.type(p)))
                place = builder.add(place, builder.mul(loop.index, loop.index.type(4)))
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


def _write_planes(builder: Any, kind: str, x: Any, scale: Any, query: Any, offset: Any, stride: Any) -> None:
    planes = num_planes(kind)
    most = sum(127 * 256**p for p in range(planes))
    left = simd.whole(builder, builder.fdiv(x, simd.spread(builder, scale)), most)
    tail = builder.add(query, builder.mul(stride, stride.type(planes)))
    for p in reversed(range(planes)):
        items = builder.trunc(left, _BYTES)
        target = builder.add(builder.add(query, offset), builder.mul(stride, stride.type(p)))
        simd.store_to(builder, items, target, align=1)
        digits = builder.sext(items, WORDS)
        left = builder.ashr(builder.sub(left, digits), simd.same(8, WORDS))
        total = simd.call(builder, f"llvm.vector.reduce.add.v{LANES}i32", I32, [digits])
        place = builder.add(tail, tail.type(4 * p))
        begin = builder.sub(simd.load_from(builder, place, I32), builder.mul(total, I32(128)))
        simd.store_to(builder, begin, place)


# write_planes(x, scale, query, offset, stride, kind): x / scale in the planes of a query, from byte `offset` of each on.
write_planes = simd.operation_of_kind(
    _write_planes, types.void, simd.vector, types.float32, types.int64, types.int64, types.int64
)
# planes(kind), unit_of(kind)
planes = simd.operation_of_kind(lambda builder, kind: simd.I64(num_planes(kind)), types.int64)
unit_of = simd.operation_of_kind(lambda builder, kind: simd.FLOAT(unit(kind)), types.float32)
