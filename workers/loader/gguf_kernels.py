"""Blocks of GGUF to words of codes along K, scales and offsets; and all of these to float32.

A line of blocks is seen as halves of words, for every type's blocks have an even number of bytes. Where a value is
rounded, it is rounded as ggml does it, in float32: the product of two scales, then that with the item. Source of what
lies where in a block: ggml's ggml-common.h and ggml-quants.c. Imported only where there are such weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from flexgen_lite.workers.loader.cast_kernels import _compiled

U8, U16, U32, U64, F32 = np.uint8, np.uint16, np.uint32, np.uint64, np.float32
LOW = U64(0x0F0F0F0F0F0F0F0F)
ONES = U64(0x0101010101010101)
MIDDLE = U64(0x8080808080808080)  # of bytes that have a sign

_inlined: Any = njit(inline="always")


@_inlined  # type: ignore[untyped-decorator]
def _word(row: Any, at: Any) -> Any:
    """Eight bytes from half `at` on."""
    low = U64(row[at]) | (U64(row[at + 1]) << U64(16))
    return low | (U64(row[at + 2]) << U64(32)) | (U64(row[at + 3]) << U64(48))


@_inlined  # type: ignore[untyped-decorator]
def _byte(row: Any, at: Any, index: Any) -> Any:
    """Byte `index` behind half `at`."""
    return U32((U32(row[at + (index >> 1)]) >> U32(8 * (index & 1))) & U32(255))


@_inlined  # type: ignore[untyped-decorator]
def _together(x: Any) -> Any:
    """The lower halves of eight bytes, one behind the other in 32 bits."""
    x = (x | (x >> U64(4))) & U64(0x00FF00FF00FF00FF)
    x = (x | (x >> U64(8))) & U64(0x0000FFFF0000FFFF)
    return (x | (x >> U64(16))) & U64(0xFFFFFFFF)


@_inlined  # type: ignore[untyped-decorator]
def _spread(bits: Any) -> Any:
    """Each of eight bits in a byte of its own."""
    x = U64(bits)
    x = (x | (x << U64(28))) & U64(0x0000000F0000000F)
    x = (x | (x << U64(14))) & U64(0x0003000300030003)
    return (x | (x << U64(7))) & ONES


@_inlined  # type: ignore[untyped-decorator]
def _pair(row: Any, at: Any, j: Any) -> Any:
    """Scale and least value number `j` of a block of 256, six bits each, of twelve bytes from half `at` on."""
    if j < 4:
        return _byte(row, at, j) & U32(63), _byte(row, at, j + 4) & U32(63)
    top, low = _byte(row, at, j + 4), _byte(row, at, j - 4) >> U32(6)
    return (top & U32(15)) | (low << U32(4)), (top >> U32(4)) | ((_byte(row, at, j) >> U32(6)) << U32(4))


def _fours(lines: Any, halves: Any, begin: Any, codes: Any) -> None:
    """Blocks of 32 items of 4 bits, the first 16 in the lower halves of bytes, from half `begin` of a block on."""
    for r in range(lines.shape[0]):
        row = lines[r]
        for b in range(codes.shape[1] // 2):
            first, second = _word(row, b * halves + begin), _word(row, b * halves + begin + 4)
            codes[r, 2 * b] = _together(first & LOW) | (_together(second & LOW) << U64(32))
            high = _together((first >> U64(4)) & LOW)
            codes[r, 2 * b + 1] = high | (_together((second >> U64(4)) & LOW) << U64(32))


def _fives(lines: Any, halves: Any, begin: Any, shift: Any, codes: Any) -> None:
    """The same of 5 bits, whose highest are in the four bytes before; `shift` is added to each byte."""
    for r in range(lines.shape[0]):
        row = lines[r]
        for b in range(codes.shape[1] // 4):
            at = b * halves + begin
            for i in range(2):
                word = _word(row, at + 4 * i)
                low = U64(row[at - 2]) >> U64(8 * i)
                high = U64(row[at - 1]) >> U64(8 * i)
                codes[r, 4 * b + i] = ((word & LOW) | (_spread(low & U64(255)) << U64(4))) + shift
                upper = (word >> U64(4)) & LOW
                codes[r, 4 * b + 2 + i] = (upper | (_spread(high & U64(255)) << U64(4))) + shift


def _eights(lines: Any, codes: Any) -> None:
    for r in range(lines.shape[0]):
        row = lines[r]
        for b in range(codes.shape[1] // 4):
            for i in range(4):
                codes[r, 4 * b + i] = _word(row, 17 * b + 1 + 4 * i) ^ MIDDLE


def _fours_k(lines: Any, codes: Any, scales: Any, lows: Any) -> None:
    for r in range(lines.shape[0]):
        row = lines[r]
        for b in range(codes.shape[1] // 16):
            at = 72 * b
            _scales_k(row, at, r, 8 * b, scales, lows)
            for run in range(4):
                for i in range(2):
                    first, second = _word(row, at + 8 + 16 * run + 8 * i), _word(row, at + 12 + 16 * run + 8 * i)
                    to = 16 * b + 4 * run + i
                    codes[r, to] = _together(first & LOW) | (_together(second & LOW) << U64(32))
                    high = _together((first >> U64(4)) & LOW)
                    codes[r, to + 2] = high | (_together((second >> U64(4)) & LOW) << U64(32))


def _fives_k(lines: Any, codes: Any, scales: Any, lows: Any) -> None:
    for r in range(lines.shape[0]):
        row = lines[r]
        for b in range(codes.shape[1] // 32):
            at = 88 * b
            _scales_k(row, at, r, 8 * b, scales, lows)
            for run in range(4):
                for i in range(4):
                    word, top = _word(row, at + 24 + 16 * run + 4 * i), _word(row, at + 8 + 4 * i)
                    to = 32 * b + 8 * run + i
                    low, high = (top >> U64(2 * run)) & ONES, (top >> U64(2 * run + 1)) & ONES
                    codes[r, to] = ((word & LOW) | (low << U64(4))) ^ MIDDLE
                    codes[r, to + 4] = (((word >> U64(4)) & LOW) | (high << U64(4))) ^ MIDDLE


@_inlined  # type: ignore[untyped-decorator]
def _scales_k(row: Any, at: Any, r: Any, to: Any, scales: Any, lows: Any) -> None:
    for j in range(8):
        scales[r, to + j], lows[r, to + j] = _pair(row, at + 2, j)


def _sixes_k(lines: Any, codes: Any, scales: Any) -> None:
    threes, shift = U64(0x0303030303030303), U64(96) * ONES  # 128 - 32
    for r in range(lines.shape[0]):
        row = lines[r]
        for b in range(codes.shape[1] // 32):
            at = 105 * b
            for j in range(16):
                scales[r, 16 * b + j] = _byte(row, at + 96, j)
            for run in range(2):
                for i in range(4):
                    first, second = _word(row, at + 32 * run + 4 * i), _word(row, at + 32 * run + 16 + 4 * i)
                    top, to = _word(row, at + 64 + 16 * run + 4 * i), 32 * b + 16 * run + i
                    codes[r, to] = ((first & LOW) | ((top & threes) << U64(4))) + shift
                    codes[r, to + 4] = ((second & LOW) | (((top >> U64(2)) & threes) << U64(4))) + shift
                    upper, last = (first >> U64(4)) & LOW, (second >> U64(4)) & LOW
                    codes[r, to + 8] = (upper | (((top >> U64(4)) & threes) << U64(4))) + shift
                    codes[r, to + 12] = (last | (((top >> U64(6)) & threes) << U64(4))) + shift


def _floats_of_4(codes: Any, middle: Any, scales: Any, offsets: Any, group: Any, target: Any) -> None:
    """`codes` are bytes here, of two items each."""
    for r in range(target.shape[0]):
        for g in range(scales.shape[1]):
            scale, offset = scales[r, g], offsets[r, g]
            for i in range(g * group // 2, (g + 1) * group // 2):
                code = codes[r, i]
                target[r, 2 * i] = (F32(code & U8(15)) - middle) * scale + offset
                target[r, 2 * i + 1] = (F32(code >> U8(4)) - middle) * scale + offset


def _floats_of_8(codes: Any, middle: Any, scales: Any, offsets: Any, group: Any, target: Any) -> None:
    for r in range(target.shape[0]):
        for g in range(scales.shape[1]):
            scale, offset = scales[r, g], offsets[r, g]
            for i in range(g * group, (g + 1) * group):
                target[r, i] = (F32(codes[r, i]) - middle) * scale + offset


fours, fives, eights = _compiled(_fours), _compiled(_fives), _compiled(_eights)
fours_k, fives_k, sixes_k = _compiled(_fours_k), _compiled(_fives_k), _compiled(_sixes_k)
floats_of_4, floats_of_8 = _compiled(_floats_of_4), _compiled(_floats_of_8)

_HALVES = {"q4_0": (9, 1), "q4_1": (10, 2), "q5_0": (11, 3), "q5_1": (12, 4)}
"""Of a block of 32 items, and where their lowest four bits begin."""


_HALVES_K = {"q4_k": (72, 0), "q5_k": (88, 0), "q6_k": (105, 104)}
"""Of a block of 256 items, and where the factor of its scales is; that of its offsets is behind it."""


def decode(layout: str, lines: Any, width: int) -> dict[str, Any]:
    """What there is of rows of `width` items, by what it fills: values as words of 64 bits, scales and factors as the
    bits that they are kept as, offsets as float32. `lines` are the rows, uint16."""
    count = len(lines)
    codes = np.empty((count, width // (16 if layout.startswith("q4") else 8)), U64)
    if layout in _HALVES:
        halves, begin = _HALVES[layout]
        blocks = lines.reshape(count, -1, halves)
        if layout.startswith("q4"):
            fours(lines, halves, begin, codes)
        else:
            fives(lines, halves, begin, MIDDLE if layout == "q5_1" else U64(112) * ONES, codes)  # 128 - 16
        found = {"values": codes, "scales": np.ascontiguousarray(blocks[:, :, 0])}
        return found if layout.endswith("0") else found | {"offsets": blocks[:, :, 1].view(np.float16).astype(F32)}
    if layout == "q8_0":
        eights(lines, codes)
        return {"values": codes, "scales": np.ascontiguousarray(lines.reshape(count, -1, 17)[:, :, 0])}
    halves, place = _HALVES_K[layout]
    blocks = lines.reshape(count, -1, halves)
    scales = np.empty((count, width // (16 if layout == "q6_k" else 32)), U8)
    found = {"values": codes, "scales": scales, "factors": np.ascontiguousarray(blocks[:, :, place])}
    if layout == "q6_k":
        sixes_k(lines, codes, scales)
        return found
    lows = np.empty_like(scales)
    (fours_k if layout == "q4_k" else fives_k)(lines, codes, scales, lows)
    return found | {"zeros": lows, "lows": np.ascontiguousarray(blocks[:, :, place + 1])}


def floats(layout: str, lines: Any, width: int) -> Any:
    """The rows themselves, float32."""
    found = decode(layout, lines, width)
    codes, scales = found["values"], found["scales"]
    offsets = found.get("offsets", np.full(scales.shape, -0.0, F32))  # that which changes no number, nor its sign
    if layout in _HALVES_K:
        scales = _times(scales.view(np.int8) if layout == "q6_k" else scales, found["factors"])
        offsets = -_times(found["zeros"], found["lows"]) if "lows" in found else np.full(scales.shape, -0.0, F32)
    else:
        scales = scales.view(np.float16).astype(F32)
    rows, is_whole = np.empty((len(lines), width), F32), not layout.endswith("_1") and layout not in ("q4_k", "q5_k")
    group = width // scales.shape[1]
    if layout.startswith("q4"):
        floats_of_4(codes.view(U8), F32(8 if is_whole else 0), scales, offsets, group, rows)
    else:
        floats_of_8(codes.view(U8), F32(128), scales, offsets, group, rows)
    return rows


def _times(codes: Any, factors: Any) -> Any:
    """Whole numbers times their factors, float16."""
    each = codes.shape[1] // factors.shape[1]
    return codes.astype(F32) * np.repeat(factors.view(np.float16).astype(F32), each, axis=1)
