"""The CPU attention kernels: K and V into the pages, and decode attention over them.

A thread takes *items* from a shared counter: a unit (some queries of one sequence, a range of its chunks of CHUNK
tokens) and one key/value head. It goes through the chunks in blocks of BLOCK tokens straight from the pages, and keeps
a running maximum m, sum of weights l and weighted sums of values per query. Chunks are joined by log-sum-exp, in order,
in the item or afterwards, with the same arithmetic: a query's result depends neither on the rest of the batch nor on
the number of threads.

Memory is named by address; how keys and values lie in a page is said in attention_tiles.py. Scores are kept in base 2:
multiplied by log2(e), so that softmax needs 2**x only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from flexgen_lite.workers import simd
from flexgen_lite.workers.attention import tiles
from flexgen_lite.workers.attention.tiles import LINES, ROW
from flexgen_lite.workers.simd import LANES

BLOCK = 64  # tokens, a multiple of 4 LANES
GROUPS = BLOCK // LANES  # of a block
AHEAD = 8  # groups of LANES tokens between what is computed and what is asked for
CHUNK = 512  # tokens, a multiple of BLOCK
QUERIES = 32  # at most, per unit
STORE_ROWS = 64  # at most, per piece of a store

_F = np.float32
_ZERO, _ONE, _TWO = _F(0), _F(1), _F(2)
_LOG2_E = _F(1.4426950408889634)
_LOWEST = _F(-1e30)  # the maximum before the first score
_HIDDEN = _F(-1e35)  # a score that is masked: far below that

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False}
_kernel: Any = njit(**_OPTIONS)
_entry: Any = njit(cache=True, **_OPTIONS)

_score_1x4, _score_1x1 = tiles.score_tile(1, 4), tiles.score_tile(1, 1)
_score_2x2, _score_2x1 = tiles.score_tile(2, 2), tiles.score_tile(2, 1)
_score_4x1 = tiles.score_tile(4, 1)
_values_1, _values_2, _values_4 = (tiles.value_tile(n, LINES) for n in (1, 2, 4))
_tail_1, _tail_2, _tail_4 = (tiles.value_tile(n, 1, masked=True) for n in (1, 2, 4))


class Shape(NamedTuple):
    """A layer's attention as the kernels need it. Offsets are in bytes: `keys` and `values` of the layer in the KV
    arena, the rest in an exchange region."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    page_shift: int  # log2 of the tokens of a page
    window: int  # tokens a query sees, itself included; 0: all
    has_sinks: bool
    scaling: np.float32
    softcap: np.float32  # 0: none
    keys: int
    values: int
    q: int
    k: int
    v: int
    out: int
    sinks: int


class Unit(NamedTuple):
    """The columns of `units`. Queries count row by row, in a row by head of the KV head's group."""

    row: int
    position: int  # of the row
    pages: int  # where the sequence's pages begin in `pages`
    first: int  # query
    last: int  # query, exclusive
    chunk: int
    chunk_stop: int
    partial: int  # -1: the whole of these queries; else where its result goes, in queries per key/value head
    stores: int  # 1: the row's K and V are to be stored first


class Places(NamedTuple):
    """Where things lie in a thread's scratch memory, and the strides of rows, in bytes."""

    query_stride: int
    score_stride: int
    sum_stride: int
    query: int
    where: int  # of the block's groups: keys, keys ahead, values, values ahead; int64 each
    score: int
    sums: int
    total: int
    m: int
    l: int  # noqa: E741  # a vector each, whose lanes are yet to be summed
    total_m: int
    total_l: int
    line: int
    end: int


def places(base: int, head_dim: int, value_dim: int, per_word: int) -> Places:
    """`base` is a multiple of 64; so is what the places take together, `end` - `base`."""
    query_stride = ((head_dim + per_word - 1) // per_word * per_word * 4 + 63) // 64 * 64
    sum_stride = ((value_dim + per_word - 1) // per_word + LANES - 1) // LANES * per_word * ROW
    where = base + QUERIES * query_stride
    score = where + 4 * GROUPS * 8
    sums = score + QUERIES * BLOCK * 4
    total = sums + QUERIES * sum_stride
    m = total + QUERIES * sum_stride
    sum_of_weights = m + QUERIES * 4
    total_m = sum_of_weights + QUERIES * ROW
    total_l = total_m + QUERIES * 4
    line = total_l + QUERIES * 4
    return Places(
        query_stride, BLOCK * 4, sum_stride, base, where, score, sums, total,
        m, sum_of_weights, total_m, total_l, line, line + ROW,
    )  # fmt: skip


def partial_bytes(value_dim: int, per_word: int) -> int:
    """Of one query of a partial unit and one KV head: its sums, m and l."""
    return places(0, 1, value_dim, per_word).sum_stride + 64


_places: Any = _kernel(places)


@_kernel
def _partial_bytes(at):  # type: ignore[no-untyped-def]
    return at.sum_stride + 64


@_kernel
def _words(dim, per_word):  # type: ignore[no-untyped-def]
    """Words of a row of `dim` items."""
    return (dim + per_word - 1) // per_word


@_kernel
def _exp2(x):  # type: ignore[no-untyped-def]
    return simd.first(simd.exp2(simd.splat(x)))


@_kernel
def _clear(start, stop):  # type: ignore[no-untyped-def]
    for at in range(start, stop, 4):
        simd.store_float(_ZERO, at)


@_kernel
def _scale(start, stop, factor):  # type: ignore[no-untyped-def]
    factors = simd.splat(factor)
    for at in range(start, stop, ROW):
        simd.store(simd.multiply(simd.load(at), factors), at)


@_kernel
def _key_address(kv, shape, pages, head, token, width):  # type: ignore[no-untyped-def]
    """Of the group that `token` is the first of; `width` words are a key."""
    page, within = pages[token >> shape.page_shift], token & ((1 << shape.page_shift) - 1)
    return kv + shape.keys + ((((page * shape.num_kv_heads + head) << shape.page_shift) + within) * width) * 4


@_kernel
def _value_address(kv, shape, pages, head, token, width):  # type: ignore[no-untyped-def]
    page, within = pages[token >> shape.page_shift], token & ((1 << shape.page_shift) - 1)
    return kv + shape.values + ((((page * shape.num_kv_heads + head) << shape.page_shift) + within) * width) * 4


@_kernel
def _find_groups(kv, shape, pages, head, block, start, stop, end, per_word, at):  # type: ignore[no-untyped-def]
    """Notes where the block's groups lie that hold tokens of start .. stop, and those AHEAD of them up to `end`."""
    key_words, value_words = _words(shape.head_dim, per_word), _words(shape.value_dim, per_word)
    for g in range((start - block) // LANES, (stop - block + LANES - 1) // LANES):
        token = block + g * LANES
        ahead = token + AHEAD * LANES
        ahead = ahead if ahead < end else token
        to = at.where + 8 * g
        tiles.store_address(_key_address(kv, shape, pages, head, token, key_words), to)
        tiles.store_address(_key_address(kv, shape, pages, head, ahead, key_words), to + 8 * GROUPS)
        tiles.store_address(_value_address(kv, shape, pages, head, token, value_words), to + 16 * GROUPS)
        tiles.store_address(_value_address(kv, shape, pages, head, ahead, value_words), to + 24 * GROUPS)


@_kernel
def _ask_for_first(kv, shape, pages, head, begin, end, per_word):  # type: ignore[no-untyped-def]
    """Asks for the first AHEAD groups of an item."""
    key_words, value_words = _words(shape.head_dim, per_word), _words(shape.value_dim, per_word)
    begin = begin // LANES * LANES
    for token in range(begin, min(end, begin + AHEAD * LANES), LANES):
        keys = _key_address(kv, shape, pages, head, token, key_words)
        values = _value_address(kv, shape, pages, head, token, value_words)
        for at in range(keys, keys + key_words * ROW, 64):
            tiles.prefetch(at)
        for at in range(values, values + value_words * ROW, 64):
            tiles.prefetch(at)


@_kernel
def _tile_size(left):  # type: ignore[no-untyped-def]
    """Queries of the next tile, with `left` to come."""
    return 4 if left >= 4 else 2 if left >= 2 else 1


@_kernel
def _score(at, i, size, first, last, width, kind):  # type: ignore[no-untyped-def]
    """Scores of queries i .. i + size with groups first .. last of the block; `width` words are a key."""
    query, stride = at.query + i * at.query_stride, at.query_stride
    where, score = at.where + 8 * first, at.score + i * at.score_stride + first * ROW
    ahead = where + 8 * GROUPS if i == 0 else where
    g = first
    while g < last:
        step = 1
        if size == 1 and g + 4 <= last:
            step = 4
            _score_1x4(where, ahead, query, stride, width, score, at.score_stride, kind)
        elif size == 1:
            _score_1x1(where, ahead, query, stride, width, score, at.score_stride, kind)
        elif size == 2 and g + 2 <= last:
            step = 2
            _score_2x2(where, ahead, query, stride, width, score, at.score_stride, kind)
        elif size == 2:
            _score_2x1(where, ahead, query, stride, width, score, at.score_stride, kind)
        else:
            _score_4x1(where, ahead, query, stride, width, score, at.score_stride, kind)
        g, where, ahead, score = g + step, where + 8 * step, ahead + 8 * step, score + step * ROW


@_kernel
def _weigh(at, i, first, last, start, stop, shape):  # type: ignore[no-untyped-def]
    """Scores of groups first .. last become weights, zero outside tokens start .. stop of the block; m, l and the sums
    follow."""
    scores = at.score + i * at.score_stride
    scale = shape.scaling * _LOG2_E
    scales, zero, hidden = simd.splat(scale), simd.splat(_ZERO), _HIDDEN
    if shape.softcap > _ZERO:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1); 2 x in base 2 is kept to where float32 has tanh(x) = 1.
        scales = simd.splat(scale * _TWO / shape.softcap)
        one, two, low, cap = (
            simd.splat(_ONE),
            simd.splat(_TWO),
            simd.splat(_F(-64)),
            simd.splat(shape.softcap * _LOG2_E),
        )
    top = simd.splat(_HIDDEN)
    for g in range(first, last):
        x = simd.multiply(simd.load(scores + g * ROW), scales)
        if shape.softcap > _ZERO:
            x = simd.maximum(low, x)
            x = simd.subtract(zero, simd.maximum(low, simd.subtract(zero, x)))
            x = simd.multiply(cap, simd.subtract(one, simd.divide(two, simd.add(simd.exp2(x), one))))
        if g * LANES < start or (g + 1) * LANES > stop:
            x = simd.hide(x, start - g * LANES, stop - g * LANES - 1, hidden)
        top = simd.maximum(top, x)
        simd.store(x, scores + g * ROW)
    m, largest = simd.load_float(at.m + 4 * i), simd.largest(top)
    sum_at, l_at = at.sums + i * at.sum_stride, at.l + i * ROW
    if largest > m:
        keep = _exp2(m - largest)
        _scale(sum_at, sum_at + at.sum_stride, keep)
        simd.store(simd.multiply(simd.load(l_at), simd.splat(keep)), l_at)
        simd.store_float(largest, at.m + 4 * i)
        m = largest
    ms, total = simd.splat(m), simd.load(l_at)
    for g in range(first, last):
        x = simd.exp2(simd.subtract(simd.load(scores + g * ROW), ms))
        total = simd.add(total, x)
        simd.store(x, scores + g * ROW)
    simd.store(total, l_at)


@_kernel
def _add_values(at, i, size, first, last, start, stop, width, per_word, kind):  # type: ignore[no-untyped-def]
    """Adds the weighted values of tokens start .. stop of the block to the sums of queries i .. i + size."""
    stride = 4 * width
    for g in range(first, last):
        begin, end = max(start - g * LANES, 0), min(stop - g * LANES, LANES)
        rows = tiles.load_address(at.where + 16 * GROUPS + 8 * g) + begin * stride
        ahead = tiles.load_address(at.where + 24 * GROUPS + 8 * g) + begin * stride if i == 0 else rows
        weights = at.score + i * at.score_stride + g * ROW + 4 * begin
        sums, word, count = at.sums + i * at.sum_stride, 0, end - begin
        while word + LINES * LANES <= width:
            v, a = rows + 4 * word, ahead + 4 * word
            if size == 1:
                _values_1(v, stride, count, weights, at.score_stride, sums, at.sum_stride, a, 0, kind)
            elif size == 2:
                _values_2(v, stride, count, weights, at.score_stride, sums, at.sum_stride, a, 0, kind)
            else:
                _values_4(v, stride, count, weights, at.score_stride, sums, at.sum_stride, a, 0, kind)
            word += LINES * LANES
            sums += LINES * per_word * ROW
        while word < width:
            v, a, some = rows + 4 * word, ahead + 4 * word, min(width - word, LANES)
            if size == 1:
                _tail_1(v, stride, count, weights, at.score_stride, sums, at.sum_stride, a, some, kind)
            elif size == 2:
                _tail_2(v, stride, count, weights, at.score_stride, sums, at.sum_stride, a, some, kind)
            else:
                _tail_4(v, stride, count, weights, at.score_stride, sums, at.sum_stride, a, some, kind)
            word += LANES
            sums += per_word * ROW


@_kernel
def _attend_block(unit, shape, at, block, start, stop, per_word, kind):  # type: ignore[no-untyped-def]
    """Joins tokens start .. stop of the block that begins at token `block` to the chunk's m, l and sums."""
    heads, count = shape.num_heads // shape.num_kv_heads, unit.last - unit.first
    first, last = (start - block) // LANES, (stop - block + LANES - 1) // LANES
    key_words, value_words = _words(shape.head_dim, per_word), _words(shape.value_dim, per_word)
    i = 0
    while i < count:
        size = _tile_size(count - i)
        _score(at, i, size, first, last, key_words, kind)
        for query in range(i, i + size):
            seen = unit.position + (unit.first + query) // heads + 1
            begin = max(0, seen - shape.window) if shape.window > 0 else 0
            _weigh(at, query, first, last, max(start, begin) - block, min(stop, seen) - block, shape)
        _add_values(at, i, size, first, last, start - block, stop - block, value_words, per_word, kind)
        i += size


@_kernel
def _join(total, total_m, total_l, sums, m, l, num_bytes):  # type: ignore[no-untyped-def]  # noqa: E741
    """Adds one query's chunk (m, l, sums) to a running total by log-sum-exp; returns the total's m, l."""
    new_m = max(total_m, m)
    a, b = _exp2(total_m - new_m), _exp2(m - new_m)
    mine, other = simd.splat(a), simd.splat(b)
    for i in range(0, num_bytes, ROW):
        x = simd.multiply(simd.load(total + i), mine)
        simd.store(simd.add(x, simd.multiply(simd.load(sums + i), other)), total + i)
    return new_m, total_l * a + l * b


@_kernel
def _write(region, unit, i, shape, head, sums, m, l, line, per_word, kind):  # type: ignore[no-untyped-def] # noqa: E741
    """Writes one query's output, rounded to the storage dtype. `line` is room for a vector."""
    heads = shape.num_heads // shape.num_kv_heads
    row, query_head = unit.row + (unit.first + i) // heads, head * heads + (unit.first + i) % heads
    scale = _ONE
    if shape.has_sinks:
        sink = simd.load_float(region + shape.sinks + 4 * query_head) * _LOG2_E
        new_m = max(m, sink)
        scale = _exp2(m - new_m)
        l = l * scale + _exp2(sink - new_m)  # noqa: E741
    scale = scale / l
    size = 4 // per_word
    target = region + shape.out + (row * shape.num_heads + query_head) * shape.value_dim * size
    left = shape.value_dim
    while left >= LANES * per_word or (left > 0 and left % per_word == 0):
        count = min(left // per_word, LANES)
        tiles.write_line(sums, scale, target, count, kind)
        sums, target, left = sums + per_word * ROW, target + count * 4, left - count * per_word
    if left > 0:  # an odd number of items: the neighbour of the last is not ours
        tiles.write_line(sums, scale, line, LANES, kind)
        for e in range(left):
            simd.copy_item(line + e * size, target + e * size, np.uint16(0))


@_kernel
def _load_queries(region, unit, shape, head, at, per_word, kind):  # type: ignore[no-untyped-def]
    """The unit's queries as the tiles want them: words, or float32 with zeros behind."""
    heads, size, dim = shape.num_heads // shape.num_kv_heads, 4 // per_word, shape.head_dim
    for i in range(unit.last - unit.first):
        row, query_head = unit.row + (unit.first + i) // heads, head * heads + (unit.first + i) % heads
        source = region + shape.q + (row * shape.num_heads + query_head) * dim * size
        to = at.query + i * at.query_stride
        if tiles.is_multiplied_as_words(kind):
            for w in range(_words(dim, per_word)):
                tiles.copy_word(source + 4 * w, dim - w * per_word, to + 4 * w, kind)
        else:
            for d in range(dim):
                simd.store_float(tiles.load_item(source + d * size, kind), to + 4 * d)
            _clear(to + 4 * dim, to + at.query_stride)


@_kernel
def _store_row(kv, region, shape, pages, head, row, token, per_word, kind):  # type: ignore[no-untyped-def]
    """Copies the K and V of one row and head into their place."""
    heads, size, d, e = shape.num_kv_heads, 4 // per_word, shape.head_dim, shape.value_dim
    key_words, value_words = _words(d, per_word), _words(e, per_word)
    source = region + shape.k + (row * heads + head) * d * size
    group = token // LANES * LANES
    to = _key_address(kv, shape, pages, head, group, key_words) + (token - group) * 4
    for w in range(key_words):
        tiles.copy_word(source + 4 * w, d - w * per_word, to + w * ROW, kind)
    source = region + shape.v + (row * heads + head) * e * size
    to = _value_address(kv, shape, pages, head, token, value_words)
    for w in range(value_words):
        tiles.copy_word(source + 4 * w, e - w * per_word, to + 4 * w, kind)


@_kernel
def _attend_chunk(kv, shape, pages, unit, head, at, start, stop, end, per_word, kind):  # type: ignore[no-untyped-def]
    count = unit.last - unit.first
    _clear(at.sums, at.sums + count * at.sum_stride)
    _clear(at.l, at.l + count * ROW)
    for i in range(count):
        simd.store_float(_LOWEST, at.m + 4 * i)
    for block in range(start // BLOCK * BLOCK, stop, BLOCK):
        begin, limit = max(start, block), min(stop, block + BLOCK)
        _find_groups(kv, shape, pages, head, block, begin, limit, end, per_word, at)
        _attend_block(unit, shape, at, block, begin, limit, per_word, kind)


@_kernel
def _attend_item(kv, region, all_pages, unit, shape, head, at, partials, kind):  # type: ignore[no-untyped-def]
    per_word = tiles.items_per_word(kind)
    heads, count, stride = shape.num_heads // shape.num_kv_heads, unit.last - unit.first, at.sum_stride
    pages = all_pages[unit.pages :]
    if unit.stores:
        _store_row(kv, region, shape, pages, head, unit.row, unit.position, per_word, kind)
    _load_queries(region, unit, shape, head, at, per_word, kind)
    end = unit.position + (unit.last - 1) // heads + 1
    begin = max(0, unit.position + unit.first // heads + 1 - shape.window) if shape.window > 0 else 0
    begin, end = max(begin, unit.chunk * CHUNK), min(end, unit.chunk_stop * CHUNK)
    is_single = unit.chunk_stop - unit.chunk == 1
    _ask_for_first(kv, shape, pages, head, begin, end, per_word)
    for chunk in range(unit.chunk, unit.chunk_stop):
        start, stop = max(begin, chunk * CHUNK), min(end, (chunk + 1) * CHUNK)
        _attend_chunk(kv, shape, pages, unit, head, at, start, stop, end, per_word, kind)
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
                _write(region, unit, i, shape, head, sums, m, l, at.line, per_word, kind)
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
                    _write(region, unit, i, shape, head, total, m, l, at.line, per_word, kind)


@_kernel
def _unit(units, index):  # type: ignore[no-untyped-def]
    u = units[index]
    return Unit(u[0], u[1], u[2], u[3], u[4], u[5], u[6], u[7], u[8])


@_entry
def attend(kv, region, pages, units, shape, scratch, partials, counter, kind):  # type: ignore[no-untyped-def]
    """One thread's part in the attention of a micro-batch in one layer; threads share all but `scratch`.

    kv, region, scratch, partials: addresses of the KV arena, of the micro-batch's exchange region, of memory for
    Places, and of partial_bytes() per query of a partial unit. pages: int64, the pages of all sequences, one after
    another. units: int64 `[U, 9]`, see Unit. counter: int64 `[1]`, 0 before the first thread begins. kind: simd.py.
    """
    at = _places(scratch, shape.head_dim, shape.value_dim, tiles.items_per_word(kind))
    while True:
        item = simd.fetch_add(counter)
        if item >= len(units) * shape.num_kv_heads:
            return
        unit, head = _unit(units, item // shape.num_kv_heads), item % shape.num_kv_heads
        _attend_item(kv, region, pages, unit, shape, head, at, partials, kind)


@_entry
def join(region, units, joins, shape, scratch, partials, counter, kind):  # type: ignore[no-untyped-def]
    """One thread's part in joining partial results, once all of `attend` is done; arguments as there.

    joins: int64 `[J, 2]`, the first unit and the number of units of each sequence whose chunks are units of their own.
    """
    per_word = tiles.items_per_word(kind)
    at = _places(scratch, shape.head_dim, shape.value_dim, per_word)
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
            _write(region, unit, i, shape, head, at.total, m, l, at.line, per_word, kind)


@_entry
def store(kv, region, pages, pieces, shape, counter, kind):  # type: ignore[no-untyped-def]
    """One thread's part in copying a micro-batch's K and V rows into their pages; arguments as above.

    pieces: int64 `[P, 4]`: first row, number of rows, position of the first, where the sequence's pages begin.
    """
    per_word = tiles.items_per_word(kind)
    while True:
        index = simd.fetch_add(counter)
        if index >= len(pieces):
            return
        row, num_rows, position = pieces[index, 0], pieces[index, 1], pieces[index, 2]
        own = pages[pieces[index, 3] :]
        for head in range(shape.num_kv_heads):
            for i in range(num_rows):
                _store_row(kv, region, shape, own, head, row + i, position + i, per_word, kind)
