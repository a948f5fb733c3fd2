"""Products of rows with weights that come from RAM: y = x W^T + b in bfloat16, of one weight or of many at once.

The weight `[N, K]` lies in the order in which oneDNN keeps it, blocks of COLUMNS columns n, each `[K / 2][column][2]`
(the last block is filled up with zeros), or row by row, or as its transpose: then each block is put into that order in
a *panel* of the thread's own (product_panels.py) as it is needed.

A call has *segments*, each some rows of x and the weight that they meet: one for a dense layer's few rows, one or more
for each expert. Threads take items from a shared counter, some blocks of columns of a segment, one in advance, so that
a thread knows which memory it will read next. A block goes in chunks of K that stay in the second-level cache: all rows
go through a chunk, in passes of as many rows as the registers hold sums for, and meanwhile the next chunk is
prefetched, which is another part of the same block or the start of the next.

Memory is named by address. A row's result depends on nothing but that row and the weight.

There are two kernels: of vectors of pairs (product_tiles.py), and of tile registers (product_amx.py).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import cfunc, types

from flexgen_lite.workers import simd
from flexgen_lite.workers.compute import product_amx as amx
from flexgen_lite.workers.compute import product_tiles as tiles
from flexgen_lite.workers.compute import scale_loads
from flexgen_lite.workers.compute.prefill_packing import OPTIONS
from flexgen_lite.workers.compute.product_byte_kernels import multiply_in_bytes, round_row
from flexgen_lite.workers.compute.product_bytes import GROUP_FIELDS
from flexgen_lite.workers.compute.product_panels import PACKED, kernel, panel_of
from flexgen_lite.workers.compute.product_scratch import PASS_ROWS, first_row, num_passes, scratch_at
from flexgen_lite.workers.compute.product_tiles import COLUMNS, LINE, ROW, STEP, WIDENED, WORD_BYTES, widen
from flexgen_lite.workers.kernel_cache import from_cache
from flexgen_lite.workers.simd import LANES

CALL = np.dtype(
    [
        *((name, np.int64) for name in ("begun", "taken")),  # counters, 0 before a call
        *((name, np.int64) for name in ("x", "x_rows", "y", "y_rows")),  # addresses; of row numbers, 0: in order
        *((name, np.int64) for name in ("segments", "num_segments")),  # SEGMENT each
        *((name, np.int64) for name in ("scratch", "scratch_bytes")),  # of a thread
        *((name, np.int64) for name in ("weights", "weight_bytes")),  # from one weight to the next
        *((name, np.int64) for name in (*scale_loads.FIELDS, "table", "group", "finish")),
        *((name, np.int64) for name in ("bias", "storage", "step_bytes")),  # bias `[weight][N]`; 0: none
        *((name, np.int64) for name in ("columns", "steps", "chunk")),  # N, K / 2, steps of a chunk
        *((name, np.int64) for name in ("span", "most_rows", "tiles")),  # of an item; of a segment; see amx.CONFIG
    ]
)  # fmt: skip
SEGMENT = np.dtype([(name, np.int64) for name in ("weight", "first", "rows")])
SEGMENT_BYTES = SEGMENT.itemsize
_call: Any = simd.record(CALL)
_segment: Any = simd.record(SEGMENT)
_STORED = np.uint16(0)  # the kind: bfloat16


if simd.PAIRS:
    _pack = {rows: tiles.pack_tile(rows) for rows in range(1, PASS_ROWS + 1)}
    _pack_1, _pack_2, _pack_3, _pack_4, _pack_5, _pack_6 = _pack.values()
    # _tile_r_p: r rows, p lines.
    _tile_3_2, _tile_4_2, _tile_5_2, _tile_6_2 = (tiles.product_tile(rows, 2) for rows in (3, 4, 5, 6))
    _tile_4_1, _tile_5_1, _tile_6_1 = (tiles.product_tile(rows, 1) for rows in (4, 5, 6))
    _tile_1_0, _tile_2_0, _tile_3_0 = (tiles.product_tile(rows, 0) for rows in (1, 2, 3))
    _tile_4_0, _tile_5_0, _tile_6_0 = (tiles.product_tile(rows, 0) for rows in (4, 5, 6))


@kernel
def _multiply_tile(rows, lines, words, weights, steps, sums, keep, ahead):  # type: ignore[no-untyped-def]
    if lines == 2:
        if rows == 3:
            _tile_3_2(words, weights, steps, sums, keep, ahead)
        elif rows == 4:
            _tile_4_2(words, weights, steps, sums, keep, ahead)
        elif rows == 5:
            _tile_5_2(words, weights, steps, sums, keep, ahead)
        else:
            _tile_6_2(words, weights, steps, sums, keep, ahead)
    elif lines == 1:
        if rows == 4:
            _tile_4_1(words, weights, steps, sums, keep, ahead)
        elif rows == 5:
            _tile_5_1(words, weights, steps, sums, keep, ahead)
        else:
            _tile_6_1(words, weights, steps, sums, keep, ahead)
    else:
        if rows == 1:
            _tile_1_0(words, weights, steps, sums, keep, ahead)
        elif rows == 2:
            _tile_2_0(words, weights, steps, sums, keep, ahead)
        elif rows == 3:
            _tile_3_0(words, weights, steps, sums, keep, ahead)
        elif rows == 4:
            _tile_4_0(words, weights, steps, sums, keep, ahead)
        elif rows == 5:
            _tile_5_0(words, weights, steps, sums, keep, ahead)
        else:
            _tile_6_0(words, weights, steps, sums, keep, ahead)


@kernel
def _pack_steps(rows, source, stride, target):  # type: ignore[no-untyped-def]
    if rows == 1:
        _pack_1(source, stride, target)
    elif rows == 2:
        _pack_2(source, stride, target)
    elif rows == 3:
        _pack_3(source, stride, target)
    elif rows == 4:
        _pack_4(source, stride, target)
    elif rows == 5:
        _pack_5(source, stride, target)
    else:
        _pack_6(source, stride, target)


@kernel
def _lines(passes, turn):  # type: ignore[no-untyped-def]
    """Cache lines to prefetch per step in pass `turn`: in all passes together, STEP bytes.

    None where there is but one pass: then the processor reads ahead by itself, 5 % faster.
    """
    if passes == 1:
        return 0
    if passes == 2 or (passes == 3 and turn == 0):
        return 2
    return 1 if turn < 4 else 0


@kernel
def _row_address(start, numbers, row, stride):  # type: ignore[no-untyped-def]
    return start + stride * (row if numbers == 0 else simd.load_int(numbers + 8 * row))


@kernel
def _copy(source, target, num_bytes):  # type: ignore[no-untyped-def]
    for at in range(0, num_bytes, ROW):
        simd.store(simd.load(source + at), target + at)


@kernel
def _pack_rows(call, segment, target, line):  # type: ignore[no-untyped-def]
    """`[pass][step][row of the pass]` words of x, in WORD_BYTES each; `line` has room for a pass's rows."""
    passes, stride, size = num_passes(segment.rows), 4 * call.steps, WORD_BYTES * call.steps
    for turn in range(passes):
        first, last = first_row(segment.rows, passes, turn), first_row(segment.rows, passes, turn + 1)
        rows, to = last - first, target + first * size
        words = to + rows * (size - stride)
        source = call.x + (segment.first + first) * stride
        if call.x_rows != 0:
            for i in range(rows):
                at = _row_address(call.x, call.x_rows, segment.first + first + i, stride)
                _copy(at, line + i * stride, stride)
            source = line
        for step in range(0, call.steps, LANES):
            _pack_steps(rows, source + 4 * step, stride, words + 4 * rows * step)
        if WIDENED:
            widen(words, to, rows * call.steps)


@kernel
def _pack_bytes(call, segment, scratch):  # type: ignore[no-untyped-def]
    """The same of rows that are rounded to 8 bits, and the numbers of their groups."""
    passes, width = num_passes(segment.rows), 2 * call.steps
    stride = (width + 4 * LANES - 1) // (4 * LANES) * 4 * LANES
    groups = width // call.group
    for turn in range(passes):
        first, last = first_row(segment.rows, passes, turn), first_row(segment.rows, passes, turn + 1)
        rows, to = last - first, scratch.words + first * width
        numbers = scratch.numbers + 4 * GROUP_FIELDS * first * groups
        for i in range(rows):
            source = _row_address(call.x, call.x_rows, segment.first + first + i, 2 * width)
            round_row(call, source, scratch.line + i * stride, numbers + 4 * i, rows)
        for step in range(0, width // 4, LANES):
            _pack_steps(rows, scratch.line + 4 * step, stride, to + 4 * rows * step)


@kernel
def _pack_row_tiles(call, segment, target):  # type: ignore[no-untyped-def]
    """`[row tile][tile step][row]`, 64 bytes each; rows behind the last are zeros."""
    stride, zero = 4 * call.steps, simd.splat(np.float32(0))
    for row in range((segment.rows + amx.ROWS - 1) // amx.ROWS * amx.ROWS):
        to = target + row // amx.ROWS * amx.ROWS * stride + row % amx.ROWS * 64
        if row < segment.rows:
            source = _row_address(call.x, call.x_rows, segment.first + row, stride)
            for at in range(0, stride, 64):
                simd.store(simd.load(source + at), to + at * amx.ROWS)
        else:
            for at in range(0, stride, 64):
                simd.store(zero, to + at * amx.ROWS)


@kernel
def _write(call, segment, block, sums, work):  # type: ignore[no-untyped-def]
    """A block's sums and bias, rounded once, to y; `work` has room for a vector."""
    first = block * COLUMNS
    count = min(COLUMNS, call.columns - first)
    whole = count // LANES * LANES
    bias = call.bias + 2 * (segment.weight * call.columns + first)
    for i in range(segment.rows):
        source = sums + 4 * i * COLUMNS
        target = _row_address(call.y, call.y_rows, segment.first + i, 2 * call.columns) + 2 * first
        for n in range(0, whole, LANES):
            total = simd.load(source + 4 * n)
            if call.bias != 0:
                total = simd.add(total, simd.load_items(bias + 2 * n, _STORED))
            simd.store_items(total, target + 2 * n, _STORED)
        if whole < count:
            if call.bias != 0:
                for n in range(whole, count):
                    item = simd.load_item(bias + 2 * n, _STORED)
                    simd.store_float(simd.load_float(source + 4 * n) + item, source + 4 * n)
            simd.store_items(simd.load(source + 4 * whole), work, _STORED)
            for n in range(whole, count):
                simd.copy_item(work + 2 * (n - whole), target + 2 * n, _STORED)


@kernel
def _block_address(call, weight, block):  # type: ignore[no-untyped-def]
    """Where weights are blocks of columns."""
    return call.weights + weight * call.weight_bytes + block * call.steps * call.step_bytes


@kernel
def _next_chunk(call, weight, block, stop, following):  # type: ignore[no-untyped-def]
    return _block_address(call, weight, block) + stop * call.step_bytes if stop < call.steps else following


@kernel
def _multiply_in_vectors(call, weight, block, following, rows, scratch):  # type: ignore[no-untyped-def]
    passes = num_passes(rows)
    for start in range(0, call.steps, call.chunk):
        stop = min(start + call.chunk, call.steps)
        ahead = _next_chunk(call, weight, block, stop, following)
        at = panel_of(call, weight, block, start, stop, scratch.panel, scratch.line, ahead)
        for turn in range(passes):
            first, last = first_row(rows, passes, turn), first_row(rows, passes, turn + 1)
            lines = _lines(passes, turn) if call.storage == PACKED else 0
            source = scratch.words + WORD_BYTES * (first * call.steps + (last - first) * start)
            to, keep = scratch.sums + 4 * first * COLUMNS, 0 if start == 0 else 1
            _multiply_tile(last - first, lines, source, at, stop - start, to, keep, ahead)
            ahead += (stop - start) * lines * LINE


if simd.TILES:
    _tiles_2_2, _tiles_1_4 = amx.product_tile(2, 2), amx.product_tile(1, 4)  # row tiles and columns'
    _configure, _release = amx.configure, amx.release

    @kernel
    def _multiply_in_tiles(call, weight, block, following, rows, scratch):  # type: ignore[no-untyped-def]
        row_tiles = (rows + amx.ROWS - 1) // amx.ROWS
        passes = row_tiles // 2 * 2 + row_tiles % 2
        lines = (amx.LINES + passes - 1) // passes if call.storage == PACKED else 0
        stride = 4 * call.steps * amx.ROWS  # of row tiles
        for start in range(0, call.steps, call.chunk):
            stop = min(start + call.chunk, call.steps)
            ahead = _next_chunk(call, weight, block, stop, following)
            at = panel_of(call, weight, block, start, stop, scratch.panel, scratch.line, ahead)
            steps, keep = (stop - start) // amx.STEPS, 0 if start == 0 else 1
            for tile in range(0, row_tiles, 2):
                source = scratch.words + tile * stride + start * 4 * amx.ROWS
                to = scratch.sums + tile * amx.ROWS * STEP
                if tile + 1 < row_tiles:
                    _tiles_2_2(source, stride, at, steps, to, keep, ahead, lines)
                    ahead += steps * lines * LINE
                    _tiles_2_2(source, stride, at + STEP // 2, steps, to + STEP // 2, keep, ahead, lines)
                else:
                    _tiles_1_4(source, stride, at, steps, to, keep, ahead, lines)
                ahead += steps * lines * LINE

else:

    @kernel
    def _configure(at):  # type: ignore[no-untyped-def]
        pass

    @kernel
    def _release():  # type: ignore[no-untyped-def]
        pass

    @kernel
    def _multiply_in_tiles(call, weight, block, following, rows, scratch):  # type: ignore[no-untyped-def]
        pass


@kernel
def _beginning(call, item, spans):  # type: ignore[no-untyped-def]
    """Of an item, where weights are blocks of columns."""
    segment = _segment(call.segments + item // spans * SEGMENT_BYTES)
    return _block_address(call, segment.weight, item % spans * call.span)


@kernel
def _pack_segment(call, segment, at):  # type: ignore[no-untyped-def]
    if call.tiles != 0:
        _pack_row_tiles(call, segment, at.words)
    else:
        _pack_rows(call, segment, at.words, at.line)


@kernel
def _multiply_block(call, weight, block, following, rows, at):  # type: ignore[no-untyped-def]
    if call.tiles != 0:
        _multiply_in_tiles(call, weight, block, following, rows, at)
    else:
        _multiply_in_vectors(call, weight, block, following, rows, at)


def _named(function: Any, name: str) -> Any:
    """With a name that no other has: of functions of one name and one type in two libraries from numba's cache, the
    linker takes one for both."""
    function.__name__ = function.__qualname__ = f"{function.__name__}_{name}"
    return kernel(function)


def _part_of(pack_segment: Any, multiply_block: Any, name: str) -> Any:
    """One thread's part, with these two."""

    def multiply_item(call, segment, block, last, following, at):  # type: ignore[no-untyped-def]
        """Blocks up to `last`; `following` is where the next item begins, `at` the thread's scratch memory."""
        weight = segment.weight
        while block < last:
            ahead = _block_address(call, weight, block + 1) if block + 1 < last else following
            multiply_block(call, weight, block, ahead, segment.rows, at)
            _write(call, segment, block, at.sums, at.line)
            block += 1

    multiply_blocks = _named(multiply_item, name)

    def part(address):  # type: ignore[no-untyped-def]
        call = _call(address)
        base = call.scratch + simd.fetch_add(address) * call.scratch_bytes
        at = scratch_at(base, call.most_rows, call.steps, call.chunk, call.storage, call.group, call.tiles)
        blocks = (call.columns + COLUMNS - 1) // COLUMNS
        spans = (blocks + call.span - 1) // call.span
        items, packed = call.num_segments * spans, -1
        item = simd.fetch_add(address + 8)
        if item >= items:
            return
        if call.tiles != 0:
            _configure(call.tiles)
        while item < items:
            following = simd.fetch_add(address + 8)
            segment = _segment(call.segments + item // spans * SEGMENT_BYTES)
            if item // spans != packed:
                packed = item // spans
                pack_segment(call, segment, at)
            block = item % spans * call.span
            ahead = _beginning(call, min(following, items - 1), spans)
            multiply_blocks(call, segment, block, min(block + call.span, blocks), ahead, at)
            item = following
        if call.tiles != 0:
            _release()

    return _named(part, name)


_part = _part_of(_pack_segment, _multiply_block, "floats")
_part_in_bytes = _part_of(_pack_bytes, multiply_in_bytes, "bytes")


def multiply(address: int) -> None:
    """One thread's part."""
    _part(address)


def multiply_bytes(address: int) -> None:
    """The same with weights in the order for int8."""
    _part_in_bytes(address)


def pack(address: int) -> None:
    """One thread's part of putting weights that lie row by row into panels, where they lie; N is that of all of them, a
    multiple of COLUMNS, and a thread's scratch memory has room for a block and LANES vectors."""
    call = _call(address)
    line = call.scratch + simd.fetch_add(address) * call.scratch_bytes
    panel, size = line + LANES * ROW, call.steps * STEP
    block = simd.fetch_add(address + 8)
    while block < call.columns // COLUMNS:
        panel_of(call, 0, block, 0, call.steps, panel, line, call.weights)
        _copy(panel, call.weights + block * size, size)
        block = simd.fetch_add(address + 8)


@cache
def compiled(function: Any) -> Any:
    """One of `multiply`, `multiply_bytes` and `pack` as a C function, `void f(CALL *)`, to be run by every thread."""
    return from_cache(lambda: cfunc(types.void(types.int64), cache=True, **OPTIONS)(function), function.__name__)
