"""Products on tile registers (AMX): what a processor that has them computes instead of product_tiles.py's.

A tile register holds 16 rows of 64 bytes. Rows of x lie in *row tiles*, `[K / 32][16][32]` each; a block of weights is
`[K / 2][COLUMNS][2]`, as everywhere here, of which 16 steps by 16 columns are a tile. A *tile step* is 32 items of K.
Sums are `[row][COLUMNS]` of float32.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from flexgen_lite.workers import simd
from flexgen_lite.workers.compute.product_tiles import COLUMNS, LINE, STEP, prefetch_line
from flexgen_lite.workers.simd import I64

ROWS = 16  # of a tile
TILE = ROWS * 64  # bytes
_SUMS_ROW = 4 * COLUMNS  # bytes
STEPS = 16  # of a tile step
LINES = STEPS * STEP // LINE  # of a block's tile step
_I8 = ir.IntType(8)

_ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA, _SYS_ARCH_PRCTL = 0x1023, 18, 158

_config = np.zeros(64, np.uint8)  # palette 1; 8 tiles of 16 rows, 64 bytes each
_config[0] = 1
_config[16:32].view(np.uint16)[:] = 64
_config[48:56] = ROWS
CONFIG = int(_config.ctypes.data)


@cache
def allowed() -> bool:
    """Whether this processor has tiles for bfloat16, and the system lets this process use them."""
    if not simd.TILES or platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    return bool(ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0)


def _call(builder: Any, name: str, *arguments: Any) -> None:
    simd.call(builder, f"llvm.x86.{name}", ir.VoidType(), list(arguments))


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _I8.as_pointer())


def _forward(builder: Any, address: Any, offset: int) -> Any:
    return builder.add(address, address.type(offset)) if offset else address


def product_tile(row_tiles: int, column_tiles: int) -> Any:
    """tile(words, stride, weights, steps, sums, keep, ahead, lines): sums = keep * sums + rows . weights.

    Of `row_tiles` row tiles, `stride` bytes apart, and so many tiles of columns. `keep` is 0 or 1. Meanwhile `lines`
    cache lines per tile step are prefetched from `ahead` on.
    """
    count = row_tiles * column_tiles
    assert count + row_tiles + 2 <= 8

    def build(b: Any, words: Any, stride: Any, weights: Any, steps: Any, sums: Any, keep: Any, ahead: Any, lines: Any) -> None:  # fmt: skip # noqa: E501
        number = [_I8(i) for i in range(8)]
        row_numbers, column_numbers = number[count : count + row_tiles], number[6:8]
        places = [_forward(b, sums, i * ROWS * _SUMS_ROW + j * 64) for i in range(row_tiles) for j in range(column_tiles)]  # fmt: skip # noqa: E501
        with b.if_else(b.icmp_unsigned("!=", keep, keep.type(0))) as (kept, new):
            with kept:
                for i, place in enumerate(places):
                    _call(b, "tileloadd64", number[i], _pointer(b, place), I64(_SUMS_ROW))
            with new:
                for i in range(count):
                    _call(b, "tilezero", number[i])
        with cgutils.for_range(b, steps) as loop:
            weights_at = b.add(weights, b.mul(loop.index, steps.type(STEPS * STEP)))
            words_at = b.add(words, b.mul(loop.index, steps.type(TILE)))
            for row in row_numbers:
                _call(b, "tileloadd64", row, _pointer(b, words_at), I64(64))
                words_at = b.add(words_at, stride)
            for j in range(column_tiles):
                column = column_numbers[j % 2]
                _call(b, "tileloadd64", column, _pointer(b, _forward(b, weights_at, j * 64)), I64(4 * COLUMNS))
                for i, row in enumerate(row_numbers):
                    _call(b, "tdpbf16ps", number[i * column_tiles + j], row, column)
            ahead_at = b.add(ahead, b.mul(loop.index, b.mul(lines, lines.type(LINE))))
            with cgutils.for_range(b, lines) as line:
                prefetch_line(b, b.add(ahead_at, b.mul(line.index, lines.type(LINE))))
        for i, place in enumerate(places):
            _call(b, "tilestored64", number[i], _pointer(b, place), I64(_SUMS_ROW))

    return simd.operation(build, types.void, *[types.int64] * 8)


configure = simd.operation(lambda b, at: _call(b, "ldtilecfg", _pointer(b, at)), types.void, types.int64)
release = simd.operation(lambda b: _call(b, "tilerelease"), types.void)
