"""Attention of a unit's queries to one block of cached keys and values: scores, weights, weighted sums.

How keys and values lie in a page is said in tiles.py; `kept` is the kind of what is there. Scores are kept in base 2:
multiplied by log2(e), so that softmax needs 2**x only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from flexgen_lite.workers import simd
from flexgen_lite.workers.attention import tiles
from flexgen_lite.workers.attention.layout import GROUPS
from flexgen_lite.workers.attention.tiles import LINES, ROW
from flexgen_lite.workers.simd import LANES

AHEAD = 8  # groups of LANES tokens between what is computed and what is asked for
LOG2_E = np.float32(1.4426950408889634)
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False}

_F = np.float32
_ZERO, _ONE, _TWO = _F(0), _F(1), _F(2)
_HIDDEN = _F(-1e35)  # a score that is masked: far below any maximum

kernel: Any = njit(**OPTIONS)

_score_1x4, _score_1x1 = tiles.score_tile(1, 4), tiles.score_tile(1, 1)
_score_2x2, _score_2x1 = tiles.score_tile(2, 2), tiles.score_tile(2, 1)
_score_4x1, _score_8x1 = tiles.score_tile(4, 1), tiles.score_tile(8, 1)
_values_1, _values_2, _values_4, _values_8 = (tiles.value_tile(n, LINES) for n in (1, 2, 4, 8))
_tail_1, _tail_2, _tail_4, _tail_8 = (tiles.value_tile(n, 1, masked=True) for n in (1, 2, 4, 8))


@kernel
def words(dim, per_word):  # type: ignore[no-untyped-def]
    """Words of a row of `dim` items."""
    return (dim + per_word - 1) // per_word


@kernel
def row_words(dim, kept):  # type: ignore[no-untyped-def]
    """Words that a row of `dim` items takes in a page, with its scale."""
    return words(dim, tiles.items_per_word(kept)) + tiles.scale_words(kept)


@kernel
def exp2(x):  # type: ignore[no-untyped-def]
    return simd.first(simd.exp2(simd.splat(x)))


@kernel
def _scale(start, stop, factor):  # type: ignore[no-untyped-def]
    factors = simd.splat(factor)
    for at in range(start, stop, ROW):
        simd.store(simd.multiply(simd.load(at), factors), at)


@kernel
def key_address(kv, shape, pages, head, token, width):  # type: ignore[no-untyped-def]
    """Of the group that `token` is the first of; `width`: row_words of a key."""
    page, within = pages[token >> shape.page_shift], token & ((1 << shape.page_shift) - 1)
    return kv + page * shape.page_bytes + shape.keys + ((head << shape.page_shift) + within) * width * 4


@kernel
def value_address(kv, shape, pages, head, token, width):  # type: ignore[no-untyped-def]
    page, within = pages[token >> shape.page_shift], token & ((1 << shape.page_shift) - 1)
    return kv + page * shape.page_bytes + shape.values + ((head << shape.page_shift) + within) * width * 4


@kernel
def first_seen(shape, position):  # type: ignore[no-untyped-def]
    """The first token that the one at `position` sees."""
    if shape.attention_chunk > 0:
        return position // shape.attention_chunk * shape.attention_chunk
    return max(0, position + 1 - shape.window) if shape.window > 0 else 0


@kernel
def find_groups(kv, shape, pages, head, block, start, stop, end, kept, at):  # type: ignore[no-untyped-def]
    """Notes where the block's groups lie that hold tokens of start .. stop, and those AHEAD of them up to `end`."""
    key_words, value_words = row_words(shape.head_dim, kept), row_words(shape.value_dim, kept)
    turned = words(shape.value_dim, tiles.items_per_word(kept)) * ROW
    for g in range((start - block) // LANES, (stop - block + LANES - 1) // LANES):
        token = block + g * LANES
        ahead = token + AHEAD * LANES
        ahead = ahead if ahead < end else token
        to = at.where + 8 * g
        tiles.store_address(key_address(kv, shape, pages, head, token, key_words), to)
        ahead_keys = key_address(kv, shape, pages, head, ahead, key_words)
        tiles.store_address(ahead_keys, to + 8 * GROUPS)
        if tiles.scale_words(kept):
            tiles.prefetch(ahead_keys + (key_words - 1) * ROW)
        if shape.values_in_keys:
            values = at.values + g * turned
            tiles.store_address(values, to + 16 * GROUPS)
            tiles.store_address(values, to + 24 * GROUPS)
            continue
        tiles.store_address(value_address(kv, shape, pages, head, token, value_words), to + 16 * GROUPS)
        ahead_values = value_address(kv, shape, pages, head, ahead, value_words)
        tiles.store_address(ahead_values, to + 24 * GROUPS)
        if tiles.scale_words(kept):
            tiles.prefetch(ahead_values + (value_words - 1) * ROW)


@kernel
def turn_values(shape, at, block, start, stop, per_word):  # type: ignore[no-untyped-def]
    """Has the values of the block's groups as rows, which lie in the keys across."""
    count = words(shape.value_dim, per_word)
    stride = 4 * count
    for g in range((start - block) // LANES, (stop - block + LANES - 1) // LANES):
        source, target = tiles.load_address(at.where + 8 * g), at.values + g * LANES * stride
        if count >= LANES:
            for word in range(0, count, LANES):
                first = min(word, count - LANES)
                tiles.turn(source + first * ROW, target + 4 * first, stride)
        else:
            for word in range(count):
                for token in range(LANES):
                    simd.store_float(
                        simd.load_float(source + word * ROW + 4 * token), target + token * stride + 4 * word
                    )


@kernel
def ask_for_first(kv, shape, pages, head, begin, end, kept):  # type: ignore[no-untyped-def]
    """Asks for the first AHEAD groups of an item."""
    key_words, value_words = row_words(shape.head_dim, kept), row_words(shape.value_dim, kept)
    begin = begin // LANES * LANES
    for token in range(begin, min(end, begin + AHEAD * LANES), LANES):
        keys = key_address(kv, shape, pages, head, token, key_words)
        values = value_address(kv, shape, pages, head, token, value_words)
        for at in range(keys, keys + key_words * ROW, 64):
            tiles.prefetch(at)
        if not shape.values_in_keys:
            for at in range(values, values + value_words * ROW, 64):
                tiles.prefetch(at)


@kernel
def _tile_size(left, kept):  # type: ignore[no-untyped-def]
    """Queries of the next tile, with `left` to come."""
    if tiles.has_planes(kept) and left >= 8:
        return 8
    return 4 if left >= 4 else 2 if left >= 2 else 1


@kernel
def _score(at, i, size, first, last, width, kind, kept):  # type: ignore[no-untyped-def]
    """Scores of queries i .. i + size with groups first .. last of the block; `width` words are a key."""
    query, stride = at.query + i * at.query_stride, at.query_stride
    where, score = at.where + 8 * first, at.score + i * at.score_stride + first * ROW
    ahead = where + 8 * GROUPS if i == 0 else where
    g = first
    while g < last:
        step = 1
        if size == 1 and g + 4 <= last:
            step = 4
            _score_1x4(where, ahead, query, stride, width, score, at.score_stride, kind, kept)
        elif size == 1:
            _score_1x1(where, ahead, query, stride, width, score, at.score_stride, kind, kept)
        elif size == 2 and g + 2 <= last:
            step = 2
            _score_2x2(where, ahead, query, stride, width, score, at.score_stride, kind, kept)
        elif size == 2:
            _score_2x1(where, ahead, query, stride, width, score, at.score_stride, kind, kept)
        elif size == 4:
            _score_4x1(where, ahead, query, stride, width, score, at.score_stride, kind, kept)
        elif tiles.has_planes(kept):
            _score_8x1(where, ahead, query, stride, width, score, at.score_stride, kind, kept)
        g, where, ahead, score = g + step, where + 8 * step, ahead + 8 * step, score + step * ROW


@kernel
def _weigh(at, i, first, last, start, stop, shape, kept):  # type: ignore[no-untyped-def]
    """Scores of groups first .. last become weights, zero outside tokens start .. stop of the block; m, l and the sums
    follow.

    In int8, scores are those of keys without their scales, and the weights are for values without theirs.
    """
    key_scales = words(shape.head_dim, tiles.items_per_word(kept)) * ROW
    value_scales, places_of_values = key_scales, at.where
    if not shape.values_in_keys:
        value_scales = words(shape.value_dim, tiles.items_per_word(kept)) * ROW
        places_of_values = at.where + 16 * GROUPS
    scores = at.score + i * at.score_stride
    scale = shape.scaling * LOG2_E
    scales, zero, hidden = simd.splat(scale), simd.splat(_ZERO), _HIDDEN
    if shape.softcap > _ZERO:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1); 2 x in base 2 is kept to where float32 has tanh(x) = 1.
        scales = simd.splat(scale * _TWO / shape.softcap)
        one, two, low, cap = (
            simd.splat(_ONE),
            simd.splat(_TWO),
            simd.splat(_F(-64)),
            simd.splat(shape.softcap * LOG2_E),
        )
    top = simd.splat(_HIDDEN)
    for g in range(first, last):
        x = simd.multiply(simd.load(scores + g * ROW), scales)
        if tiles.scale_words(kept):
            x = simd.multiply(x, simd.load(tiles.load_address(at.where + 8 * g) + key_scales))
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
        keep = exp2(m - largest)
        _scale(sum_at, sum_at + at.sum_stride, keep)
        simd.store(simd.multiply(simd.load(l_at), simd.splat(keep)), l_at)
        simd.store_float(largest, at.m + 4 * i)
        m = largest
    ms, total = simd.splat(m), simd.load(l_at)
    for g in range(first, last):
        x = simd.exp2(simd.subtract(simd.load(scores + g * ROW), ms))
        total = simd.add(total, x)
        if tiles.scale_words(kept):
            x = simd.multiply(x, simd.load(tiles.load_address(places_of_values + 8 * g) + value_scales))
        simd.store(x, scores + g * ROW)
    simd.store(total, l_at)


@kernel
def _add_values(at, i, size, first, last, start, stop, width, per_word, kept):  # type: ignore[no-untyped-def]
    """Adds the weighted values of tokens start .. stop of the block to the sums of queries i .. i + size."""
    stride = 4 * width
    for g in range(first, last):
        begin, end = max(start - g * LANES, 0), min(stop - g * LANES, LANES)
        rows = tiles.load_address(at.where + 16 * GROUPS + 8 * g) + begin * stride
        ahead = tiles.load_address(at.where + 24 * GROUPS + 8 * g) + begin * stride if i == 0 else rows
        weights = at.score + i * at.score_stride + g * ROW + 4 * begin
        sums, word, count, lines = at.sums + i * at.sum_stride, 0, end - begin, tiles.lines(kept)
        while word + lines * LANES <= width:
            v, a = rows + 4 * word, ahead + 4 * word
            if size == 1:
                _values_1(v, stride, count, weights, at.score_stride, sums, at.sum_stride, a, 0, kept)
            elif size == 2:
                _values_2(v, stride, count, weights, at.score_stride, sums, at.sum_stride, a, 0, kept)
            elif size == 4:
                _values_4(v, stride, count, weights, at.score_stride, sums, at.sum_stride, a, 0, kept)
            elif tiles.has_planes(kept):
                _values_8(v, stride, count, weights, at.score_stride, sums, at.sum_stride, a, 0, kept)
            word += lines * LANES
            sums += lines * per_word * ROW
        while word < width:
            v, a, some = rows + 4 * word, ahead + 4 * word, min(width - word, LANES)
            if size == 1:
                _tail_1(v, stride, count, weights, at.score_stride, sums, at.sum_stride, a, some, kept)
            elif size == 2:
                _tail_2(v, stride, count, weights, at.score_stride, sums, at.sum_stride, a, some, kept)
            elif size == 4:
                _tail_4(v, stride, count, weights, at.score_stride, sums, at.sum_stride, a, some, kept)
            elif tiles.has_planes(kept):
                _tail_8(v, stride, count, weights, at.score_stride, sums, at.sum_stride, a, some, kept)
            word += LANES
            sums += per_word * ROW


@kernel
def attend_block(unit, shape, at, block, start, stop, kind, kept):  # type: ignore[no-untyped-def]
    """Joins tokens start .. stop of the block that begins at token `block` to the chunk's m, l and sums."""
    heads, count = shape.num_heads // shape.num_kv_heads, unit.last - unit.first
    first, last = (start - block) // LANES, (stop - block + LANES - 1) // LANES
    per_word = tiles.items_per_word(kept)
    key_words, value_words = words(shape.head_dim, per_word), words(shape.value_dim, per_word)
    i = 0
    while i < count:
        size = _tile_size(count - i, kept)
        _score(at, i, size, first, last, key_words, kind, kept)
        for query in range(i, i + size):
            position = unit.position + (unit.first + query) // heads
            begin = max(start, first_seen(shape, position))
            _weigh(at, query, first, last, begin - block, min(stop, position + 1) - block, shape, kept)
        _add_values(at, i, size, first, last, start - block, stop - block, value_words, per_word, kept)
        i += size
