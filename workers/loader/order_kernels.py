"""Values, scales and zeros from rows, as compressed-tensors has them, into the blocks of packing.py, and back.

In a row, items of 4 bits lie one behind the other, the lowest half of a byte first. Arrays: `source[r, s]` goes to
`target[places[r] + COLUMNS * s]`. Rows are gone through EIGHT at a time, eight words of each: a line of the cache is
used at once that is read, or that is written where rows are neighbours.

Imported only where there are such weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from flexgen_lite.model.packing import Packing
from flexgen_lite.workers.loader.cast_kernels import _compiled
from flexgen_lite.workers.loader.weight_cast import Bits

EIGHT = 8
U8, U32, U64 = np.uint8, np.uint32, np.uint64
COLUMNS = U64(64)  # all that addresses are made of is without a sign: numba would look for negative ones
SIGNS = U64(0x8080808080808080)
LOW_16, LOW_32 = U64(0x0000FFFF0000FFFF), U64(0xFFFFFFFF)

_inlined: Any = njit(inline="always")


@_inlined  # type: ignore[untyped-decorator]
def _swapped(x: Any, distance: Any, lower: Any) -> Any:
    """With the bits of `lower` and those `distance` above them in each other's places."""
    changed = (x ^ (x >> distance)) & lower
    return x ^ changed ^ (changed << distance)


@_inlined  # type: ignore[untyped-decorator]
def _apart_8(x: Any) -> Any:
    """The even bytes below, the odd ones above."""
    return _swapped(_swapped(x, U64(8), U64(0x0000FF000000FF00)), U64(16), U64(0x00000000FFFF0000))


@_inlined  # type: ignore[untyped-decorator]
def _together_8(x: Any) -> Any:
    """Undoes it."""
    return _swapped(_swapped(x, U64(16), U64(0x00000000FFFF0000)), U64(8), U64(0x0000FF000000FF00))


@_inlined  # type: ignore[untyped-decorator]
def _apart_4(x: Any) -> Any:
    """The even halves of bytes below, the odd ones above."""
    return _apart_8(_swapped(x, U64(4), U64(0x00F000F000F000F0)))


@_inlined  # type: ignore[untyped-decorator]
def _together_4(x: Any) -> Any:
    return _swapped(_together_8(x), U64(4), U64(0x00F000F000F000F0))


@_inlined  # type: ignore[untyped-decorator]
def _spread_halves(x: Any) -> Any:
    """Each half byte of the lower half of 32 bits in a byte of its own."""
    x = (x | (x << U64(8))) & U64(0x00FF00FF00FF00FF)
    return (x | (x << U64(4))) & U64(0x0F0F0F0F0F0F0F0F)


def _put_4(source: Any, places: Any, target: Any) -> None:
    for r0 in range(0, source.shape[0], EIGHT):
        for s0 in range(0, source.shape[1], EIGHT):
            for r in range(r0, min(r0 + EIGHT, source.shape[0])):
                row, at = source[r], U64(places[r]) + U64(s0) * COLUMNS
                for s in range(U64(s0), U64(min(s0 + EIGHT, source.shape[1]))):
                    target[at] = _apart_4(row[s])
                    at += COLUMNS


def _put_8(source: Any, places: Any, target: Any) -> None:
    _put_8_with(source, places, target, SIGNS)


def _put_8_as_they_are(source: Any, places: Any, target: Any) -> None:
    _put_8_with(source, places, target, U64(0))


@_inlined  # type: ignore[untyped-decorator]
def _put_8_with(source: Any, places: Any, target: Any, signs: Any) -> None:
    for r0 in range(0, source.shape[0], EIGHT):
        for s0 in range(0, source.shape[1], EIGHT):
            for r in range(r0, min(r0 + EIGHT, source.shape[0])):
                row, at = source[r], U64(places[r]) + U64(s0) * COLUMNS
                for s in range(U64(s0), U64(min(s0 + EIGHT, source.shape[1]))):
                    target[at] = _apart_8(row[s] ^ signs)
                    at += COLUMNS


def _put_4_bytes(source: Any, places: Any, target: Any) -> None:
    """`source` has two words of 32 bits in one."""
    for r0 in range(0, source.shape[0], EIGHT):
        for s0 in range(0, source.shape[1], EIGHT):
            for r in range(r0, min(r0 + EIGHT, source.shape[0])):
                row, at = source[r], U64(places[r]) + U64(2 * s0) * COLUMNS
                for s in range(U64(s0), U64(min(s0 + EIGHT, source.shape[1]))):
                    x = row[s]
                    both = _spread_halves(x & LOW_16) | (_spread_halves((x >> U64(16)) & LOW_16) << U64(4))
                    target[at] = U32(both & LOW_32)
                    target[at + COLUMNS] = U32(both >> U64(32))
                    at += COLUMNS + COLUMNS


def _put_items(source: Any, places: Any, target: Any) -> None:
    for r0 in range(0, source.shape[0], EIGHT):
        for s0 in range(0, source.shape[1], EIGHT):
            for r in range(r0, min(r0 + EIGHT, source.shape[0])):
                row, at = source[r], U64(places[r]) + U64(s0) * COLUMNS
                for s in range(U64(s0), U64(min(s0 + EIGHT, source.shape[1]))):
                    target[at] = row[s]
                    at += COLUMNS


def _take_4(target: Any, places: Any, source: Any) -> None:
    for r0 in range(0, source.shape[0], EIGHT):
        for s0 in range(0, source.shape[1], EIGHT):
            for r in range(r0, min(r0 + EIGHT, source.shape[0])):
                row, at = source[r], U64(places[r]) + U64(s0) * COLUMNS
                for s in range(U64(s0), U64(min(s0 + EIGHT, source.shape[1]))):
                    row[s] = _together_4(target[at])
                    at += COLUMNS


def _take_8(target: Any, places: Any, source: Any) -> None:
    for r0 in range(0, source.shape[0], EIGHT):
        for s0 in range(0, source.shape[1], EIGHT):
            for r in range(r0, min(r0 + EIGHT, source.shape[0])):
                row, at = source[r], U64(places[r]) + U64(s0) * COLUMNS
                for s in range(U64(s0), U64(min(s0 + EIGHT, source.shape[1]))):
                    row[s] = _together_8(target[at]) ^ SIGNS
                    at += COLUMNS


put_4, put_8, put_4_bytes = _compiled(_put_4), _compiled(_put_8), _compiled(_put_4_bytes)
put_8_as_they_are, put_items = _compiled(_put_8_as_they_are), _compiled(_put_items)
take_4, take_8 = _compiled(_take_4), _compiled(_take_8)


def _put_8_bytes(source: Any, places: Any, target: Any) -> None:
    put_items(source.view(np.uint32), places, target)


def item_places(packing: Packing, items: Bits) -> tuple[Bits, Bits, type[np.unsignedinteger[Any]]]:
    """Of items of K: the words that they are in, counted in a column, at which bit each begins, and the words' type."""
    if packing.order == "bfloat16":
        each = 64 // packing.bits
        shifts = items % 2 * 32 + items % each // 2 * packing.bits
        return items // each, shifts, np.uint64
    each = 32 // packing.bits
    return items // each, items % 4 * 8 + items % each // 4 * 4, np.uint32


def form_of(packing: Packing) -> tuple[int, type[np.unsignedinteger[Any]]]:
    """The order of words in memory, one of layout_kernels.py's, and the words' type."""
    if packing.order == "bfloat16":
        return (0 if packing.bits == 4 else 1 + (packing.kind == "int")), np.uint64
    return (3 if packing.bits == 4 else 4), np.uint32


def of_values(packing: Packing) -> tuple[Any, type[np.unsignedinteger[Any]]]:
    """The kernel that puts words of 64 bits into the order of `packing`, and the words that it puts."""
    if packing.order == "bfloat16":
        if packing.bits == 4:
            return put_4, np.uint64
        return (put_8 if packing.kind == "int" else put_8_as_they_are), np.uint64
    return (put_4_bytes, np.uint32) if packing.bits == 4 else (_put_8_bytes, np.uint32)
