"""Codes that lie along N, or in words that K crosses, to words along K. Imported only where there are such weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from flexgen_lite.workers.loader.cast_kernels import _compiled

U32, U64 = np.uint32, np.uint64
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


_turned, _turned_4 = _compiled(_turn_words), _compiled(_turn_4)
turn_awq_words = _compiled(_turn_awq_words)


def turn_words(words: Any, bits: int, rows: Any) -> None:
    """Words of GPTQ `[K * bits / 32, N]` to rows of words along K."""
    if bits in (4, 8):  # words of 64 bits as they are
        _turned_4(words, rows)
    else:
        _turned(words, bits, rows)
