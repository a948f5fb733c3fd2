"""Weights of 16 bits into 8 and 4 bits: scales and zeros that fit a group best, and values in the order of packing.py.

8 bits are symmetric: the largest item is 127 scales from zero. 4 bits may have a zero: of some ranges between the
smallest and the largest item, or without a zero up to the one that is farthest from it, and scales by least squares for
the codes that come of them, the one with the least error counts. LANES groups are worked on at once, one in each lane
of a vector.

Imported only where weights are to be quantised.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types

from flexgen_lite.workers import simd
from flexgen_lite.workers.loader.cast_kernels import _compiled, _to_bfloat16
from flexgen_lite.workers.simd import LANES as LANES
from flexgen_lite.workers.simd import VECTOR, WORDS, load, splat, store, vector

RANGES = (1.0, 0.92, 0.84, 0.76)
MIDDLE = 8  # what is added to values of 4 bits
COLUMNS = 64
ROW = 4 * LANES
F32, U8 = np.float32, np.uint8

_kernel: Any = njit(nogil=True, error_model="numpy", _nrt=False)


def _rint(builder: Any, x: Any) -> Any:
    return simd.call(builder, f"llvm.rint.v{LANES}f32", VECTOR, [x])


def _to_nearest_bfloat16(builder: Any, x: Any) -> Any:
    bits = builder.zext(simd.narrow(builder, x), WORDS)
    return builder.bitcast(builder.shl(bits, simd.same(16, WORDS)), VECTOR)


def _larger(builder: Any, x: Any, y: Any) -> Any:
    """Of two that are not negative; what is no number is larger than any."""
    a, b = builder.bitcast(x, WORDS), builder.bitcast(y, WORDS)
    return builder.select(builder.icmp_signed(">", a, b), x, y)


def _less(builder: Any, x: Any, y: Any, then: Any, other: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", x, y), then, other)


def _joined(items: list[list[int]], bits: int) -> Any:
    """joined(codes, target): a run of codes, `[item]` vectors of whole numbers as float32, as words of each lane;
    `items[word][part]` is the item of a word's part."""
    mask = simd.same((1 << bits) - 1, WORDS)

    def build(builder: Any, codes: Any, target: Any) -> None:
        for word, parts in enumerate(items):
            joined = simd.same(0, WORDS)
            for part, item in enumerate(parts):
                code = builder.fptosi(simd.load_from(builder, builder.add(codes, codes.type(item * ROW))), WORDS)
                shifted = builder.shl(builder.and_(code, mask), simd.same(bits * part, WORDS))
                joined = builder.or_(joined, shifted)
            simd.store_to(builder, joined, builder.add(target, target.type(word * ROW)))

    return simd.operation(build, types.void, types.int64, types.int64)


_rounded = simd.operation(_rint, vector, vector)
_to_bf16 = simd.operation(_to_nearest_bfloat16, vector, vector)
_if_less = simd.operation(_less, vector, vector, vector, vector, vector)  # of x < y: a third, else a fourth
_the_larger = simd.operation(_larger, vector, vector, vector)
_absolute = simd.operation(
    lambda b, x: b.bitcast(b.and_(b.bitcast(x, WORDS), simd.same(0x7FFFFFFF, WORDS)), VECTOR), vector, vector
)
_turned = simd.operation(
    lambda b, source, stride, to: simd.turn(b, source, stride, to, ROW), types.void, *[types.int64] * 3
)
_PAIRS = [[2 * part + word for part in range(8)] for word in range(2)]
_join_8 = _joined([pair[:4] for pair in _PAIRS], 8)
_join_4 = _joined(_PAIRS, 4)
_join_8_bytes = _joined([[0, 1, 2, 3]], 8)
_join_4_bytes = _joined([[0, 4, 1, 5, 2, 6, 3, 7]], 4)


@_kernel  # type: ignore[untyped-decorator]
def _clamped(x: Any, least: Any, most: Any) -> Any:
    x = _if_less(x, least, least, x)
    return _if_less(most, x, most, x)


@_kernel  # type: ignore[untyped-decorator]
def _try_4(group: Any, count: Any, scale: Any, zero: Any, best: Any, trial: Any, codes: Any) -> Any:
    """Takes codes for these scales and zeros where their error is the least so far; the scale that fits them best.

    Args:
        best: address of the least error, and its scale and zero.
    """
    nothing, top = splat(F32(0)), splat(F32(15))
    inverse = simd.divide(splat(F32(1)), scale)
    error, product, square = nothing, nothing, nothing
    for i in range(count):
        x = load(group + i * ROW)
        code = _clamped(simd.add(_rounded(simd.multiply(x, inverse)), zero), nothing, top)
        store(code, trial + i * ROW)
        whole = simd.subtract(code, zero)
        rest = simd.subtract(x, simd.multiply(whole, scale))
        error = simd.multiply_add(rest, rest, error)
        product = simd.multiply_add(whole, x, product)
        square = simd.multiply_add(whole, whole, square)
    least = load(best)
    store(_if_less(error, least, scale, load(best + ROW)), best + ROW)
    store(_if_less(error, least, zero, load(best + 2 * ROW)), best + 2 * ROW)
    for i in range(count):
        at = codes + i * ROW
        store(_if_less(error, least, load(trial + i * ROW), load(at)), at)
    store(_if_less(error, least, error, least), best)
    fitted = _to_bf16(simd.divide(product, square))
    return _if_less(nothing, fitted, fitted, scale)


@_kernel  # type: ignore[untyped-decorator]
def _quantise_4(group: Any, count: Any, has_zeros: Any, best: Any, trial: Any, codes: Any) -> None:
    """LANES groups; what `best` has then see `_try_4`. What is not finite gets a scale that is no number, and so do
    items whose squares are not."""
    low, high, tiny, zero = splat(F32(0)), splat(F32(0)), splat(F32(1e-30)), splat(F32(MIDDLE))
    store(splat(F32(np.inf)), best)
    store(splat(F32(np.nan)), best + ROW)
    store(zero, best + 2 * ROW)
    for i in range(count):
        x = load(group + i * ROW)
        low, high = _if_less(x, low, x, low), _if_less(high, x, x, high)
        store(zero, codes + i * ROW)
    steps = 15 if has_zeros else 7
    span = simd.subtract(high, low) if has_zeros else simd.maximum(high, simd.subtract(splat(F32(0)), low))
    for shrink in RANGES:
        size = simd.multiply(span, splat(F32(shrink / steps)))
        scale = _to_bf16(_if_less(tiny, size, size, tiny))
        if has_zeros:
            zero = _rounded(simd.divide(simd.multiply(low, splat(F32(-shrink))), scale))
        scale = _try_4(group, count, scale, zero, best, trial, codes)
        _try_4(group, count, scale, zero, best, trial, codes)


@_kernel  # type: ignore[untyped-decorator]
def _quantise_8(group: Any, count: Any, best: Any, codes: Any, bias: Any) -> None:
    most, tiny = splat(F32(0)), splat(F32(1e-30))
    for i in range(count):
        most = _the_larger(_absolute(load(group + i * ROW)), most)
    scale = simd.multiply(most, splat(F32(1 / 127)))
    scale = _to_bf16(_if_less(scale, tiny, tiny, scale))
    store(scale, best + ROW)
    inverse = simd.divide(splat(F32(1)), scale)
    for i in range(count):
        code = _rounded(simd.multiply(load(group + i * ROW), inverse))
        code = _clamped(code, splat(F32(-127)), splat(F32(127)))
        store(simd.add(code, splat(bias)), codes + i * ROW)


@_kernel  # type: ignore[untyped-decorator]
def _join(codes: Any, bits: Any, for_int8: Any, target: Any) -> None:
    if bits == 8:
        if for_int8:
            _join_8_bytes(codes, target)
        else:
            _join_8(codes, target)
    elif for_int8:
        _join_4_bytes(codes, target)
    else:
        _join_4(codes, target)


def _quantise(
    runs: Any, rows: Any, first: Any, bits: Any, group: Any, for_int8: Any, columns: Any, width: Any,
    values: Any, scales: Any, zeros: Any, scratch: Any,
) -> None:  # fmt: skip
    """Runs `[R, L]` of float32: items of K from `first[r]` on of row `rows[r]`, counted through all weights.

    Args:
        runs: R is a multiple of LANES; those behind the rows count for nothing.
        values: as words.
        scales: as bits of bfloat16.
        zeros: empty where there are none.
        scratch: SCRATCH_ROWS + 3 `group` vectors.
    """
    blocks, groups, block_words = (columns + COLUMNS - 1) // COLUMNS, width // group, COLUMNS * width * bits // 32
    num_words = 1 if for_int8 else 2  # of a column's run
    items = num_words * 32 // bits
    has_zeros = zeros.size > 0
    best = scratch.ctypes.data
    words = best + 4 * ROW
    part = words + 2 * ROW
    codes, trial = part + group * ROW, part + 2 * group * ROW
    stride = 4 * runs.shape[1]
    word_at, scale_at = np.empty(LANES, np.int64), np.empty(LANES, np.int64)  # of the first item of each row
    for r in range(0, runs.shape[0], LANES):
        count = min(LANES, rows.size - r)
        for lane in range(count):
            row = rows[r + lane]
            block, column = row // columns * blocks + row % columns // COLUMNS, row % columns % COLUMNS
            word_at[lane] = block * block_words + (first[r + lane] // items * COLUMNS + column) * num_words
            scale_at[lane] = (block * groups + first[r + lane] // group) * COLUMNS + column
        for k in range(0, runs.shape[1], group):
            for i in range(0, group, LANES):
                _turned(runs.ctypes.data + r * stride + 4 * (k + i), stride, part + i * ROW)
            if bits == 8:
                _quantise_8(part, group, best, codes, F32(128 if for_int8 else 0))
            else:
                _quantise_4(part, group, has_zeros, best, trial, codes)
            for i in range(0, group, items):
                _join(codes + i * ROW, bits, for_int8, words)
                step = (k + i) // items * COLUMNS * num_words
                for word in range(num_words):
                    for lane in range(count):
                        values[word_at[lane] + step + word] = scratch[(4 + word) * LANES + lane]
            for lane in range(count):
                place = scale_at[lane] + k // group * COLUMNS
                scales[place] = _to_bfloat16(scratch[LANES + lane])
                if has_zeros:
                    zeros[place] = U8(simd.load_float(best + 2 * ROW + 4 * lane))


SCRATCH_ROWS = 6
quantise: Any = _compiled(_quantise)
