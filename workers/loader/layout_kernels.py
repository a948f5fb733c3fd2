"""Codes that lie along N, or in words that K crosses, to words along K. Imported only where there are such weights."""

from __future__ import annotations

from typing import Any

from flexgen_lite.workers.loader.cast_kernels import _compiled
from flexgen_lite.workers.loader.order_kernels import U32, U64, _swapped

COLUMNS = 64  # that are worked on at once: what is read of a line is a few lines of the cache


def _turn_words(words: Any, bits: Any, rows: Any) -> None:
    """`words[w, n]` are bits of column n; `rows[n]` codes of 8 bits where there are so many, else of 4."""
    wide = 8 if bits == 8 else 4
    items, mask = 64 // wide, U32((1 << bits) - 1)
    for n0 in range(0, rows.shape[0], COLUMNS):
        for s in range(rows.shape[1]):
            for n in range(n0, min(n0 + COLUMNS, rows.shape[0])):
                word = U64(0)
                for i in range(items):
                    bit = (s * items + i) * bits
                    at, shift = bit >> 5, bit & 31
                    code = words[at, n] >> U32(shift)
                    if shift + bits > 32:
                        code |= words[at + 1, n] << U32(32 - shift)
                    word |= U64(code & mask) << U64(i * wide)
                rows[n, s] = word


def _turn_4(words: Any, rows: Any) -> None:
    """The same of 4 bits: two words are one."""
    for n0 in range(0, rows.shape[0], COLUMNS):
        for s in range(rows.shape[1]):
            for n in range(n0, min(n0 + COLUMNS, rows.shape[0])):
                rows[n, s] = U64(words[2 * s, n]) | (U64(words[2 * s + 1, n]) << U64(32))


def _turn_awq_words(words: Any, rows: Any) -> None:
    """`words[k, c]` have columns 8 c to 8 c + 7, the even ones below."""
    for c0 in range(0, words.shape[1], 8):
        for s in range(rows.shape[1]):
            for c in range(c0, min(c0 + 8, words.shape[1])):
                for j in range(8):
                    shift = U32(4 * (j // 2 + 4 * (j % 2)))
                    word = U64(0)
                    for i in range(16):
                        word |= U64((words[16 * s + i, c] >> shift) & U32(15)) << U64(4 * i)
                    rows[8 * c + j, s] = word


def _widen_stream(words: Any, bits: Any, in_word: Any, more: Any, rows: Any) -> None:
    """Rows of codes, of which a word has `in_word`, or 0: what does not fit goes on in the next; to each is added
    `more`."""
    wide = 4 if bits <= 4 else 8
    items, mask = 64 // wide, U64((1 << bits) - 1)
    for r in range(rows.shape[0]):
        row = words[r]
        for s in range(rows.shape[1]):
            word = U64(0)
            for i in range(items):
                k = s * items + i
                bit = k * bits if in_word == 0 else k // in_word * 32 + k % in_word * bits
                at, shift = bit >> 5, bit & 31
                code = U64(row[at]) >> U64(shift)
                if shift + bits > 32:
                    code |= U64(row[at + 1]) << U64(32 - shift)
                word |= ((code & mask) + U64(more)) << U64(i * wide)
            rows[r, s] = word


def _sort_items(rows: Any, order: Any, bits: Any, found: Any) -> None:
    """Item p of `found` is item `order[p]` of a row; a word has 64 / `bits`."""
    items, mask = 64 // bits, U64((1 << bits) - 1)
    for r in range(rows.shape[0]):
        row = rows[r]
        for s in range(rows.shape[1]):
            word = U64(0)
            for i in range(items):
                k = order[s * items + i]
                word |= ((row[k // items] >> U64(k % items * bits)) & mask) << U64(i * bits)
            found[r, s] = word


def _scatter_words(words: Any, bits: Any, sign: Any, steps: Any, shifts: Any, places: Any, target: Any) -> None:
    """Item k of column n, as `_turn_words` has it, goes to the bits from `shifts[k]` on of `target[places[n] +
    steps[k]]`, with the bits of `sign` changed; all others stay. Columns that are neighbours there go together."""
    mask, whole = U32((1 << bits) - 1), U64(15 if bits <= 4 else 255)
    n0 = 0
    while n0 < places.size:
        n1 = n0 + 1
        while n1 < min(n0 + COLUMNS, places.size) and places[n1] == places[n1 - 1] + 1:
            n1 += 1
        for k in range(steps.size):
            bit = k * bits
            at, shift = bit >> 5, U32(bit & 31)
            begin = places[n0] + steps[k]
            to = target[begin : begin + n1 - n0]
            left = U64(shifts[k])
            keep = ~(whole << left)
            row = words[at, n0:n1]
            if (bit & 31) + bits > 32:
                rest = words[at + 1, n0:n1]
                for c in range(n1 - n0):
                    code = ((row[c] >> shift) | (rest[c] << (U32(32) - shift))) & mask
                    to[c] = (U64(to[c]) & keep) | (U64(code ^ U32(sign)) << left)
            else:
                for c in range(n1 - n0):
                    code = (row[c] >> shift) & mask
                    to[c] = (U64(to[c]) & keep) | (U64(code ^ U32(sign)) << left)
        n0 = n1


def _part_stretches(words: Any, rows: Any) -> None:
    """A line has, of 64 items at a time, those of four rows; of 32 items, number 8 a + 4 b + c is item 8 c + 2 a + b.
    That is the bits of the number turned by two places: bits of neighbours change places four times."""
    for r in range(words.shape[0]):
        for s in range(rows.shape[1] // 2):
            for row in range(4):
                at = s // 2 * 16 + row * 4 + s % 2 * 2
                low, high = words[r, at], words[r, at + 1]
                low = _swapped(low, U64(12), U64(0x0000F0F00000F0F0))
                high = _swapped(high, U64(12), U64(0x0000F0F00000F0F0))
                low = _swapped(low, U64(24), U64(0x00000000FF00FF00))
                high = _swapped(high, U64(24), U64(0x00000000FF00FF00))
                changed = ((low >> U64(16)) ^ high) & U64(0x0000FFFF0000FFFF)
                low, high = low ^ (changed << U64(16)), high ^ changed
                changed = ((low >> U64(32)) ^ high) & U64(0xFFFFFFFF)
                rows[4 * r + row, 2 * s], rows[4 * r + row, 2 * s + 1] = low ^ (changed << U64(32)), high ^ changed


widen_stream, sort_items = _compiled(_widen_stream), _compiled(_sort_items)
scatter_words, part_stretches = _compiled(_scatter_words), _compiled(_part_stretches)
_turned, _turned_4 = _compiled(_turn_words), _compiled(_turn_4)
turn_awq_words = _compiled(_turn_awq_words)


def turn_words(words: Any, bits: int, rows: Any) -> None:
    """Words of GPTQ `[K * bits / 32, N]` to rows of words along K."""
    if bits in (4, 8):  # words of 64 bits as they are
        _turned_4(words, rows)
    else:
        _turned(words, bits, rows)
