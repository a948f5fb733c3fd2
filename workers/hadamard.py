"""Rows times Hadamard matrices, in place: what keys, values and queries become before a KV cache of 8 bits rounds them.

The matrix is a Kronecker power of the regular one of order 4, which has -1 on its diagonal and else 1; where the order
is twice a power of 4, the outermost factor is [[1, 1], [1, -1]]. Times itself it is the identity times its order, a
factor that is left to the caller. Sylvester's matrix would make one large item of a row whose items are alike; this one
leaves them alike. A row is multiplied block by block, each of as many items as the order. Sums are those of pairs, and
of pairs of these, so that they come out alike on every processor.

Memory is named by address; rows are float32 with room for whole vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types

from flexgen_lite.workers import simd
from flexgen_lite.workers.simd import LANES, VECTOR, WORDS

ROW = 4 * LANES  # bytes of a vector
FOURTHS = 64  # items of a block that go through registers at once, a power of 4
MOST = 128 if simd.WIDE else FOURTHS  # ... where they are the whole block
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False}

_ZERO = np.float32(0)

kernel: Any = njit(**OPTIONS)


def _partners(builder: Any, vectors: list[Any], distance: int) -> list[Any]:
    """For each item the one `distance` from it."""
    if distance >= LANES:
        return [vectors[i ^ (distance // LANES)] for i in range(len(vectors))]
    lanes = ir.Constant(WORDS, [lane ^ distance for lane in range(LANES)])
    return [builder.shuffle_vector(x, x, lanes) for x in vectors]


def _by_two(builder: Any, vectors: list[Any], distance: int) -> list[Any]:
    others = _partners(builder, vectors, distance)
    result = []
    for i, (x, other) in enumerate(zip(vectors, others, strict=True)):
        first = i * LANES
        signs = ir.Constant(VECTOR, [-1.0 if (first + lane) & distance else 1.0 for lane in range(LANES)])
        result.append(simd.fused(builder, x, signs, other))
    return result


def _by_four(builder: Any, vectors: list[Any], distance: int) -> list[Any]:
    """The sum of four items, less twice each."""
    sums = vectors
    for step in (distance, 2 * distance):
        sums = [builder.fadd(x, y) for x, y in zip(sums, _partners(builder, sums, step), strict=True)]
    return [simd.fused(builder, x, simd.same(-2.0), y) for x, y in zip(vectors, sums, strict=True)]


def _block(items: int) -> Any:
    """block(at): multiplies `items` in place, or each of the blocks of a vector where they are fewer than LANES."""

    def build(builder: Any, at: Any) -> None:
        places = [builder.add(at, at.type(i * ROW)) for i in range(max(1, items // LANES))]
        vectors = [simd.load_from(builder, place) for place in places]
        distance = 1
        while 4 * distance <= items:
            vectors = _by_four(builder, vectors, distance)
            distance *= 4
        if distance < items:
            vectors = _by_two(builder, vectors, distance)
        for x, place in zip(vectors, places, strict=True):
            simd.store_to(builder, x, place)

    return simd.operation(build, types.void, types.int64)


def _two(builder: Any, first: Any, distance: Any) -> None:
    places = [first, builder.add(first, distance)]
    x, y = (simd.load_from(builder, place) for place in places)
    simd.store_to(builder, builder.fadd(x, y), places[0])
    simd.store_to(builder, builder.fsub(x, y), places[1])


def _four(builder: Any, first: Any, distance: Any) -> None:
    places = [builder.add(first, builder.mul(distance, distance.type(i))) for i in range(4)]
    vectors = [simd.load_from(builder, place) for place in places]
    low, high = builder.fadd(*vectors[:2]), builder.fadd(*vectors[2:])
    total = builder.fadd(low, high)
    for x, place in zip(vectors, places, strict=True):
        simd.store_to(builder, simd.fused(builder, x, simd.same(-2.0), total), place)


_block_2, _block_4, _block_8, _block_16, _block_32, _block_64, _block_128 = (_block(2**i) for i in range(1, 8))
# two(first, distance), four(first, distance): vectors, `distance` bytes apart.
_two_vectors = simd.operation(_two, types.void, types.int64, types.int64)
_four_vectors = simd.operation(_four, types.void, types.int64, types.int64)


@kernel
def multiply(at, count, order):  # type: ignore[no-untyped-def]
    """A row of `count` items, a multiple of `order`."""
    if order == 1:
        return
    size, end = order if order <= MOST else FOURTHS, at + 4 * count
    for i in range(at, end, max(4 * size, ROW)):
        if size == 128:
            _block_128(i)
        elif size == 64:
            _block_64(i)
        elif size == 32:
            _block_32(i)
        elif size == 16:
            _block_16(i)
        elif size == 8:
            _block_8(i)
        elif size == 4:
            _block_4(i)
        else:
            _block_2(i)
    while 4 * size <= order:
        for first in range(at, end, 16 * size):
            for i in range(first, first + 4 * size, ROW):
                _four_vectors(i, 4 * size)
        size *= 4
    if size < order:
        for first in range(at, end, 8 * size):
            for i in range(first, first + 4 * size, ROW):
                _two_vectors(i, 4 * size)


@kernel
def largest(at, count):  # type: ignore[no-untyped-def]
    """Of a row of `count` items with zeros behind, without signs; and 0, or NaN where not all of them are finite."""
    top, flaw, zero = simd.splat(_ZERO), simd.splat(_ZERO), simd.splat(_ZERO)
    for i in range(at, at + 4 * count, ROW):
        x = simd.load(i)
        top = simd.maximum(top, simd.maximum(x, simd.subtract(zero, x)))
        flaw = simd.add(flaw, simd.multiply(x, zero))
    return simd.largest(top), simd.total(flaw)
