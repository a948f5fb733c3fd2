"""Weights as they are stored, into panels: the order in which the products want them.

A panel is a run of steps of a block of columns, `[step][COLUMNS]` words (see product_tiles.py). Weights that lie in
that order already, block by block, are their own panels.

Numba's disk cache watches product_kernels.py alone: touch that file after an edit here.
"""

from __future__ import annotations

from typing import Any

from numba import njit, types

from flexgen_lite.workers import simd
from flexgen_lite.workers.compute.prefill_packing import OPTIONS
from flexgen_lite.workers.compute.product_tiles import COLUMNS, ROW, STEP
from flexgen_lite.workers.simd import HALVES, LANES, WORDS

PACKED, ROWS, TRANSPOSED = 0, 1, 2
"""Storages of a bfloat16 weight `[N, K]`: blocks of columns as they are computed with; row by row; its transpose
`[K, N]` row by row."""

kernel: Any = njit(**OPTIONS)


def _turn(builder: Any, source: Any, stride: Any, target: Any) -> None:
    """LANES rows of LANES words, `stride` bytes apart, to `[word]` vectors of all rows, a step of a panel apart."""
    rows = []
    for _ in range(LANES):
        rows.append(simd.load_from(builder, source, WORDS))
        source = builder.add(source, stride)
    for i, vector in enumerate(simd.turned(builder, rows)):
        simd.store_to(builder, vector, builder.add(target, target.type(i * STEP)))


def _interleave(builder: Any, first: Any, second: Any, target: Any) -> None:
    """LANES items of one row of the transpose and of the next, to words."""
    low, high = (builder.zext(simd.load_from(builder, at, HALVES, align=2), WORDS) for at in (first, second))
    simd.store_to(builder, builder.or_(low, builder.shl(high, simd.same(16, WORDS))), target)


def _interleave_item(builder: Any, first: Any, second: Any, target: Any) -> None:
    low, high = (builder.zext(simd.load_from(builder, at, simd.I16, align=2), simd.I32) for at in (first, second))
    simd.store_to(builder, builder.or_(low, builder.shl(high, simd.I32(16))), target)


_turn_words = simd.operation(_turn, types.void, types.int64, types.int64, types.int64)
_interleave_rows = simd.operation(_interleave, types.void, *[types.int64] * 3)
_interleave_items = simd.operation(_interleave_item, types.void, *[types.int64] * 3)
_copy_line = simd.operation(
    lambda b, source, target: simd.store_to(b, simd.load_from(b, source, WORDS), target),
    types.void, types.int64, types.int64,
)  # fmt: skip


@kernel
def _panel_of_rows(weight, width, columns, block, start, stop, panel, line):  # type: ignore[no-untyped-def]
    """`line` has room for LANES vectors."""
    stride = 2 * width
    count = min(COLUMNS, columns - block * COLUMNS)
    source = weight + block * COLUMNS * stride
    for lane in range(0, COLUMNS, LANES):
        whole = lane + LANES <= count
        for step in range(start, stop, LANES):
            target = panel + (step - start) * STEP + 4 * lane
            if whole:
                _turn_words(source + lane * stride + 4 * step, stride, target)
            else:
                for i in range(LANES):
                    row = min(lane + i, count - 1)
                    _copy_line(source + row * stride + 4 * step, line + i * ROW)
                _turn_words(line, ROW, target)


@kernel
def _panel_of_transpose(weight, columns, block, start, stop, panel):  # type: ignore[no-untyped-def]
    stride = 2 * columns
    count = min(COLUMNS, columns - block * COLUMNS)
    for step in range(start, stop):
        first = weight + 2 * step * stride + 2 * block * COLUMNS
        target = panel + (step - start) * STEP
        lane = 0
        while lane + LANES <= count:
            _interleave_rows(first + 2 * lane, first + stride + 2 * lane, target + 4 * lane)
            lane += LANES
        while lane < count:
            _interleave_items(first + 2 * lane, first + stride + 2 * lane, target + 4 * lane)
            lane += 1


@kernel
def panel_of(call, weight, block, start, stop, panel, line):  # type: ignore[no-untyped-def]
    """The address of steps `start` to `stop` of a block of `weight` as a panel: in the weight itself, or in `panel`.

    What columns behind the last hold is anything.
    """
    if call.storage == PACKED:
        return weight + (block * call.steps + start) * STEP
    if call.storage == ROWS:
        _panel_of_rows(weight, 2 * call.steps, call.columns, block, start, stop, panel, line)
    else:
        _panel_of_transpose(weight, call.columns, block, start, stop, panel)
    return panel
