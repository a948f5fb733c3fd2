"""Codes that lie along N, or in words that K crosses, to where they belong, or to words along K, which have 16 codes of
4 bits or 8 of 8, the first lowest. Imported only where there are such weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from flexgen_lite.workers.loader.cast_kernels import _compiled
from flexgen_lite.workers.loader.order_kernels import (
    LOW_16,
    LOW_32,
    SIGNS,
    U32,
    U64,
    _apart_4,
    _apart_8,
    _spread_halves,
    _swapped,
)  # fmt: skip

COLUMNS = 64  # that are worked on at once
STRETCH = 512  # columns of a line that are gone through before the next: several lines of the cache, few pages
FOUR, EIGHT, SIGNED, FOUR_BYTES, EIGHT_BYTES = range(5)
"""Orders of words in memory: for bfloat16 of 4 bits, of 8 as they are, of 8 with a sign; for int8 of 4 and 8 bits."""

_inlined: Any = njit(inline="always")


@_inlined  # type: ignore[untyped-decorator]
def _part(x: Any, size: Any, lanes: Any, mask: Any) -> Any:
    """The two fields of `size` bits in each lane of twice `lanes` bits into lanes of their own."""
    return (x & mask) | (((x >> size) & mask) << lanes)


@_inlined  # type: ignore[untyped-decorator]
def _spread(x: Any, bits: Any, masks: Any) -> Any:
    """The lowest fields of `bits` bits, each in 4 bits, or 8 where it has more; `masks` are those of `_masks`."""
    if bits <= 4:
        x = _part(x, U64(8 * bits), U64(32), masks[0])
        x = _part(x, U64(4 * bits), U64(16), masks[1])
        x = _part(x, U64(2 * bits), U64(8), masks[2])
        return _part(x, U64(bits), U64(4), masks[3])
    x = _part(x, U64(4 * bits), U64(32), masks[0])
    x = _part(x, U64(2 * bits), U64(16), masks[1])
    return _part(x, U64(bits), U64(8), masks[2])


def _masks(bits: int) -> Any:
    wide = 4 if bits <= 4 else 8
    lanes = [lane for lane in (32, 16, 8, 4) if lane >= wide]
    found = [sum(((1 << lane // wide * bits) - 1) << place for place in range(0, 64, 2 * lane)) for lane in lanes]
    return np.array(found, np.uint64)


def _widen_rows(words: Any, bits: Any, masks: Any, more: Any, rows: Any) -> None:
    total = 64 // (4 if bits <= 4 else 8) * bits
    for r in range(rows.shape[0]):
        row = words[r]
        for s in range(rows.shape[1]):
            at, shift = s * total >> 5, s * total & 31
            x = U64(row[at]) >> U64(shift)
            if shift + total > 32:
                x |= U64(row[at + 1]) << U64(32 - shift)
            if shift + total > 64:
                x |= U64(row[at + 2]) << U64(64 - shift)
            rows[r, s] = _spread(x, bits, masks) + more


def _widen_sparse(words: Any, bits: Any, in_word: Any, more: Any, rows: Any) -> None:
    wide = 4 if bits <= 4 else 8
    items, mask = 64 // wide, U64((1 << bits) - 1)
    for r in range(rows.shape[0]):
        row, at, left = words[r], 0, 0
        for s in range(rows.shape[1]):
            word = U64(0)
            for i in range(items):
                word |= ((U64(row[at]) >> U64(left * bits)) & mask) << U64(i * wide)
                left += 1
                if left == in_word:
                    at, left = at + 1, 0
            rows[r, s] = word + more


def _sort_items(rows: Any, places: Any, shifts: Any, bits: Any, found: Any) -> None:
    """Item p of `found` is that at bit `shifts[p]` of word `places[p]` of a row."""
    items, mask = 64 // bits, U64((1 << bits) - 1)
    for r in range(rows.shape[0]):
        row, p = rows[r], U64(0)
        for s in range(rows.shape[1]):
            word = U64(0)
            for i in range(items):
                word |= ((row[places[p]] >> shifts[p]) & mask) << U64(i * bits)
                p += U64(1)
            found[r, s] = word


def _fields(words: Any, bits: Any, found: Any) -> None:
    """`found[f, r]` is field f of `words[r]`."""
    mask = U32((1 << bits) - 1)
    for r in range(words.shape[0]):
        for f in range(found.shape[0]):
            at, shift = f * bits >> 5, f * bits & 31
            code = words[r, at] >> U32(shift)
            if shift + bits > 32:
                code |= words[r, at + 1] << U32(32 - shift)
            found[f, r] = code & mask


def _swap_halves(words: Any, found: Any) -> None:
    low = U64(0x0F0F0F0F0F0F0F0F)
    for r in range(words.shape[0]):
        for s in range(words.shape[1]):
            x = words[r, s]
            found[r, s] = ((x & low) << U64(4)) | ((x >> U64(4)) & low)


@_inlined  # type: ignore[untyped-decorator]
def _codes_of_columns(words: Any, bits: Any, masks: Any, s: Any, n0: Any, n1: Any, line: Any) -> None:
    """Word number `s` along K of columns n0 to n1, whose bits are `words[:, n]`."""
    total = 64 // (8 if bits == 8 else 4) * bits
    at, shift = s * total >> 5, U64(s * total & 31)
    low = words[at, n0:n1]
    if total == 64:
        high = words[at + 1, n0:n1]
        for c in range(n1 - n0):
            line[c] = U64(low[c]) | (U64(high[c]) << U64(32))
    elif (s * total & 31) + total <= 32:
        for c in range(n1 - n0):
            line[c] = _spread(U64(low[c]) >> shift, bits, masks)
    else:
        high = words[at + 1, n0:n1]
        for c in range(n1 - n0):
            line[c] = _spread((U64(low[c]) | (U64(high[c]) << U64(32))) >> shift, bits, masks)


@_inlined  # type: ignore[untyped-decorator]
def _exchanged(a: Any, b: Any, shift: Any, mask: Any) -> Any:
    """What is above in the first, by `shift` bits, for what is below in the second."""
    changed = ((a >> shift) ^ b) & mask
    return a ^ (changed << shift), b ^ changed


@_inlined  # type: ignore[untyped-decorator]
def _codes_of_awq(words: Any, s: Any, c0: Any, c1: Any, buffer: Any, line: Any) -> None:
    """The same of columns 8 * c0 to 8 * c1: `words[k, c]` have half bytes of eight columns, the even ones below. Eight
    words with eight half bytes each are turned, twice at a time."""
    k, low, middle, high = 16 * s, U64(0x0F0F0F0F0F0F0F0F), U64(0x00FF00FF00FF00FF), U64(0x0000FFFF0000FFFF)
    for c in range(c1 - c0):
        x = c0 + c
        v0 = U64(words[k, x]) | (U64(words[k + 8, x]) << U64(32))
        v1 = U64(words[k + 1, x]) | (U64(words[k + 9, x]) << U64(32))
        v2 = U64(words[k + 2, x]) | (U64(words[k + 10, x]) << U64(32))
        v3 = U64(words[k + 3, x]) | (U64(words[k + 11, x]) << U64(32))
        v4 = U64(words[k + 4, x]) | (U64(words[k + 12, x]) << U64(32))
        v5 = U64(words[k + 5, x]) | (U64(words[k + 13, x]) << U64(32))
        v6 = U64(words[k + 6, x]) | (U64(words[k + 14, x]) << U64(32))
        v7 = U64(words[k + 7, x]) | (U64(words[k + 15, x]) << U64(32))
        v0, v4 = _exchanged(v0, v4, U64(16), high)
        v1, v5 = _exchanged(v1, v5, U64(16), high)
        v2, v6 = _exchanged(v2, v6, U64(16), high)
        v3, v7 = _exchanged(v3, v7, U64(16), high)
        v0, v2 = _exchanged(v0, v2, U64(8), middle)
        v1, v3 = _exchanged(v1, v3, U64(8), middle)
        v4, v6 = _exchanged(v4, v6, U64(8), middle)
        v5, v7 = _exchanged(v5, v7, U64(8), middle)
        v0, v1 = _exchanged(v0, v1, U64(4), low)
        v2, v3 = _exchanged(v2, v3, U64(4), low)
        v4, v5 = _exchanged(v4, v5, U64(4), low)
        v6, v7 = _exchanged(v6, v7, U64(4), low)
        buffer[c], buffer[8 + c], buffer[16 + c], buffer[24 + c] = v0, v4, v1, v5
        buffer[32 + c], buffer[40 + c], buffer[48 + c], buffer[56 + c] = v2, v6, v3, v7
    for c in range(c1 - c0):
        for j in range(8):
            line[8 * c + j] = buffer[8 * j + c]


@_inlined  # type: ignore[untyped-decorator]
def _store(line: Any, form: Any, target: Any) -> None:
    """A word along K of neighbouring columns, from the beginning of `target` on."""
    if form == FOUR:
        for c in range(line.size):
            target[c] = _apart_4(line[c])
    elif form == EIGHT:
        for c in range(line.size):
            target[c] = _apart_8(line[c])
    elif form == SIGNED:
        for c in range(line.size):
            target[c] = _apart_8(line[c] ^ SIGNS)
    elif form == FOUR_BYTES:
        for c in range(line.size):
            x = line[c]
            both = _spread_halves(x & LOW_16) | (_spread_halves((x >> U64(16)) & LOW_16) << U64(4))
            target[c] = both & LOW_32
            target[c + COLUMNS] = both >> U64(32)
    else:
        for c in range(line.size):
            target[c] = line[c] & LOW_32
            target[c + COLUMNS] = line[c] >> U64(32)


def _put_words(words: Any, bits: Any, masks: Any, form: Any, skipped: Any, places: Any, target: Any) -> None:
    """Columns from `skipped` on; the words of the first go to `places[0]` on, `COLUMNS` apart, and so on.

    Args:
        bits: of a code; 0: they are AWQ's.
    """
    line, buffer, ends = np.empty(COLUMNS, np.uint64), np.empty(COLUMNS, np.uint64), np.empty(places.size, np.int64)
    for n in range(places.size - 1, -1, -1):  # where neighbours end
        ends[n] = ends[n + 1] if n + 1 < places.size and places[n + 1] == places[n] + 1 else n + 1
    steps = words.shape[0] // 16 if bits == 0 else words.shape[0] * 32 // bits // (8 if bits == 8 else 16)
    apart = COLUMNS * (2 if form >= FOUR_BYTES else 1)
    last = skipped + places.size
    for first in range(skipped // COLUMNS * COLUMNS, last, STRETCH):
        for s in range(steps):
            for n0 in range(first, min(first + STRETCH, last), COLUMNS):
                n1 = min(n0 + COLUMNS, last)
                if bits == 0:
                    _codes_of_awq(words, s, n0 // 8, (n1 + 7) // 8, buffer, line)
                else:
                    _codes_of_columns(words, bits, masks, s, n0, n1, line)
                n = max(n0, skipped)
                while n < n1:
                    end = min(ends[n - skipped] + skipped, n1)
                    _store(line[n - n0 : end - n0], form, target[places[n - skipped] + s * apart :])
                    n = end


def _scatter_words(words: Any, bits: Any, sign: Any, steps: Any, shifts: Any, places: Any, target: Any) -> None:
    """Item k of column n, whose bits are `words[:, n]`, goes to the bits from `shifts[k]` on of `target[places[n] +
    steps[k]]`, with the bits of `sign` changed; all others stay. Columns that are neighbours there go together."""
    mask, whole = U32((1 << bits) - 1), U64(15 if bits <= 4 else 255)
    n0 = 0
    while n0 < places.size:
        n1 = n0 + 1
        while n1 < min(n0 + COLUMNS, places.size) and places[n1] == places[n1 - 1] + 1:
            n1 += 1
        count, column, begin = U64(n1 - n0), U64(n0), U64(places[n0])
        for k in range(steps.size):
            at, shift = U64(k * bits >> 5), U32(k * bits & 31)
            left, to = U64(shifts[k]), begin + U64(steps[k])
            keep = ~(whole << left)
            if (k * bits & 31) + bits > 32:
                for c in range(count):
                    code = (words[at, column + c] >> shift) | (words[at + U64(1), column + c] << (U32(32) - shift))
                    target[to + c] = (U64(target[to + c]) & keep) | (U64((code & mask) ^ U32(sign)) << left)
            else:
                for c in range(count):
                    code = (words[at, column + c] >> shift) & mask
                    target[to + c] = (U64(target[to + c]) & keep) | (U64(code ^ U32(sign)) << left)
        n0 = n1


def _part_stretches(words: Any, rows: Any) -> None:
    """A line has, of 64 items at a time, those of four rows; of 32 items, number 8 a + 4 b + c is item 8 c + 2 a + b.
    That is the bits of the number turned by two places: bits of neighbours change places four times."""
    for r in range(words.shape[0]):
        for row in range(4):
            for s in range(rows.shape[1] // 2):
                at = s // 2 * 16 + row * 4 + s % 2 * 2
                low, high = words[r, at], words[r, at + 1]
                low = _swapped(low, U64(12), U64(0x0000F0F00000F0F0))
                high = _swapped(high, U64(12), U64(0x0000F0F00000F0F0))
                low = _swapped(low, U64(24), U64(0x00000000FF00FF00))
                high = _swapped(high, U64(24), U64(0x00000000FF00FF00))
                low, high = _exchanged(low, high, U64(16), U64(0x0000FFFF0000FFFF))
                low, high = _exchanged(low, high, U64(32), LOW_32)
                rows[4 * r + row, 2 * s], rows[4 * r + row, 2 * s + 1] = low, high


swap_halves, part_stretches, fields = _compiled(_swap_halves), _compiled(_part_stretches), _compiled(_fields)
scatter_words, _put = _compiled(_scatter_words), _compiled(_put_words)
_widened, _widened_sparse, _sorted = _compiled(_widen_rows), _compiled(_widen_sparse), _compiled(_sort_items)


def put_words(words: Any, bits: int, form: int, skipped: int, places: Any, target: Any) -> None:
    """Words of GPTQ `[K * bits / 32, N]`, or AWQ `[K, N / 8]` where `bits` is 0: see `_put_words`."""
    _put(words, bits, _masks(bits or 4), form, skipped, places, target)


def widen_stream(words: Any, bits: int, in_word: int, more: int, rows: Any) -> None:
    """Rows of codes, of which a word has `in_word`, or 0: what does not fit goes on in the next; to each is added
    `more`."""
    wide = 4 if bits <= 4 else 8
    everywhere = np.uint64(sum(more << place for place in range(0, 64, wide)))
    if in_word:
        _widened_sparse(words, bits, in_word, everywhere, rows)
    else:
        _widened(words, bits, _masks(bits), everywhere, rows)


def sort_items(rows: Any, order: Any, bits: int, found: Any) -> None:
    """Item p of `found` is item `order[p]` of a row; a word has 64 / `bits`."""
    each = 64 // bits
    _sorted(rows, (order // each).astype(np.uint64), (order % each * bits).astype(np.uint64), bits, found)
