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

COLUMNS = 64
EIGHT = 8
U8, U32, U64 = np.uint8, np.uint32, np.uint64

_inlined: Any = njit(inline="always")


@_inlined  # type: ignore[untyped-decorator]
def _gathered(x: Any) -> Any:
    """The lower half of each 16 bits, one behind the other."""
    x = (x | (x >> U64(8))) & U64(0x0000FFFF0000FFFF)
    return (x | (x >> U64(16))) & U64(0xFFFFFFFF)


@_inlined  # type: ignore[untyped-decorator]
def _spread(x: Any) -> Any:
    """Undoes it."""
    x = (x | (x << U64(16))) & U64(0x0000FFFF0000FFFF)
    return (x | (x << U64(8))) & U64(0x00FF00FF00FF00FF)


@_inlined  # type: ignore[untyped-decorator]
def _gathered_halves(x: Any) -> Any:
    """The lower half of each byte, one behind the other."""
    return _gathered((x | (x >> U64(4))) & U64(0x00FF00FF00FF00FF))


@_inlined  # type: ignore[untyped-decorator]
def _spread_halves(x: Any) -> Any:
    x = _spread(x)
    return (x | (x << U64(4))) & U64(0x0F0F0F0F0F0F0F0F)


def _put_4(source: Any, places: Any, target: Any) -> None:
    low = U64(0x0F0F0F0F0F0F0F0F)
    for r0 in range(0, source.shape[0], EIGHT):
        for s0 in range(0, source.shape[1], EIGHT):
            for r in range(r0, min(r0 + EIGHT, source.shape[0])):
                for s in range(s0, min(s0 + EIGHT, source.shape[1])):
                    x = source[r, s]
                    even, odd = _gathered_halves(x & low), _gathered_halves((x >> U64(4)) & low)
                    target[places[r] + s * COLUMNS] = even | (odd << U64(32))


def _put_8(source: Any, places: Any, target: Any) -> None:
    low = U64(0x00FF00FF00FF00FF)
    for r0 in range(0, source.shape[0], EIGHT):
        for s0 in range(0, source.shape[1], EIGHT):
            for r in range(r0, min(r0 + EIGHT, source.shape[0])):
                for s in range(s0, min(s0 + EIGHT, source.shape[1])):
                    x = source[r, s] ^ U64(0x8080808080808080)
                    even, odd = _gathered(x & low), _gathered((x >> U64(8)) & low)
                    target[places[r] + s * COLUMNS] = even | (odd << U64(32))


def _put_4_bytes(source: Any, places: Any, target: Any) -> None:
    for r0 in range(0, source.shape[0], EIGHT):
        for s0 in range(0, source.shape[1], EIGHT):
            for r in range(r0, min(r0 + EIGHT, source.shape[0])):
                for s in range(s0, min(s0 + EIGHT, source.shape[1])):
                    x = U64(source[r, s])
                    low, high = _spread_halves(x & U64(0xFFFF)), _spread_halves(x >> U64(16))
                    target[places[r] + s * COLUMNS] = U32(low | (high << U64(4)))


def _put_items(source: Any, places: Any, target: Any) -> None:
    for r0 in range(0, source.shape[0], EIGHT):
        for s0 in range(0, source.shape[1], EIGHT):
            for r in range(r0, min(r0 + EIGHT, source.shape[0])):
                for s in range(s0, min(s0 + EIGHT, source.shape[1])):
                    target[places[r] + s * COLUMNS] = source[r, s]


def _put_zeros(source: Any, places: Any, target: Any, skipped: Any, bits: Any) -> None:
    """Row r is `bits` of the words of row (r + `skipped`) // (32 / `bits`)."""
    rows, mask = 32 // bits, U32((1 << bits) - 1)
    for r in range(places.size):
        line, part = (r + skipped) // rows, U32((r + skipped) % rows * bits)
        for s in range(source.shape[1]):
            target[places[r] + s * COLUMNS] = U8((source[line, s] >> part) & mask)


def _take_4(target: Any, places: Any, source: Any) -> None:
    for r0 in range(0, source.shape[0], EIGHT):
        for s0 in range(0, source.shape[1], EIGHT):
            for r in range(r0, min(r0 + EIGHT, source.shape[0])):
                for s in range(s0, min(s0 + EIGHT, source.shape[1])):
                    y = target[places[r] + s * COLUMNS]
                    even, odd = _spread_halves(y & U64(0xFFFFFFFF)), _spread_halves(y >> U64(32))
                    source[r, s] = even | (odd << U64(4))


def _take_8(target: Any, places: Any, source: Any) -> None:
    for r0 in range(0, source.shape[0], EIGHT):
        for s0 in range(0, source.shape[1], EIGHT):
            for r in range(r0, min(r0 + EIGHT, source.shape[0])):
                for s in range(s0, min(s0 + EIGHT, source.shape[1])):
                    y = target[places[r] + s * COLUMNS]
                    even, odd = _spread(y & U64(0xFFFFFFFF)), _spread(y >> U64(32))
                    source[r, s] = (even | (odd << U64(8))) ^ U64(0x8080808080808080)


put_4, put_8, put_4_bytes = _compiled(_put_4), _compiled(_put_8), _compiled(_put_4_bytes)
put_items, put_zeros = _compiled(_put_items), _compiled(_put_zeros)
take_4, take_8 = _compiled(_take_4), _compiled(_take_8)


def of_values(packing: Packing) -> tuple[type[np.unsignedinteger[Any]], Any]:
    """The kernel that puts values into the order of `packing`, and the words that it takes."""
    if packing.order == "bfloat16":
        return np.uint64, put_4 if packing.bits == 4 else put_8
    return np.uint32, put_4_bytes if packing.bits == 4 else put_items
