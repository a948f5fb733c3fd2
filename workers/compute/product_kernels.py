"""Products of few rows with weights that come from RAM: y = x W^T + b in bfloat16, for decode steps.

The weight `[N, K]` lies in the order in which oneDNN keeps it, blocks of COLUMNS columns n, each `[K / 2][column][2]`;
the last block is filled up with zeros. Threads take blocks from a shared counter, one block in advance, so that a
thread knows which memory it will read next. A block goes in chunks of K that stay in the second-level cache: all rows
go through a chunk, in passes of as many rows as the registers hold sums for, and meanwhile the next chunk is
prefetched, which is another part of the same block or the start of the next.

Memory is named by address. A row's result depends on nothing but that row and the weight.

Measured on 2 cores of a Zen 4 with benchmarks/products.py, weights of six shapes from RAM: times oneDNN's rate with the
same weights, lowest and highest of the shapes.

    rows      4            8            16           32           48           64
           1.1 - 1.4    1.1 - 1.5    1.2 - 1.3    1.1 - 1.2    1.0 - 1.1    1.0 - 1.05
"""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import cfunc, types

from flexgen_lite.workers import simd
from flexgen_lite.workers.compute import prefill_cpu
from flexgen_lite.workers.compute import product_tiles as tiles
from flexgen_lite.workers.compute.prefill_packing import OPTIONS, kernel
from flexgen_lite.workers.compute.product_tiles import COLUMNS, LINE, ROW
from flexgen_lite.workers.kernel_cache import from_cache
from flexgen_lite.workers.simd import LANES

MAX_ROWS = 64
PASS_ROWS = 6  # at most; 7 would leave no registers for weights and words
CHUNK = 512  # steps, of 4 * COLUMNS bytes each
STEP = 4 * COLUMNS  # bytes of weights

CALL = np.dtype(
    [
        *((name, np.int64) for name in ("begun", "taken")),  # counters, 0 before a call
        *((name, np.int64) for name in ("x", "y", "scratch", "rows")),  # addresses, number of rows
        *((name, np.int64) for name in ("weights", "bias")),  # addresses; bias 0: none
        *((name, np.int64) for name in ("columns", "steps", "chunk")),  # N, K / 2, steps of a chunk
    ]
)
_call: Any = simd.record(CALL)
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
def _num_passes(rows):  # type: ignore[no-untyped-def]
    return (rows + PASS_ROWS - 1) // PASS_ROWS


@kernel
def _first_row(rows, passes, turn):  # type: ignore[no-untyped-def]
    """Of pass `turn`; passes differ by a row at most, the longer ones come first."""
    return turn * (rows // passes) + min(turn, rows % passes)


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
def _pack_rows(call, target, ahead):  # type: ignore[no-untyped-def]
    """`[pass][step][row of the pass]` words of x; prefetches the first chunk's first half meanwhile."""
    passes, stride = _num_passes(call.rows), 4 * call.steps
    lines = max(1, call.chunk * STEP // LINE // 2 // (passes * call.steps // LANES))
    for turn in range(passes):
        first, last = _first_row(call.rows, passes, turn), _first_row(call.rows, passes, turn + 1)
        rows, source, to = last - first, call.x + first * stride, target + first * stride
        for step in range(0, call.steps, LANES):
            _pack_steps(rows, source + 4 * step, stride, to + 4 * rows * step)
            for line in range(lines):
                tiles.prefetch(ahead + line * LINE)
            ahead += lines * LINE


@kernel
def _write(call, block, sums, work):  # type: ignore[no-untyped-def]
    """A block's sums and bias, rounded once, to y; `work` has room for a vector."""
    first = block * COLUMNS
    count = min(COLUMNS, call.columns - first)
    whole = count // LANES * LANES
    for i in range(call.rows):
        source, target = sums + 4 * i * COLUMNS, call.y + 2 * (i * call.columns + first)
        for n in range(0, whole, LANES):
            total = simd.load(source + 4 * n)
            if call.bias != 0:
                total = simd.add(total, simd.load_items(call.bias + 2 * (first + n), _STORED))
            simd.store_items(total, target + 2 * n, _STORED)
        if whole < count:
            if call.bias != 0:
                for n in range(whole, count):
                    bias = simd.load_item(call.bias + 2 * (first + n), _STORED)
                    simd.store_float(simd.load_float(source + 4 * n) + bias, source + 4 * n)
            simd.store_items(simd.load(source + 4 * whole), work, _STORED)
            for n in range(whole, count):
                simd.copy_item(work + 2 * (n - whole), target + 2 * n, _STORED)


def _words_bytes(rows: int, steps: int) -> int:
    """Of packed rows, and a half vector behind them."""
    return (4 * rows * steps + ROW + LINE - 1) // LINE * LINE


def _thread_bytes(rows: int, steps: int) -> int:
    """Of a thread's scratch memory: packed rows, sums, a vector for the tail."""
    return _words_bytes(rows, steps) + 4 * rows * COLUMNS + ROW


_size_of_words: Any = kernel(_words_bytes)


@kernel
def _multiply_block(call, weights, following, words, sums):  # type: ignore[no-untyped-def]
    passes = _num_passes(call.rows)
    for start in range(0, call.steps, call.chunk):
        stop = min(start + call.chunk, call.steps)
        ahead = weights + stop * STEP if stop < call.steps else following
        for turn in range(passes):
            first, last = _first_row(call.rows, passes, turn), _first_row(call.rows, passes, turn + 1)
            rows, lines = last - first, _lines(passes, turn)
            at = words + 4 * first * call.steps + 4 * rows * start
            to, keep = sums + 4 * first * COLUMNS, 0 if start == 0 else 1
            _multiply_tile(rows, lines, at, weights + start * STEP, stop - start, to, keep, ahead)
            ahead += (stop - start) * lines * LINE


def multiply(address: int) -> None:
    """One thread's part."""
    call = _call(address)
    size = _size_of_words(call.rows, call.steps)
    words = call.scratch + simd.fetch_add(address) * (size + 4 * call.rows * COLUMNS + ROW)
    sums = words + size
    block_size, blocks = call.steps * STEP, (call.columns + COLUMNS - 1) // COLUMNS
    block = simd.fetch_add(address + 8)
    if block >= blocks:
        return
    _pack_rows(call, words, call.weights + block * block_size)
    while block < blocks:
        following = simd.fetch_add(address + 8)
        ahead = call.weights + min(following, blocks - 1) * block_size
        _multiply_block(call, call.weights + block * block_size, ahead, words, sums)
        _write(call, block, sums, sums + 4 * call.rows * COLUMNS)
        block = following


@cache
def compiled() -> Any:
    """`multiply` as a C function, `void f(CALL *)`, to be run by every thread."""
    return from_cache(lambda: cfunc(types.void(types.int64), cache=True, **OPTIONS)(multiply))


class PackedWeight(NamedTuple):
    """A weight `[N, K]` of bfloat16 that lies in oneDNN's order at `address`."""

    address: int
    columns: int
    steps: int

    def serves(self, x: torch.Tensor, bias_N: torch.Tensor | None) -> bool:
        """Whether the kernel computes this product, and faster than oneDNN."""
        few = 0 < x.numel() <= MAX_ROWS * 2 * self.steps
        alike = x.dtype == torch.bfloat16 and (bias_N is None or bias_N.dtype == torch.bfloat16)
        return few and alike and x.shape[-1] == 2 * self.steps and x.is_contiguous()

    def multiply(self, x: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
        """y `[..., N]` of x `[..., K]`, which `serves` says yes to."""
        output = x.new_empty((*x.shape[:-1], self.columns))
        self.multiply_into(output, x, bias_N)
        return output

    def multiply_into(self, output: torch.Tensor, x: torch.Tensor, bias_N: torch.Tensor | None) -> None:
        """The same into contiguous memory, on PyTorch's threads; not to be called by two threads at once."""
        num_rows, threads = x.numel() // (2 * self.steps), torch.get_num_threads()
        scratch = prefill_cpu.scratch_address(threads * _thread_bytes(num_rows, self.steps))
        bias = 0 if bias_N is None else bias_N.data_ptr()
        numbers = (0, 0, x.data_ptr(), output.data_ptr(), scratch, num_rows, self.address, bias)
        _FIELDS.pack_into(_record, 0, *numbers, self.columns, self.steps, _chunk(self.steps))
        prefill_cpu.parallel()(_function(), _record_address, threads, 0)


NUM_FIELDS = len(CALL.names or ())
_FIELDS = struct.Struct(f"{NUM_FIELDS}q")
_record = (ctypes.c_int64 * NUM_FIELDS)()
_record_address = ctypes.c_void_p(ctypes.addressof(_record))


@cache
def _function() -> ctypes.c_void_p:
    return ctypes.c_void_p(compiled().address)


def _chunk(steps: int) -> int:
    """Steps of a chunk: as even as they can be."""
    return -(-steps // -(-steps // CHUNK))


def packed_weight(address: int, num_bytes: int, shape: torch.Size) -> PackedWeight | None:
    """`num_bytes` of a weight that oneDNN has packed; None where the kernel does not serve it."""
    columns, width = shape
    if width % (2 * LANES) or num_bytes != -(-columns // COLUMNS) * COLUMNS * width * 2 or not is_available():
        return None
    return PackedWeight(address, columns, width // 2)


@cache
def is_available() -> bool:
    """Whether this processor has the instructions, and oneDNN the order of weights that the kernel expects."""
    if not simd.PAIRS or prefill_cpu.parallel() is None:
        return False
    columns, width, ops = 200, 96, torch.ops.mkldnn
    weight_NK = torch.arange(128, 128 + columns * width, dtype=torch.int16).view(columns, width)
    packed: Any = ops._reorder_linear_weight(weight_NK.view(torch.bfloat16))
    blocks = torch.zeros(-(-columns // COLUMNS) * COLUMNS, width, dtype=torch.int16)
    blocks[:columns] = weight_NK
    expected = blocks.view(-1, COLUMNS, width // 2, 2).transpose(1, 2).contiguous().numpy().tobytes()
    if ops._nbytes(packed) != len(expected):
        return False
    return bool(ctypes.string_at(ops.data_ptr(packed), len(expected)) == expected)
