"""The kernel of prefill attention on the CPU: all prompts of a micro-batch in one call.

Threads take items (see prefill_packing.py) from a shared counter. Every lane of a vector is a query of its own, so
softmax needs no sum across lanes, and a key is a word spread over all of them: scores, weights and output are computed
transposed, `[key or column][query]`, and the output is turned round at the end. Up to three vectors go together: a
*trio*, which is what the registers hold.

An item goes through the keys that it may see in chunks, packed once for all its trios; a trio goes through a chunk in
blocks, with a running maximum, total and weighted sums per query. A query's result depends on nothing but its prompt.

Memory is named by address. The kinds `unit`, `computed` and `stored` are those of q and k, of the products and of the
output. Scores are kept in base 2: multiplied by log2(e), so that softmax needs 2**x only.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import cfunc, types

from flexgen_lite.workers import simd
from flexgen_lite.workers.compute import prefill_packing as packing
from flexgen_lite.workers.compute import prefill_tiles as tiles
from flexgen_lite.workers.compute.prefill_packing import CALL as CALL
from flexgen_lite.workers.compute.prefill_packing import OPTIONS, PAD, Item, kernel, padded, position
from flexgen_lite.workers.compute.prefill_tiles import ROW, ROWS
from flexgen_lite.workers.kernel_cache import from_cache
from flexgen_lite.workers.simd import LANES

TRIO = 3
VECTORS = 18  # of an item, at most
BLOCK = 128  # keys, a multiple of PAD
CHUNK = 256  # keys, a multiple of BLOCK
COUNTERS = 2  # int64 each, 0 before a call: threads that have begun, items taken

_F = np.float32
_ZERO, _ONE, _TWO = _F(0), _F(1), _F(2)
_LOG2_E = _F(1.4426950408889634)
_LOWEST = _F(-1e30)  # the maximum before the first score
_HIDDEN = _F(-1e35)  # a score that is masked: far below that

_score_3, _score_2, _score_1 = tiles.score_tile(ROWS, 3), tiles.score_tile(ROWS, 2), tiles.score_tile(2 * ROWS, 1)
_value_3, _value_2, _value_1 = tiles.value_tile(ROWS, 3), tiles.value_tile(ROWS, 2), tiles.value_tile(2 * ROWS, 1)


class Places(NamedTuple):
    """Where things lie in a thread's scratch memory, in bytes."""

    queries: int
    sums: int
    maxima: int
    totals: int
    factors: int
    scores: int
    work: int
    zeros: int
    keys: int
    values: int
    end: int


def places(base: int, depth: int, columns: int) -> Places:
    """`base` is a multiple of 64; so is what the places take together, `end` - `base`."""
    wide = (columns + PAD - 1) // PAD * PAD
    sums = base + VECTORS * depth * ROW
    maxima = sums + VECTORS * wide * ROW
    totals = maxima + VECTORS * ROW
    factors = totals + VECTORS * ROW
    scores = factors + (TRIO + 1) * ROW
    work = scores + BLOCK * TRIO * ROW
    zeros = work + LANES * ROW
    keys = zeros + wide * 4
    values = keys + CHUNK * depth * 4
    return Places(base, sums, maxima, totals, factors, scores, work, zeros, keys, values, values + CHUNK * wide * 4)


_places: Any = kernel(places)
_call: Any = simd.record(CALL)


@kernel
def _score(queries, keys, depth, count, size, scores, computed):  # type: ignore[no-untyped-def]
    """Scores of a trio of `size` vectors with `count` keys."""
    stride = 4 * depth
    if size == 3:
        for j in range(0, count, ROWS):
            _score_3(keys + j * stride, stride, queries, depth, scores + j * 3 * ROW, computed)
    elif size == 2:
        for j in range(0, count, ROWS):
            _score_2(keys + j * stride, stride, queries, depth, scores + j * 2 * ROW, computed)
    else:
        for j in range(0, count, 2 * ROWS):
            _score_1(keys + j * stride, stride, queries, depth, scores + j * ROW, computed)


@kernel
def _add_values(values, wide, weights, steps, size, sums, keep, computed):  # type: ignore[no-untyped-def]
    """Adds weighted values to the sums of a trio of `size` vectors; `keep` as in value_tile."""
    stride = 4 * wide
    if size == 3:
        for e in range(0, wide, ROWS):
            _value_3(values + 4 * e, stride, weights, steps, sums + e * 3 * ROW, keep, computed)
    elif size == 2:
        for e in range(0, wide, ROWS):
            _value_2(values + 4 * e, stride, weights, steps, sums + e * 2 * ROW, keep, computed)
    else:
        for e in range(0, wide, 2 * ROWS):
            _value_1(values + 4 * e, stride, weights, steps, sums + e * ROW, keep, computed)


@kernel
def _cap(scores, stride, count, scaling, softcap):  # type: ignore[no-untyped-def]
    """tanh(x) = 1 - 2 / (exp(2 x) + 1); 2 x in base 2 is kept to where float32 has tanh(x) = 1."""
    zero, one, two, low = simd.splat(_ZERO), simd.splat(_ONE), simd.splat(_TWO), simd.splat(_F(-64))
    factor, cap = simd.splat(scaling * _LOG2_E * _TWO / softcap), simd.splat(softcap * _LOG2_E)
    for at in range(scores, scores + count * stride, stride):
        x = simd.maximum(low, simd.multiply(simd.load(at), factor))
        x = simd.subtract(zero, simd.maximum(low, simd.subtract(zero, x)))
        tanh = simd.subtract(one, simd.divide(two, simd.add(simd.exp2(x), one)))
        simd.store(simd.multiply(tanh, cap), at)


@kernel
def _mask(scores, stride, count, first, last, hidden):  # type: ignore[no-untyped-def]
    """Hides key j from the lanes outside first + j .. last + j."""
    for j in range(count):
        if first + j > 0 or last + j < LANES - 1:
            at = scores + j * stride
            simd.store(simd.hide(simd.load(at), first + j, last + j, hidden), at)


@kernel
def _weigh(scores, stride, count, scale, maximum, total, factor, computed):  # type: ignore[no-untyped-def]
    """A vector's scores with `count` keys become weights, in place.

    Stores the factor that the sums so far need, and returns whether it is another than 1.
    """
    a, b = simd.load(scores), simd.load(scores + stride)
    for at in range(scores + 2 * stride, scores + count * stride, 2 * stride):
        a, b = simd.maximum(a, simd.load(at)), simd.maximum(b, simd.load(at + stride))
    scales, m, a_total, b_total = simd.splat(scale), simd.load(maximum), simd.load(total), simd.splat(_ZERO)
    top = simd.multiply(simd.maximum(a, b), scales)
    change = simd.splat(_ONE)
    moved = simd.any_above(top, m)
    if moved:
        top = simd.maximum(top, m)
        change = simd.exp2(simd.subtract(m, top))
        m, a_total = top, simd.multiply(a_total, change)
        simd.store(m, maximum)
    simd.store(change, factor)
    minus_m = simd.subtract(simd.splat(_ZERO), m)
    to, step = scores, stride if simd.is_bfloat16(computed) else 2 * stride
    for at in range(scores, scores + count * stride, 2 * stride):
        x = simd.exp2(simd.multiply_add(simd.load(at), scales, minus_m))
        y = simd.exp2(simd.multiply_add(simd.load(at + stride), scales, minus_m))
        a_total, b_total = simd.add(a_total, x), simd.add(b_total, y)
        tiles.store_steps(x, y, to, stride, computed)
        to += step
    simd.store(simd.add(a_total, b_total), total)
    return moved


@kernel
def _attend_block(call, item, at, vector, size, start, stop, keys, values, is_first, computed):  # type: ignore[no-untyped-def]
    """Joins the keys of tokens start .. stop to the sums of the trio that begins at `vector`."""
    count, stride, wide = padded(stop - start), size * ROW, padded(call.columns)
    _score(at.queries + vector * call.depth * ROW, keys, call.depth, count, size, at.scores, computed)
    scale = _LOG2_E * call.scaling if call.softcap == _ZERO else _ONE
    any_moved = False
    for i in range(size):
        scores, query = at.scores + i * ROW, position(item, vector + i)
        if call.softcap > _ZERO:
            _cap(scores, stride, count, call.scaling, call.softcap)
        if start + count > query + 1 or start + call.window < query + LANES:
            _mask(scores, stride, count, start - query, start - query + call.window - 1, _HIDDEN / scale)
        maximum, total = at.maxima + (vector + i) * ROW, at.totals + (vector + i) * ROW
        moved = _weigh(scores, stride, count, scale, maximum, total, at.factors + i * ROW, computed)
        any_moved = any_moved or moved
    keep = 0 if is_first else at.factors if any_moved else 1
    steps = count // 2 if simd.is_bfloat16(computed) else count
    _add_values(values, wide, at.scores, steps, size, at.sums + vector * wide * ROW, keep, computed)


@kernel
def _trio_size(vectors):  # type: ignore[no-untyped-def]
    """Of the next trio, with `vectors` left: 4 are 2 and 2, which is faster than 3 and 1."""
    return 2 if vectors == 4 else min(vectors, TRIO)


@kernel
def _attend_chunk(call, item, at, start, stop, computed):  # type: ignore[no-untyped-def]
    """Joins the packed tokens start .. stop to all queries of the item."""
    value_row = 4 * padded(call.columns)
    vector = 0
    while vector < item.vectors:
        size = _trio_size(item.vectors - vector)
        low = max(0, position(item, vector) + 1 - call.window) // PAD * PAD
        high = min(stop, position(item, vector + size - 1) + LANES)
        for block in range(max(low, start), high, BLOCK):
            end, done = min(block + BLOCK, high), block - start
            keys = at.keys + done * 4 * call.depth
            values = at.values + (done // 2 if simd.is_bfloat16(computed) else done) * value_row
            _attend_block(call, item, at, vector, size, block, end, keys, values, block == low, computed)
        vector += size


@kernel
def _begin_item(call, item, at, unit):  # type: ignore[no-untyped-def]
    """Packs the queries. A sink is a score of its own, whose value is nothing."""
    vector = 0
    while vector < item.vectors:
        size = _trio_size(item.vectors - vector)
        for i in range(vector, vector + size):
            target = at.queries + vector * call.depth * ROW + (i - vector) * ROW
            packing.pack_query(call, item, i, target, size * ROW, unit)
            maximum, total = _LOWEST, _ZERO
            if call.sinks != 0:
                maximum, total = simd.load_float(call.sinks + 4 * (item.head + i % item.heads)) * _LOG2_E, _ONE
            simd.store(simd.splat(maximum), at.maxima + i * ROW)
            simd.store(simd.splat(total), at.totals + i * ROW)
        vector += size


@kernel
def _end_item(call, item, at, stored):  # type: ignore[no-untyped-def]
    vector = 0
    while vector < item.vectors:
        size = _trio_size(item.vectors - vector)
        sums = at.sums + vector * padded(call.columns) * ROW
        for i in range(size):
            total = at.totals + (vector + i) * ROW
            packing.write(call, item, vector + i, sums + i * ROW, size * ROW, total, at.work, stored)
        vector += size


@kernel
def _attend_item(call, item, at, unit, computed, stored):  # type: ignore[no-untyped-def]
    _begin_item(call, item, at, unit)
    for start in range(max(0, item.first + 1 - call.window) // PAD * PAD, item.last, CHUNK):
        stop = min(start + CHUNK, item.last)
        packing.pack_keys(call, item, start, stop, at.keys, unit)
        if simd.is_bfloat16(computed):
            packing.pack_value_pairs(call, item, start, stop, at.zeros, at.values)
        else:
            packing.pack_values(call, item, start, stop, at.values, unit)
        _attend_chunk(call, item, at, start, stop, computed)
    _end_item(call, item, at, stored)


@kernel
def _attend(address, unit, computed, stored):  # type: ignore[no-untyped-def]
    """One thread's part. The last queries of a prompt come first: they have most to see."""
    call = _call(address)
    size = _places(0, call.depth, call.columns).end
    at = _places(call.scratch + simd.fetch_add(call.counters) * size, call.depth, call.columns)
    packing.clear(at.zeros, at.keys)
    ratio = call.heads // call.kv_heads
    splits = (ratio + VECTORS - 1) // VECTORS
    heads = (ratio + splits - 1) // splits  # of an item
    queries = VECTORS // heads * LANES
    index, begin, end, row, tokens = -1, 0, 0, 0, 0  # of the span; begin .. end are its items
    while True:
        number = simd.fetch_add(call.counters + 8)
        while number >= end:
            index += 1
            if index == call.num_spans:
                return
            row, tokens = simd.load_int(call.spans + 16 * index), simd.load_int(call.spans + 16 * index + 8)
            begin, end = end, end + (tokens + queries - 1) // queries * call.kv_heads * splits
        turn = (end - 1 - number) // (call.kv_heads * splits)
        group, split = (number - begin) % (call.kv_heads * splits) // splits, (number - begin) % splits
        first, last = turn * queries, min((turn + 1) * queries, tokens)
        count = min(heads, ratio - split * heads)
        vectors = (last - first + LANES - 1) // LANES * count
        item = Item(row, first, last, group, group * ratio + split * heads, count, vectors)
        _attend_item(call, item, at, unit, computed, stored)


def attend_float32(address: int) -> None:
    _attend(address, _ZERO, _ZERO, _ZERO)


def attend_bfloat16(address: int) -> None:
    """Products of pairs: for an even depth, which is half of it here, where PAIRS_PAY."""
    _attend(address, _ZERO, np.uint16(0), np.uint16(0))


def attend_widened(address: int) -> None:
    """bfloat16, with products in float32."""
    _attend(address, np.uint16(0), _ZERO, np.uint16(0))


@cache
def compiled(function: Any) -> Any:
    """One of the three above as a C function: its `address` is that of `void f(CALL *)`, to be run by every thread."""
    return from_cache(lambda: cfunc(types.void(types.int64), cache=True, **OPTIONS)(function), function.__name__)
