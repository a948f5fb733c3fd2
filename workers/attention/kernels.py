"""The CPU attention kernels: K and V into the pages, and decode attention over them.

A thread takes *items* from a shared counter: a unit (some queries of one sequence, a range of its chunks of CHUNK
tokens) and one key/value head. It goes through the chunks in blocks of BLOCK tokens straight from the pages, and keeps
a running maximum m, sum of weights l and weighted sums of values per query. Chunks are joined by log-sum-exp, in order,
in the item or afterwards, with the same arithmetic: a query's result depends neither on the rest of the batch nor on
the number of threads.

Memory is named by address. What is done within a block is in block.py, down to registers in tiles.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from flexgen_lite.workers import hadamard, simd
from flexgen_lite.workers.attention import byte_tiles, layout, tiles
from flexgen_lite.workers.attention.block import (
    LOG2_E,
    OPTIONS,
    ask_for_first,
    attend_block,
    exp2,
    find_groups,
    first_seen,
    kernel,
    key_address,
    row_words,
    turn_values,
    value_address,
    words,
)
from flexgen_lite.workers.attention.layout import BLOCK, CHUNK
from flexgen_lite.workers.attention.tiles import ROW
from flexgen_lite.workers.simd import LANES

_F = np.float32
_ZERO, _ONE = _F(0), _F(1)
_MOST = _F(127)  # of an item in int8
_NEARLY_TWICE = _F(1 + 2**-7)  # ... a power of two is the next one: planes of bytes do not reach as far as twice it
_LOWEST = _F(-1e30)  # the maximum before the first score

_entry: Any = njit(cache=True, **OPTIONS)
_planes_end: Any = kernel(byte_tiles.planes_end)
_places: Any = kernel(layout.places)


@kernel
def _partial_bytes(at):  # type: ignore[no-untyped-def]
    return at.sum_stride + 64


@kernel
def _clear(start, stop):  # type: ignore[no-untyped-def]
    for at in range(start, stop, 4):
        simd.store_float(_ZERO, at)


@kernel
def _join(total, total_m, total_l, sums, m, l, num_bytes):  # type: ignore[no-untyped-def]  # noqa: E741
    """Adds one query's chunk (m, l, sums) to a running total by log-sum-exp; returns the total's m, l."""
    new_m = max(total_m, m)
    a, b = exp2(total_m - new_m), exp2(m - new_m)
    mine, other = simd.splat(a), simd.splat(b)
    for i in range(0, num_bytes, ROW):
        x = simd.multiply(simd.load(total + i), mine)
        simd.store(simd.add(x, simd.multiply(simd.load(sums + i), other)), total + i)
    return new_m, total_l * a + l * b


@kernel
def _write(region, unit, i, shape, head, sums, m, l, line, kind, kept):  # type: ignore[no-untyped-def] # noqa: E741
    """Writes one query's output, rounded to the storage dtype. `line` is room for a vector."""
    heads = shape.num_heads // shape.num_kv_heads
    row, query_head = unit.row + (unit.first + i) // heads, head * heads + (unit.first + i) % heads
    scale = _ONE
    if shape.has_sinks:
        sink = simd.load_float(region + shape.sinks + 4 * query_head) * LOG2_E
        new_m = max(m, sink)
        scale = exp2(m - new_m)
        l = l * scale + exp2(sink - new_m)  # noqa: E741
    scale = scale / l
    per_word = tiles.items_per_word(kind)
    size = 4 // per_word
    target = region + shape.out + (row * shape.num_heads + query_head) * shape.value_dim * size
    if tiles.scale_words(kept):
        hadamard.multiply(sums, shape.value_dim, shape.value_order)
        for e in range(0, shape.value_dim, LANES):
            tiles.write_items(sums + 4 * e, scale, target + e * size, min(shape.value_dim - e, LANES), kind)
        return
    left = shape.value_dim
    while left >= LANES * per_word or (left > 0 and left % per_word == 0):
        count = min(left // per_word, LANES)
        tiles.write_line(sums, scale, target, count, kind)
        sums, target, left = sums + per_word * ROW, target + count * 4, left - count * per_word
    if left > 0:  # an odd number of items: the neighbour of the last is not ours
        tiles.write_line(sums, scale, line, LANES, kind)
        for e in range(left):
            simd.copy_item(line + e * size, target + e * size, np.uint16(0))


@kernel
def _load_multiplied(source, count, order, to, kind):  # type: ignore[no-untyped-def]
    """A row of `count` items as float32, times Hadamard matrices; zeros behind."""
    size = 4 // tiles.items_per_word(kind)
    for i in range(0, count, LANES):
        simd.store(tiles.load_items(source + i * size, min(count - i, LANES), kind), to + 4 * i)
    hadamard.multiply(to, count, order)


@kernel
def _split_query(source, dim, to, kind):  # type: ignore[no-untyped-def]
    """A query of float32 as planes of bytes; `kind` is what it was."""
    planes = byte_tiles.planes(kind)
    top, flaw = hadamard.largest(source, dim)
    scale = simd.power_below(top * _NEARLY_TWICE) * byte_tiles.unit_of(kind) + flaw
    tail = to + _planes_end(words(dim, 4), planes)
    _clear(tail, tail + 4 * planes)
    for d in range(0, dim, LANES):
        byte_tiles.write_planes(simd.load(source + 4 * d), scale, to + d * planes, tail, kind)
    simd.store_float(scale, tail + 4 * planes)


@kernel
def _load_queries(region, unit, shape, head, at, kind, kept):  # type: ignore[no-untyped-def]
    """The unit's queries as the tiles want them: planes of bytes, words, or float32 with zeros behind."""
    heads, per_word, dim = shape.num_heads // shape.num_kv_heads, tiles.items_per_word(kind), shape.head_dim
    size = 4 // per_word
    for i in range(unit.last - unit.first):
        row, query_head = unit.row + (unit.first + i) // heads, head * heads + (unit.first + i) % heads
        source = region + shape.q + (row * shape.num_heads + query_head) * dim * size
        to = at.query + i * at.query_stride
        if tiles.has_planes(kept):
            _load_multiplied(source, dim, shape.key_order, at.row, kind)
            _split_query(at.row, dim, to, kind)
        elif tiles.scale_words(kept):
            _load_multiplied(source, dim, shape.key_order, to, kind)
        elif tiles.is_multiplied_as_words(kept):
            for w in range(words(dim, per_word)):
                tiles.copy_word(source + 4 * w, dim - w * per_word, to + 4 * w, kind)
        else:
            for d in range(dim):
                simd.store_float(tiles.load_item(source + d * size, kind), to + 4 * d)
            _clear(to + 4 * dim, to + at.query_stride)


@kernel
def _store_rounded(source, count, order, row, target, stride, scale_at, kind):  # type: ignore[no-untyped-def]
    """A row of `count` items, times Hadamard matrices, in int8, its words `stride` bytes apart. The scale makes good
    for the factor of two such products; where not all items are finite, it is NaN. `row` is room for the row."""
    _load_multiplied(source, count, order, row, kind)
    top, flaw = hadamard.largest(row, count)
    scale = top / _MOST + flaw
    for i in range(0, count, LANES):
        words_here = (min(count - i, LANES) + 3) // 4
        tiles.write_rounded(simd.load(row + 4 * i), scale, target + i // 4 * stride, stride, words_here)
    simd.store_float(scale / _F(order), scale_at)


@kernel
def _store_row(kv, region, shape, pages, head, row, token, at, kind, kept):  # type: ignore[no-untyped-def]
    """Has the K and V of one row and head in their place, copied or rounded to int8."""
    heads, per_word, d, e = shape.num_kv_heads, tiles.items_per_word(kind), shape.head_dim, shape.value_dim
    size, within = 4 // per_word, token % LANES
    if tiles.scale_words(kept):
        key_words, value_words = row_words(d, kept), row_words(e, kept)
        source = region + shape.k + (row * heads + head) * d * size
        to = key_address(kv, shape, pages, head, token - within, key_words)
        scale_at = to + (key_words - 1) * ROW + within * 4
        _store_rounded(source, d, shape.key_order, at.row, to + within * 4, ROW, scale_at, kind)
        if not shape.values_in_keys:
            source = region + shape.v + (row * heads + head) * e * size
            to = value_address(kv, shape, pages, head, token - within, value_words)
            scale_at = to + (value_words - 1) * ROW + within * 4
            to += within * (value_words - 1) * 4
            _store_rounded(source, e, shape.value_order, at.row, to, 4, scale_at, kind)
        return
    key_words, value_words = words(d, per_word), words(e, per_word)
    source = region + shape.k + (row * heads + head) * d * size
    to = key_address(kv, shape, pages, head, token - within, key_words) + within * 4
    for w in range(key_words):
        tiles.copy_word(source + 4 * w, d - w * per_word, to + w * ROW, kind)
    if shape.values_in_keys:
        return
    source = region + shape.v + (row * heads + head) * e * size
    to = value_address(kv, shape, pages, head, token, value_words)
    for w in range(value_words):
        tiles.copy_word(source + 4 * w, e - w * per_word, to + 4 * w, kind)


@kernel
def _attend_chunk(kv, shape, pages, unit, head, at, start, stop, end, kind, kept):  # type: ignore[no-untyped-def]
    count = unit.last - unit.first
    _clear(at.sums, at.sums + count * at.sum_stride)
    _clear(at.l, at.l + count * ROW)
    for i in range(count):
        simd.store_float(_LOWEST, at.m + 4 * i)
    for block in range(start // BLOCK * BLOCK, stop, BLOCK):
        begin, limit = max(start, block), min(stop, block + BLOCK)
        find_groups(kv, shape, pages, head, block, begin, limit, end, kept, at)
        if shape.values_in_keys:
            turn_values(shape, at, block, begin, limit, tiles.items_per_word(kept))
        attend_block(unit, shape, at, block, begin, limit, kind, kept)


@kernel
def _attend_item(kv, region, all_pages, unit, shape, head, at, partials, kind, kept):  # type: ignore[no-untyped-def]
    heads, count, stride = shape.num_heads // shape.num_kv_heads, unit.last - unit.first, at.sum_stride
    pages = all_pages[unit.pages :]
    if unit.stores:
        _store_row(kv, region, shape, pages, head, unit.row, unit.position, at, kind, kept)
    _load_queries(region, unit, shape, head, at, kind, kept)
    end = unit.position + (unit.last - 1) // heads + 1
    begin = first_seen(shape, unit.position + unit.first // heads)
    begin, end = max(begin, unit.chunk * CHUNK), min(end, unit.chunk_stop * CHUNK)
    is_single = unit.chunk_stop - unit.chunk == 1
    ask_for_first(kv, shape, pages, head, begin, end, kept)
    for chunk in range(unit.chunk, unit.chunk_stop):
        start, stop = max(begin, chunk * CHUNK), min(end, (chunk + 1) * CHUNK)
        _attend_chunk(kv, shape, pages, unit, head, at, start, stop, end, kind, kept)
        for i in range(count):
            sums, total = at.sums + i * stride, at.total + i * stride
            m, l = simd.load_float(at.m + 4 * i), simd.total(simd.load(at.l + i * ROW))  # noqa: E741
            if unit.partial >= 0:
                to = partials + ((unit.partial * shape.num_kv_heads + head * count) + i) * _partial_bytes(at)
                for j in range(0, stride, ROW):
                    simd.store(simd.load(sums + j), to + j)
                simd.store_float(m, to + stride)
                simd.store_float(l, to + stride + 4)
            elif is_single:
                _write(region, unit, i, shape, head, sums, m, l, at.line, kind, kept)
            else:
                if chunk == unit.chunk:
                    _clear(total, total + stride)
                    simd.store_float(_LOWEST, at.total_m + 4 * i)
                    simd.store_float(_ZERO, at.total_l + 4 * i)
                m, l = _join(  # noqa: E741
                    total, simd.load_float(at.total_m + 4 * i), simd.load_float(at.total_l + 4 * i), sums, m, l, stride
                )
                simd.store_float(m, at.total_m + 4 * i)
                simd.store_float(l, at.total_l + 4 * i)
                if chunk == unit.chunk_stop - 1:
                    _write(region, unit, i, shape, head, total, m, l, at.line, kind, kept)


@kernel
def _unit(units, index):  # type: ignore[no-untyped-def]
    u = units[index]
    return layout.Unit(u[0], u[1], u[2], u[3], u[4], u[5], u[6], u[7], u[8])


@_entry
def attend(kv, region, pages, units, shape, scratch, partials, counter, kind, kept):  # type: ignore[no-untyped-def]
    """One thread's part in the attention of a micro-batch in one layer; threads share all but `scratch`.

    kv, region, scratch, partials: addresses of the KV arena, of the micro-batch's exchange region, of memory for
    Places, and of partial_bytes() per query of a partial unit. pages: int64, the pages of all sequences, one after
    another. units: int64 `[U, 9]`, see Unit. counter: int64 `[1]`, 0 before the first thread begins. kind, kept: see
    simd.py, of what is in the region and of what is in the pages; these differ where `kept` is int8.
    """
    at = _places(scratch, shape.head_dim, shape.value_dim, tiles.items_per_word(kept), shape.values_in_keys)
    while True:
        item = simd.fetch_add(counter)
        if item >= len(units) * shape.num_kv_heads:
            return
        unit, head = _unit(units, item // shape.num_kv_heads), item % shape.num_kv_heads
        _attend_item(kv, region, pages, unit, shape, head, at, partials, kind, kept)


@_entry
def join(region, units, joins, shape, scratch, partials, counter, kind, kept):  # type: ignore[no-untyped-def]
    """One thread's part in joining partial results, once all of `attend` is done; arguments as there.

    joins: int64 `[J, 2]`, the first unit and the number of units of each sequence whose chunks are units of their own.
    """
    at = _places(scratch, shape.head_dim, shape.value_dim, tiles.items_per_word(kept), shape.values_in_keys)
    size = _partial_bytes(at)
    while True:
        item = simd.fetch_add(counter)
        if item >= len(joins) * shape.num_kv_heads:
            return
        first, head = joins[item // shape.num_kv_heads, 0], item % shape.num_kv_heads
        num_units = joins[item // shape.num_kv_heads, 1]
        unit = _unit(units, first)
        count = unit.last - unit.first
        for i in range(count):
            _clear(at.total, at.total + at.sum_stride)
            m, l = _LOWEST, _ZERO  # noqa: E741
            for part in range(num_units):
                sums = partials + ((unit.partial + part * count) * shape.num_kv_heads + head * count + i) * size
                other_m, other_l = simd.load_float(sums + at.sum_stride), simd.load_float(sums + at.sum_stride + 4)
                m, l = _join(at.total, m, l, sums, other_m, other_l, at.sum_stride)  # noqa: E741
            _write(region, unit, i, shape, head, at.total, m, l, at.line, kind, kept)


@_entry
def store(kv, region, pages, pieces, shape, scratch, counter, kind, kept):  # type: ignore[no-untyped-def]
    """One thread's part in storing a micro-batch's K and V rows in their pages; arguments as above.

    pieces: int64 `[P, 4]`: first row, number of rows, position of the first, where the sequence's pages begin.
    """
    at = _places(scratch, shape.head_dim, shape.value_dim, tiles.items_per_word(kept), shape.values_in_keys)
    while True:
        index = simd.fetch_add(counter)
        if index >= len(pieces):
            return
        row, num_rows, position = pieces[index, 0], pieces[index, 1], pieces[index, 2]
        own = pages[pieces[index, 3] :]
        for head in range(shape.num_kv_heads):
            for i in range(num_rows):
                _store_row(kv, region, shape, own, head, row + i, position + i, at, kind, kept)
