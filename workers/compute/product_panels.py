"""Weights as they are stored, into panels: the order in which the products want them.

A panel is a run of steps of a block of columns, `[step][COLUMNS]` words (see product_tiles.py). Weights that lie in
that order already, block by block, are their own panels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types

from flexgen_lite.workers import simd
from flexgen_lite.workers.compute import product_unpack as unpack
from flexgen_lite.workers.compute.prefill_packing import OPTIONS
from flexgen_lite.workers.compute.product_tiles import COLUMNS, ROW, STEP
from flexgen_lite.workers.compute.scale_loads import at_place, factor_place, scale_bytes
from flexgen_lite.workers.simd import HALVES, LANES, WORDS

PACKED, ROWS, TRANSPOSED, INT8, INT4, BYTES8, BYTES4, E4M3 = range(8)
"""Storages of a weight `[N, K]`: bfloat16 in blocks of columns as they are computed with; row by row; its transpose
`[K, N]` row by row; 8 and 4 bits as in packing.py, for bfloat16, and for int8; 8 bits in floating point."""
TO_HALVES, OF_127, SUBTRACTED, ADDED = range(1, 5)
FINISHES = {"": 0, "float16": TO_HALVES, "127": OF_127}
"""How products of values and scales are finished: as Packing says, or not at all, but the zero is subtracted first, or
the offset added to what is rounded to float32."""
STEP_BYTES = {
    PACKED: STEP,
    INT8: STEP // 2,
    INT4: STEP // 4,
    BYTES8: STEP // 2,
    BYTES4: STEP // 4,
    E4M3: STEP // 2,
}
"""Of storages that are blocks of columns."""

kernel: Any = njit(**OPTIONS)


def _interleave(builder: Any, first: Any, second: Any, target: Any) -> None:
    """LANES items of one row of the transpose and of the next, to words."""
    low, high = (builder.zext(simd.load_from(builder, at, HALVES, align=2), WORDS) for at in (first, second))
    simd.store_to(builder, builder.or_(low, builder.shl(high, simd.same(16, WORDS))), target)


def _interleave_item(builder: Any, first: Any, second: Any, target: Any) -> None:
    low, high = (builder.zext(simd.load_from(builder, at, simd.I16, align=2), simd.I32) for at in (first, second))
    simd.store_to(builder, builder.or_(low, builder.shl(high, simd.I32(16))), target)


_turn_words = simd.operation(
    lambda b, source, stride, to: simd.turn(b, source, stride, to, STEP), types.void, *[types.int64] * 3
)
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


if simd.PAIRS:
    _unpack_4, _unpack_8, _unpack_e4m3 = unpack.unpack_4, unpack.unpack_8, unpack.unpack_e4m3
    _finish_4, _finish_8, _finish_e4m3 = unpack.finish_4, unpack.finish_8, unpack.finish_e4m3
else:

    @kernel
    def _unpack_4(values, scales, table, runs, panel, ahead):  # type: ignore[no-untyped-def]
        pass

    @kernel
    def _finish_4(values, scales, table, runs, panel, ahead, factor, halves, adds):  # type: ignore[no-untyped-def]
        pass

    _unpack_8 = _unpack_e4m3 = _unpack_4
    _finish_8 = _finish_e4m3 = _finish_4


@kernel
def _load_scales(call, block, group, line):  # type: ignore[no-untyped-def]
    """Of a group of a block, which is counted through all weights."""
    middle, width = 8 if call.storage == INT4 else 128, 2 * call.steps
    place = (block * (width // call.group) + group) * COLUMNS
    factor = factor_place(call, block, group * call.group, width)
    unpack.load_line(
        call.scales + place * scale_bytes(call.scale_kind), call.scale_kind,
        at_place(call.zeros, place, call.zero_bytes), call.zero_bytes,
        at_place(call.factors, factor, call.factor_bytes), at_place(call.lows, factor, call.factor_bytes),
        call.factor_bytes, call.divides, middle, call.finish, line,
    )  # fmt: skip


@kernel
def _finish(call, values, line, steps, to, ahead):  # type: ignore[no-untyped-def]
    factor, halves = np.float32(1 / 127) if call.finish == OF_127 else np.float32(1), call.finish == TO_HALVES
    adds = call.finish == ADDED
    if call.storage == INT4:
        _finish_4(values, line, call.table, steps // 8, to, ahead, factor, halves, adds)
    elif call.storage == INT8:
        _finish_8(values, line, call.table, steps // 4, to, ahead, factor, halves, adds)
    else:
        _finish_e4m3(values, line, call.table, steps // 4, to, ahead, factor, halves, adds)


@kernel
def _panel_of_bits(call, weight, block, start, stop, panel, line, ahead):  # type: ignore[no-untyped-def]
    """`line` is aligned to a cache line and has room for a group's scales."""
    at = call.weights + weight * call.weight_bytes + block * call.steps * call.step_bytes
    group_steps = call.group // 2
    blocks = (call.columns + COLUMNS - 1) // COLUMNS
    step = start
    while step < stop:
        group = step // group_steps
        last = min(stop, (group + 1) * group_steps)
        _load_scales(call, weight * blocks + block, group, line)
        to, offset = panel + (step - start) * STEP, (step - start) * call.step_bytes
        values = at + step * call.step_bytes
        if call.finish != 0:
            _finish(call, values, line, last - step, to, ahead + offset)
        elif call.storage == INT4:
            _unpack_4(values, line, call.table, (last - step) // 8, to, ahead + offset)
        elif call.storage == INT8:
            _unpack_8(values, line, call.table, (last - step) // 4, to, ahead + offset)
        else:
            _unpack_e4m3(values, line, call.table, (last - step) // 4, to, ahead + offset)
        step = last


@kernel
def panel_of(call, weight, block, start, stop, panel, line, ahead):  # type: ignore[no-untyped-def]
    """The address of steps `start` to `stop` of a block of weight number `weight` as a panel: in the weight itself, or
    in `panel`. What columns behind the last hold is anything.

    `ahead` is what will be read next, where weights are blocks of columns.
    """
    at = call.weights + weight * call.weight_bytes
    if call.storage == PACKED:
        return at + (block * call.steps + start) * STEP
    if call.storage == ROWS:
        _panel_of_rows(at, 2 * call.steps, call.columns, block, start, stop, panel, line)
    elif call.storage == TRANSPOSED:
        _panel_of_transpose(at, call.columns, block, start, stop, panel)
    else:
        _panel_of_bits(call, weight, block, start, stop, panel, line, ahead)
    return panel
