"""Prefill attention's rows into the order in which the products want them, and its sums into rows of output.

q, k, v come as rows of stored items, at strides of their own; the output is `[row][head][column]`. The products want
words (see prefill_tiles.py): `unit` is the kind of the items that q and k are seen as, which are words already where
these are pairs; `stored` the kind of the output.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from flexgen_lite.workers import simd
from flexgen_lite.workers.compute import prefill_tiles as tiles
from flexgen_lite.workers.compute.prefill_tiles import ROW
from flexgen_lite.workers.simd import LANES

PAD = 16  # keys and columns are padded to a multiple: the rows of every tile divide it

CALL = np.dtype(
    [
        *((name, np.int64) for name in ("q", "k", "v", "out", "sinks", "spans", "scratch", "counters")),  # addresses
        *((name, np.int64) for name in ("q_row", "q_head", "k_row", "k_head", "v_row", "v_head")),  # strides in bytes
        *((name, np.int64) for name in ("num_rows", "num_spans", "heads", "kv_heads")),
        ("depth", np.int64),  # units of a query or key
        ("columns", np.int64),  # items of a value
        ("window", np.int64),  # tokens a query sees, itself included
        ("scaling", np.float32),
        ("softcap", np.float32),  # 0: none
    ],
    align=True,
)

OPTIONS: dict[str, Any] = {"error_model": "numpy", "_nrt": False}
kernel: Any = njit(**OPTIONS)


class Item(NamedTuple):
    """Some queries of one prompt for some heads of one group. A vector holds LANES of the queries for one head; the
    item's vectors go query by query, and within that head by head."""

    row: int  # of the prompt's first token
    first: int  # query, counted in the prompt
    last: int  # exclusive
    group: int  # key/value head
    head: int  # the first
    heads: int
    vectors: int


@kernel
def padded(size):  # type: ignore[no-untyped-def]
    return (size + PAD - 1) // PAD * PAD


@kernel
def position(item, vector):  # type: ignore[no-untyped-def]
    """The vector's first query, counted in the prompt."""
    return item.first + vector // item.heads * LANES


@kernel
def clear(start, stop):  # type: ignore[no-untyped-def]
    for at in range(start, stop, 4):
        simd.store_float(np.float32(0), at)


@kernel
def _copy_words(source, count, target, unit):  # type: ignore[no-untyped-def]
    size = 2 if simd.is_bfloat16(unit) else 4
    i = 0
    while i + LANES <= count:
        simd.store(simd.load_items(source + i * size, unit), target + 4 * i)
        i += LANES
    while i < count:
        simd.store_float(simd.load_item(source + i * size, unit), target + 4 * i)
        i += 1


@kernel
def pack_query(call, item, vector, target, stride, unit):  # type: ignore[no-untyped-def]
    """Turns a vector's queries into `depth` rows of words, `stride` apart; lanes behind the item hold anything."""
    size = 2 if simd.is_bfloat16(unit) else 4
    row = item.row + position(item, vector)
    source = call.q + row * call.q_row + (item.head + vector % item.heads) * call.q_head
    if row + LANES <= call.num_rows and call.depth >= LANES:
        for w in range(0, call.depth, LANES):
            start = min(w, call.depth - LANES)
            tiles.transpose(source + start * size, call.q_row, target + start * stride, stride, unit)
        return
    for lane in range(LANES):
        query = source + min(lane, call.num_rows - 1 - row) * call.q_row
        for w in range(call.depth):
            simd.store_float(simd.load_item(query + w * size, unit), target + w * stride + 4 * lane)


@kernel
def pack_keys(call, item, start, stop, target, unit):  # type: ignore[no-untyped-def]
    """Copies the keys of tokens start .. stop as rows of words, zeros behind them."""
    source = call.k + (item.row + start) * call.k_row + item.group * call.k_head
    count, stride = stop - start, 4 * call.depth
    for j in range(count):
        _copy_words(source + j * call.k_row, call.depth, target + j * stride, unit)
    clear(target + count * stride, target + padded(count) * stride)


@kernel
def pack_values(call, item, start, stop, target, unit):  # type: ignore[no-untyped-def]
    """Copies the values of tokens start .. stop as rows of words, zeros behind and between them."""
    source = call.v + (item.row + start) * call.v_row + item.group * call.v_head
    count, stride = stop - start, 4 * padded(call.columns)
    for j in range(count):
        _copy_words(source + j * call.v_row, call.columns, target + j * stride, unit)
        clear(target + j * stride + 4 * call.columns, target + (j + 1) * stride)
    clear(target + count * stride, target + padded(count) * stride)


@kernel
def pack_value_pairs(call, item, start, stop, zeros, target):  # type: ignore[no-untyped-def]
    """The same for bfloat16, two tokens in a row of pairs; `zeros` is a row for behind the last token."""
    source = call.v + (item.row + start) * call.v_row + item.group * call.v_head
    count, stride = stop - start, 4 * padded(call.columns)
    for j in range(0, count, 2):
        one, to = source + j * call.v_row, target + j // 2 * stride
        other = one + call.v_row if j + 1 < count else zeros
        e = 0
        while e + LANES <= call.columns:
            tiles.zip_rows(one + 2 * e, other + 2 * e, to + 4 * e)
            e += LANES
        while e < call.columns:
            tiles.zip_item(one + 2 * e, other + 2 * e, to + 4 * e)
            e += 1
        clear(to + 4 * call.columns, to + stride)
    clear(target + (count + 1) // 2 * stride, target + padded(count) // 2 * stride)


@kernel
def write(call, item, vector, sums, stride, total, work, stored):  # type: ignore[no-untyped-def]
    """Writes a vector's output: its sums, rows `stride` apart, over `total`. `work` has room for LANES vectors."""
    size = 2 if simd.is_bfloat16(stored) else 4
    share = simd.divide(simd.splat(np.float32(1)), simd.load(total))
    query, head = position(item, vector), item.head + vector % item.heads
    out, row_size = call.out + ((item.row + query) * call.heads + head) * call.columns * size, call.columns * size
    for e in range(0, call.columns, LANES):
        start = max(0, min(e, call.columns - LANES))
        for i in range(LANES):
            simd.store(simd.multiply(simd.load(sums + (start + i) * stride), share), work + i * ROW)
        tiles.transpose(work, ROW, work, ROW, np.float32(0))
        for i in range(min(LANES, item.last - query)):
            to, row = out + i * call.heads * row_size + start * size, work + i * ROW
            if call.columns >= LANES:
                simd.store_items(simd.load(row), to, stored)
                continue
            simd.store_items(simd.load(row), row, stored)
            for c in range(0, row_size, size):
                simd.copy_item(row + c, to + c, stored)
