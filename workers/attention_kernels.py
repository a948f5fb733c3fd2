"""The CPU attention kernels: K and V into the pages, and decode attention over them.

Arrays of bfloat16 and float16 are uint16 here; every sum is float32. A thread takes *items* from a shared
counter: a unit (some queries of one sequence, a range of its chunks of CHUNK tokens) and one key/value head.
It goes through the chunks in blocks of BLOCK tokens, widened to float32 in its own piece of `work`, and
keeps a running maximum m, sum of weights l and weighted sum of values per query. Chunks are joined by
log-sum-exp, in order, in the item or afterwards, with the same arithmetic: a query's result depends neither
on the rest of the batch nor on the number of threads.

Scores are kept in base 2: multiplied by log2(e), so that softmax needs 2**x only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from flexgen_lite.workers import attention_simd as simd

BLOCK = 32  # tokens
AHEAD = 96  # tokens between what is computed and what is asked for
CHUNK = 512  # tokens, a multiple of BLOCK
QUERIES = 32  # at most, per unit
STORE_ROWS = 64  # at most, per piece of a store

LANES = simd.LANES
_F = np.float32
LOG2_E = _F(1.4426950408889634)
_MASKED = _F(-1e30)
_LOWEST = _F(-126.0)
_ONE, _HALF, _ZERO, _TWO = _F(1), _F(0.5), _F(0), _F(2)
# 2**f for f in [-0.5, 0.5]: the polynomial of least relative error (2e-9) with constant term 1, found by
# Lawson's iteration.
_C1, _C2, _C3 = _F(0.6931471824645996), _F(0.24022647738456726), _F(0.055503323674201965)
_C4, _C5, _C6 = _F(0.00961843691766262), _F(0.0013398875016719103), _F(0.00015353361959569156)

_CAREFUL = {"contract", "reassoc", "nsz", "arcp"}  # fast, and NaN stays NaN
_kernel: Any = njit(nogil=True, fastmath=_CAREFUL, _nrt=False)
_entry: Any = njit(nogil=True, cache=True, fastmath=_CAREFUL, _nrt=False)


class Shape(NamedTuple):
    """A layer's attention as the kernels need it. Offsets are in items of the arena they point into."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    page_tokens: int
    window: int  # tokens a query sees, itself included; 0: all
    half: bool  # 16-bit items are float16, not bfloat16
    has_sinks: bool
    scaling: np.float32
    softcap: np.float32  # 0: none
    keys: int  # of the layer, in the KV arena
    values: int
    q: int  # of the parts, in an exchange region
    k: int
    v: int
    out: int
    sinks: int  # in float32 items


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


class Places(NamedTuple):
    """Where things lie in a thread's piece of `work`, and the row strides, all in floats."""

    key_stride: int
    value_stride: int
    query: int
    block: int
    score: int
    sums: int
    total: int
    m: int
    l: int  # noqa: E741
    keep: int
    total_m: int
    total_l: int
    num_floats: int


def places(head_dim: int, value_dim: int) -> Places:
    key_stride = -(-head_dim // LANES) * LANES
    value_stride = -(-value_dim // (4 * LANES)) * (4 * LANES)
    block = QUERIES * key_stride
    score = block + BLOCK * max(key_stride, value_stride)
    sums = score + QUERIES * BLOCK
    total = sums + QUERIES * value_stride
    m = total + QUERIES * value_stride
    end = m + 5 * QUERIES
    return Places(
        key_stride, value_stride, 0, block, score, sums, total,
        m, m + QUERIES, m + 2 * QUERIES, m + 3 * QUERIES, m + 4 * QUERIES, end,
    )  # fmt: skip


_places: Any = _kernel(places)


@_kernel
def _exp2(x):  # type: ignore[no-untyped-def]
    bounded = x if x > _LOWEST else _LOWEST
    whole = np.floor(bounded + _HALF)
    f = bounded - whole
    fraction = _ONE + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
    return fraction * simd.power_of_two(np.int32(whole)) if x > _LOWEST else _ZERO


@_kernel
def _copy(source, target):  # type: ignore[no-untyped-def]
    for i in range(source.size):
        target[i] = source[i]


@_kernel
def _widen(source, half, target):  # type: ignore[no-untyped-def]
    if half:
        for i in range(source.size):
            target[i] = simd.widen_float16(source[i])
    else:
        for i in range(source.size):
            target[i] = simd.widen_bfloat16(source[i])


@_kernel
def _load_rows(kv, at, pages, shape, head, width, start, stop, work, to, stride):  # type: ignore[no-untyped-def]
    """Widens one head's rows of tokens start .. stop into work[to:], `stride` apart, zeros behind them."""
    token = start
    while token < stop:
        page, within = pages[token // shape.page_tokens], token % shape.page_tokens
        count = min(shape.page_tokens - within, stop - token)
        source = at + ((page * shape.num_kv_heads + head) * shape.page_tokens + within) * width
        if stride == width:
            _widen(kv[source : source + count * width], shape.half, work[to : to + count * width])
        else:
            for i in range(count):
                row = to + i * stride
                _widen(kv[source + i * width : source + (i + 1) * width], shape.half, work[row : row + width])
                work[row + width : row + stride] = _ZERO
        token += count
        to += count * stride


@_kernel
def _prefetch_rows(kv, at, pages, shape, head, width, start, stop):  # type: ignore[no-untyped-def]
    """Asks for the rows that _load_rows will want next."""
    token = start
    while token < stop:
        page, within = pages[token // shape.page_tokens], token % shape.page_tokens
        count = min(shape.page_tokens - within, stop - token)
        source = at + ((page * shape.num_kv_heads + head) * shape.page_tokens + within) * width
        for i in range(source, source + count * width, 64 // kv.itemsize):
            simd.prefetch(kv, i)
        token += count


@_kernel
def _load_queries(exchange, region, unit, shape, head, work, at):  # type: ignore[no-untyped-def]
    """Widens the unit's queries, scaled so that their products with keys are what _weigh expects."""
    group = shape.num_heads // shape.num_kv_heads
    scale = shape.scaling * LOG2_E
    if shape.softcap > _ZERO:
        scale = scale * _TWO / shape.softcap
    for i in range(unit.last - unit.first):
        row, member = (unit.first + i) // group, (unit.first + i) % group
        source = region + shape.q + ((unit.row + row) * shape.num_heads + head * group + member) * shape.head_dim
        to = at.query + i * at.key_stride
        part = work[to : to + shape.head_dim]
        _widen(exchange[source : source + shape.head_dim], shape.half, part)
        for d in range(shape.head_dim):
            part[d] *= scale
        work[to + shape.head_dim : to + at.key_stride] = _ZERO


@njit(nogil=True, fastmath=True, _nrt=False)
def _largest(scores):  # type: ignore[no-untyped-def]
    largest = _MASKED
    for j in range(BLOCK):
        largest = max(largest, scores[j])
    return largest


@_kernel
def _weigh(scores, start, stop, softcap, m):  # type: ignore[no-untyped-def]
    """Scores of a block become weights, zero outside start .. stop. Returns the new maximum and the sum."""
    if softcap > _ZERO:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1); the scores are 2 x in base 2, up to where float32 has tanh(x) = 1.
        for j in range(BLOCK):
            x = min(max(scores[j], _F(-64.0)), _F(64.0))
            scores[j] = softcap * LOG2_E * (_ONE - _TWO / (_exp2(x) + _ONE))
    for j in range(BLOCK):
        scores[j] = scores[j] if start <= j < stop else _MASKED
    m = max(m, _largest(scores))
    total = _ZERO
    for j in range(BLOCK):
        scores[j] = _exp2(scores[j] - m)
        total += scores[j]
    return m, total


@_kernel
def _score(work, at, count, start, stop):  # type: ignore[no-untyped-def]
    """Scores of `count` queries with the block's keys start .. stop (and some around them, to be ignored)."""
    stride = at.key_stride
    for j in range(start // LANES * LANES, stop, LANES):
        key, query, score = at.block + j * stride, at.query, at.score + j
        i = 0
        while i + 2 <= count:
            simd.dot_2(work, query, stride, key, stride, stride, score, BLOCK)
            query, score, i = query + 2 * stride, score + 2 * BLOCK, i + 2
        if i < count:
            simd.dot_1(work, query, stride, key, stride, stride, score, BLOCK)


@_kernel
def _add_values(work, at, count, start, stop):  # type: ignore[no-untyped-def]
    """Adds the block's values start .. stop, weighted, to the sums of `count` queries."""
    stride, tokens = at.value_stride, stop - start
    value = at.block + start * stride
    i = 0
    while i + 2 <= count:
        p, sums, keep = at.score + i * BLOCK + start, at.sums + i * stride, at.keep + i
        for e in range(0, stride, 4 * LANES):
            simd.add_2x4(work, p, BLOCK, value + e, stride, tokens, sums + e, stride, keep)
        i += 2
    if i < count:
        p, sums, keep = at.score + i * BLOCK + start, at.sums + i * stride, at.keep + i
        e = 0
        while e + 8 * LANES <= stride:
            simd.add_1x8(work, p, BLOCK, value + e, stride, tokens, sums + e, stride, keep)
            e += 8 * LANES
        if e < stride:
            simd.add_1x4(work, p, BLOCK, value + e, stride, tokens, sums + e, stride, keep)


@_kernel
def _attend_block(kv, pages, unit, shape, head, work, at, block, start, stop, end):  # type: ignore[no-untyped-def]
    """Joins tokens start .. stop of the block that begins at token `block` to the chunk's m, l and sums.

    `end`: of all that the unit will read. The block AHEAD is asked for while this one is computed.
    """
    group, count = shape.num_heads // shape.num_kv_heads, unit.last - unit.first
    key_to, value_to = (
        at.block + (start - block) * at.key_stride,
        at.block + (start - block) * at.value_stride,
    )
    ahead, far = min(end, stop + AHEAD), min(end, stop + AHEAD + BLOCK)
    _load_rows(kv, shape.keys, pages, shape, head, shape.head_dim, start, stop, work, key_to, at.key_stride)
    _prefetch_rows(kv, shape.values, pages, shape, head, shape.value_dim, ahead, far)
    _score(work, at, count, start - block, stop - block)
    for i in range(count):
        seen = unit.position + (unit.first + i) // group + 1
        begin = max(0, seen - shape.window) if shape.window > 0 else 0
        scores = work[at.score + i * BLOCK : at.score + (i + 1) * BLOCK]
        if seen <= start or begin >= stop:
            scores[:] = _ZERO
            work[at.keep + i] = _ONE
            continue
        m = work[at.m + i]
        new_m, total = _weigh(scores, max(start, begin) - block, min(stop, seen) - block, shape.softcap, m)
        keep = _exp2(m - new_m)
        work[at.m + i], work[at.keep + i] = new_m, keep
        work[at.l + i] = work[at.l + i] * keep + total
    _load_rows(kv, shape.values, pages, shape, head, shape.value_dim, start, stop, work, value_to, at.value_stride)
    _prefetch_rows(kv, shape.keys, pages, shape, head, shape.head_dim, ahead, far)
    _add_values(work, at, count, start - block, stop - block)


@_kernel
def _join(total, total_m, total_l, sums, m, l):  # type: ignore[no-untyped-def]  # noqa: E741
    """Adds one query's chunk (m, l, sums) to a running total by log-sum-exp; returns the total's m, l."""
    new_m = max(total_m, m)
    a, b = _exp2(total_m - new_m), _exp2(m - new_m)
    for e in range(total.size):
        total[e] = total[e] * a + sums[e] * b
    return new_m, total_l * a + l * b


@_kernel
def _write(exchange, floats, region, unit, i, shape, head, total, m, l):  # type: ignore[no-untyped-def] # noqa: E741
    """Writes one query's output, rounded to the storage dtype."""
    group = shape.num_heads // shape.num_kv_heads
    row, query_head = unit.row + (unit.first + i) // group, head * group + (unit.first + i) % group
    scale = _ONE
    if shape.has_sinks:
        sink = floats[region * exchange.itemsize // 4 + shape.sinks + query_head] * LOG2_E
        new_m = max(m, sink)
        scale = _exp2(m - new_m)
        l = l * scale + _exp2(sink - new_m)  # noqa: E741
    scale = scale / l
    to = region + shape.out + (row * shape.num_heads + query_head) * shape.value_dim
    out = exchange[to : to + shape.value_dim]
    if shape.half:
        for e in range(out.size):
            out[e] = simd.narrow_float16(total[e] * scale, out[e])
    else:
        for e in range(out.size):
            out[e] = simd.narrow_bfloat16(total[e] * scale, out[e])


@_kernel
def _attend_item(kv, exchange, floats, region, all_pages, unit, shape, head, work, at, partials):  # type: ignore[no-untyped-def]
    group, count, stride = shape.num_heads // shape.num_kv_heads, unit.last - unit.first, at.value_stride
    pages = all_pages[unit.pages :]
    _load_queries(exchange, region, unit, shape, head, work, at)
    end = unit.position + (unit.last - 1) // group + 1
    begin = max(0, unit.position + unit.first // group + 1 - shape.window) if shape.window > 0 else 0
    begin, end = max(begin, unit.chunk * CHUNK), min(end, unit.chunk_stop * CHUNK)
    near = min(end, begin + AHEAD + BLOCK)
    _prefetch_rows(kv, shape.keys, pages, shape, head, shape.head_dim, begin, near)
    _prefetch_rows(kv, shape.values, pages, shape, head, shape.value_dim, begin, near)
    work[at.total : at.total + count * stride] = _ZERO
    work[at.total_m : at.total_m + count] = _MASKED
    work[at.total_l : at.total_l + count] = _ZERO
    for chunk in range(unit.chunk, unit.chunk_stop):
        work[at.sums : at.sums + count * stride] = _ZERO
        work[at.m : at.m + count] = _MASKED
        work[at.l : at.l + count] = _ZERO
        for block in range(chunk * CHUNK, (chunk + 1) * CHUNK, BLOCK):
            start, stop = max(begin, block), min(end, block + BLOCK)
            if start < stop:
                _attend_block(kv, pages, unit, shape, head, work, at, block, start, stop, end)
        if unit.partial >= 0:
            to = (unit.partial * shape.num_kv_heads + head * count) * (stride + 2)
            for i in range(count):
                sums = at.sums + i * stride
                _copy(work[sums : sums + stride], partials[to : to + stride])
                partials[to + stride], partials[to + stride + 1] = work[at.m + i], work[at.l + i]
                to += stride + 2
            return
        for i in range(count):
            total = work[at.total + i * stride : at.total + (i + 1) * stride]
            sums = work[at.sums + i * stride : at.sums + (i + 1) * stride]
            m, l = _join(  # noqa: E741
                total, work[at.total_m + i], work[at.total_l + i], sums, work[at.m + i], work[at.l + i]
            )
            work[at.total_m + i], work[at.total_l + i] = m, l
    for i in range(count):
        total = work[at.total + i * stride : at.total + (i + 1) * stride]
        _write(exchange, floats, region, unit, i, shape, head, total, work[at.total_m + i], work[at.total_l + i])


@_kernel
def _unit(units, index):  # type: ignore[no-untyped-def]
    u = units[index]
    return Unit(u[0], u[1], u[2], u[3], u[4], u[5], u[6], u[7])


@_entry
def attend(kv, exchange, floats, region, pages, units, shape, work, partials, counter):  # type: ignore[no-untyped-def]
    """One thread's part in the attention of a micro-batch in one layer; threads share all but `work`.

    kv: the KV arena's items, flat. exchange: the exchange arena's items, flat; floats: the same memory as
    float32. region: where the micro-batch's region begins, in items. pages: int64, the pages of all
    sequences, one after another. units: int64 `[U, 8]`, see Unit. work: float32, see Places. partials:
    float32, value_stride + 2 per query of a partial unit. counter: int64 `[1]`, 0 before the first thread
    begins.
    """
    at = _places(shape.head_dim, shape.value_dim)
    while True:
        item = simd.fetch_add(counter, 0)
        if item >= len(units) * shape.num_kv_heads:
            return
        unit, head = _unit(units, item // shape.num_kv_heads), item % shape.num_kv_heads
        _attend_item(kv, exchange, floats, region, pages, unit, shape, head, work, at, partials)


@_entry
def join(exchange, floats, region, units, joins, shape, work, partials, counter):  # type: ignore[no-untyped-def]
    """One thread's part in joining partial results, once all of `attend` is done; arguments as there.

    joins: int64 `[J, 2]`, the first unit and the number of units of each sequence whose chunks are units of
    their own.
    """
    at = _places(shape.head_dim, shape.value_dim)
    stride = at.value_stride
    while True:
        item = simd.fetch_add(counter, 0)
        if item >= len(joins) * shape.num_kv_heads:
            return
        first, head = joins[item // shape.num_kv_heads, 0], item % shape.num_kv_heads
        num_units = joins[item // shape.num_kv_heads, 1]
        unit = _unit(units, first)
        count = unit.last - unit.first
        total = work[at.total : at.total + stride]
        for i in range(count):
            total[:] = _ZERO
            m, l = _MASKED, _ZERO  # noqa: E741
            for part in range(num_units):
                begin = ((unit.partial + part * count) * shape.num_kv_heads + head * count + i) * (stride + 2)
                sums = partials[begin : begin + stride]
                m, l = _join(total, m, l, sums, partials[begin + stride], partials[begin + stride + 1])  # noqa: E741
            _write(exchange, floats, region, unit, i, shape, head, total, m, l)


@_kernel
def _store_piece(kv, exchange, region, pages, piece, shape):  # type: ignore[no-untyped-def]
    heads, d, e = shape.num_kv_heads, shape.head_dim, shape.value_dim
    for i in range(piece[1]):
        row, token = piece[0] + i, piece[2] + i
        page, within = pages[piece[3] + token // shape.page_tokens], token % shape.page_tokens
        for head in range(heads):
            slot = (page * heads + head) * shape.page_tokens + within
            source, to = region + shape.k + (row * heads + head) * d, shape.keys + slot * d
            _copy(exchange[source : source + d], kv[to : to + d])
            source, to = region + shape.v + (row * heads + head) * e, shape.values + slot * e
            _copy(exchange[source : source + e], kv[to : to + e])


@_entry
def store(kv, exchange, region, pages, pieces, shape, counter):  # type: ignore[no-untyped-def]
    """One thread's part in copying a micro-batch's K and V rows into their pages; arguments as above.

    pieces: int64 `[P, 4]`: first row, number of rows, position of the first, where the sequence's pages
    begin.
    """
    while True:
        index = simd.fetch_add(counter, 0)
        if index >= len(pieces):
            return
        _store_piece(kv, exchange, region, pages, pieces[index], shape)
