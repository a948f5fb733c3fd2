"""Scales and offsets of a group of items of a block of columns, as packing.py has them, as vectors of float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils

from flexgen_lite.model.packing import COLUMNS, SCALE_BYTES, ZERO_BYTES, Packing
from flexgen_lite.workers import simd
from flexgen_lite.workers.compute.prefill_packing import kernel
from flexgen_lite.workers.simd import LANES, VECTOR, WORDS

_KINDS = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e8m0fnu", "uint8", "int8")
SCALE_KINDS = {kind: number for number, kind in enumerate(_KINDS)}
VECTORS = COLUMNS // LANES
_BYTES = ir.VectorType(ir.IntType(8), LANES)
_NAN, _SUBNORMAL = 0x7F, 8  # of the codes of E4M3 without their sign: no number; the first that is none of these
FIELDS = ("scales", "scale_kind", "zeros", "zero_bytes", "factors", "lows", "factor_bytes", "factor_group", "divides")
"""Of the records of calls: `[weight][block][groups][COLUMNS]` each, from an address on that is 0 where there are none.
Zeros, or offsets where `zero_bytes` is 4, or 1 and there are factors of them, `lows`."""


class Scales(NamedTuple):
    """Values of such fields while code is built; addresses are those of a group."""

    scales: Any
    scale_kind: Any
    zeros: Any
    zero_bytes: Any
    factors: Any
    lows: Any
    factor_bytes: Any
    divides: Any


def fields_of(packing: Packing, shape: tuple[int, ...], start: int, index: int = 0) -> tuple[int, ...]:
    """Values of FIELDS of weight number `index` and those behind it; the bytes of the parameter begin at `start`."""
    scale_bytes, zero_bytes = SCALE_BYTES[packing.scale_dtype], ZERO_BYTES[packing.zeros]
    factor_bytes = SCALE_BYTES[packing.factors] if packing.factors else 0
    scales, factors = index * packing.num_scales(shape), index * packing.num_factors(shape) * factor_bytes
    return (
        start + packing.scales_at(shape) + scales * scale_bytes,
        SCALE_KINDS[packing.scale_dtype],
        start + packing.zeros_at(shape) + scales * zero_bytes if packing.zeros else 0,
        zero_bytes,
        start + packing.factors_at(shape) + factors if packing.factors else 0,
        start + packing.lows_at(shape) + factors if packing.zeros == "scaled" else 0,
        factor_bytes,
        packing.factor_group,
        int(packing.divides),
    )


def of_e4m3(builder: Any, words: Any, item: int, table: Any = None) -> Any:
    """Byte `item` of each word, a number of 4 bits of exponent and 3 of mantissa."""
    left = builder.shl(words, simd.same(24 - 8 * item, WORDS)) if item < 3 else words
    sign = builder.and_(left, simd.same(0x80000000, WORDS))
    size = builder.and_(builder.lshr(left, simd.same(24, WORDS)), simd.same(0x7F, WORDS))
    # The exponents' biases differ by 120. Of a subnormal number that makes 2^-7 + m 2^-10 instead of m 2^-9.
    shifted = builder.add(builder.shl(size, simd.same(20, WORDS)), simd.same(120 << 23, WORDS))
    value = builder.bitcast(shifted, VECTOR)
    corrected = simd.fused(builder, value, simd.same(2.0), simd.same(-(2.0**-6)))
    value = builder.select(builder.icmp_unsigned("<", size, simd.same(_SUBNORMAL, WORDS)), corrected, value)
    value = builder.select(builder.icmp_unsigned("==", size, simd.same(_NAN, WORDS)), simd.same(float("nan")), value)
    return builder.bitcast(builder.or_(builder.bitcast(value, WORDS), sign), VECTOR)


def _of_e8m0(builder: Any, words: Any) -> Any:
    """Powers of two, the smallest of which is none of float32's normal numbers."""
    shifted = builder.shl(words, simd.same(23, WORDS))
    is_least = builder.icmp_unsigned("==", words, simd.same(0, WORDS))
    return builder.bitcast(builder.select(is_least, simd.same(1 << 22, WORDS), shifted), VECTOR)


def _load(builder: Any, kind: str, address: Any) -> Any:
    """LANES of them."""
    if kind in ("float32", "bfloat16", "float16"):
        return simd.load_stored(builder, kind, address)
    codes = simd.load_from(builder, address, _BYTES, align=1)
    if kind == "int8":
        return builder.sitofp(builder.sext(codes, WORDS), VECTOR)
    words = builder.zext(codes, WORDS)
    if kind == "uint8":
        return builder.uitofp(words, VECTOR)
    return of_e4m3(builder, words, 0) if kind == "float8_e4m3fn" else _of_e8m0(builder, words)


def _size(kind: str) -> int:
    return {"float32": 4, "bfloat16": 2, "float16": 2}.get(kind, 1)


def _load_by(builder: Any, number: Any, cases: dict[int, str], address: Any) -> list[Any]:
    """Vectors of all columns, of the kind that `cases` has for a number."""
    places = [cgutils.alloca_once(builder, VECTOR) for _ in range(VECTORS)]
    blocks = {case: builder.append_basic_block(kind) for case, kind in cases.items()}
    end = builder.append_basic_block("loaded")
    switch = builder.switch(number, next(iter(blocks.values())))
    for case, block in blocks.items():
        switch.add_case(number.type(case), block)
        builder.position_at_end(block)
        kind = cases[case]
        for group, place in enumerate(places):
            at = builder.add(address, address.type(group * LANES * _size(kind)))
            builder.store(_load(builder, kind, at), place)
        builder.branch(end)
    builder.position_at_end(end)
    return [builder.load(place) for place in places]


def _changed(builder: Any, condition: Any, vectors: list[Any], change: Callable[[list[Any]], list[Any]]) -> list[Any]:
    """`change(vectors)` where the condition is met."""
    places = [cgutils.alloca_once_value(builder, vector) for vector in vectors]
    with builder.if_then(condition):
        for place, vector in zip(places, change(vectors), strict=True):
            builder.store(vector, place)
    return [builder.load(place) for place in places]


def _is(builder: Any, value: Any, number: int) -> Any:
    return builder.icmp_unsigned("==", value, value.type(number))


def _isnt(builder: Any, value: Any, number: int) -> Any:
    return builder.icmp_unsigned("!=", value, value.type(number))


def load_scales(builder: Any, at: Scales) -> list[Any]:
    """Of all columns, LANES in each vector."""
    scales = _load_by(builder, at.scale_kind, {number: kind for kind, number in SCALE_KINDS.items()}, at.scales)

    def multiplied(vectors: list[Any]) -> list[Any]:
        factors = _load_factors(builder, at, at.factors)
        products = [builder.fmul(vector, factor) for vector, factor in zip(vectors, factors, strict=True)]
        return _changed(
            builder,
            _isnt(builder, at.divides, 0),
            products,
            lambda _: [builder.fdiv(vector, factor) for vector, factor in zip(vectors, factors, strict=True)],
        )

    return _changed(builder, _isnt(builder, at.factors, 0), scales, multiplied)


def _load_factors(builder: Any, at: Scales, address: Any) -> list[Any]:
    return _load_by(builder, at.factor_bytes, {4: "float32", 2: "float16"}, address)


def load_zeros(builder: Any, at: Scales, default: Any) -> list[Any]:
    """Bytes of zeros as float32; `default` where there are none."""
    is_whole = builder.and_(_is(builder, at.zero_bytes, 1), _is(builder, at.lows, 0))

    def codes(_: list[Any]) -> list[Any]:
        return [_load(builder, "uint8", builder.add(at.zeros, at.zeros.type(i * LANES))) for i in range(VECTORS)]

    return _changed(builder, is_whole, [default] * VECTORS, codes)


def load_offsets(builder: Any, at: Scales) -> list[Any]:
    """What is added to products; 0 where there is nothing."""

    def stored(_: list[Any]) -> list[Any]:
        return [simd.load_from(builder, builder.add(at.zeros, at.zeros.type(4 * i * LANES))) for i in range(VECTORS)]

    def scaled(_: list[Any]) -> list[Any]:
        found = []
        for i, factor in enumerate(_load_factors(builder, at, at.lows)):
            code = _load(builder, "uint8", builder.add(at.zeros, at.zeros.type(i * LANES)))
            found.append(builder.fneg(builder.fmul(code, factor)))
        return found

    offsets = _changed(builder, _is(builder, at.zero_bytes, 4), [simd.same(0.0)] * VECTORS, stored)
    return _changed(builder, _isnt(builder, at.lows, 0), offsets, scaled)


@kernel
def scale_bytes(kind):  # type: ignore[no-untyped-def]
    if kind == 0:
        return 4
    return 2 if kind <= 2 else 1


@kernel
def factor_place(call, block, item, width):  # type: ignore[no-untyped-def]
    """Of the factors for item `item` of K of a block, counted through all weights; 0 where there are none."""
    if call.factors == 0:
        return 0
    return (block * (width // call.factor_group) + item // call.factor_group) * COLUMNS


@kernel
def at_place(address, place, size):  # type: ignore[no-untyped-def]
    """0 where `address` is."""
    return 0 if address == 0 else address + place * size
