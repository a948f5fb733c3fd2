"""The inner products of decode attention: queries with blocks of cached keys, and weights with cached values.

The cache holds *words* of 32 bits: a float32, or two items of 16 bits or four of 8 of neighbouring columns. Keys lie
transposed, in groups of LANES tokens: `[word][token]`, so that a vector holds a word of LANES tokens and a score needs
no sum across lanes. Values lie `[token][word]`. A vector of words is split into vectors of float32: one; for pairs two,
the even columns and the odd ones; for keys of 8 bits four in the same way, for values of 8 bits four of neighbouring
columns. All sums are float32. Behind a group's keys or values of 8 bits are the scales of its tokens, a vector.

Memory is named by address, strides are in bytes; kinds are those of simd.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from flexgen_lite.workers import simd
from flexgen_lite.workers.attention import byte_tiles
from flexgen_lite.workers.simd import I16, I32, LANES, VECTOR, WORDS

ROW = 4 * LANES  # bytes of a vector
SPLITS = 2  # sums of a score that are carried on side by side
LINES = 2 if simd.WIDE else 1  # vectors of words that a value tile takes at once, see lines_of

SUMS = 16 if simd.WIDE else 8  # of a value tile, at most, that are carried on in registers

_HALF_VECTOR = ir.VectorType(ir.HalfType(), LANES)
_BYTES = ir.VectorType(ir.IntType(8), LANES)
_PAIRS = ir.VectorType(simd.BFloatType(), 2 * LANES)
_address = types.int64


def _offset(builder: Any, address: Any, num_bytes: int) -> Any:
    return builder.add(address, address.type(num_bytes)) if num_bytes else address


def _step(builder: Any, address: Any, stride: Any, times: int) -> Any:
    return builder.add(address, builder.mul(stride, stride.type(times))) if times else address


def _load_words(builder: Any, address: Any) -> Any:
    return simd.load_from(builder, address, WORDS)


def _mask(builder: Any, count: Any) -> Any:
    """The lanes below `count`."""
    lanes = ir.Constant(WORDS, list(range(LANES)))
    return builder.icmp_signed("<", lanes, simd.spread(builder, builder.trunc(count, I32)))


def _load_some(builder: Any, address: Any, mask: Any) -> Any:
    pointer = builder.inttoptr(address, WORDS.as_pointer())
    arguments = [pointer, I32(4), mask, simd.same(0, WORDS)]
    return simd.call(builder, f"llvm.masked.load.v{LANES}i32.p0", WORDS, arguments)


def _store_some(builder: Any, words: Any, address: Any, count: Any) -> None:
    pointer = builder.inttoptr(address, WORDS.as_pointer())
    arguments = [words, pointer, I32(4), _mask(builder, count)]
    simd.call(builder, f"llvm.masked.store.v{LANES}i32.p0", ir.VoidType(), arguments)


def _split(builder: Any, kind: str, words: Any) -> list[Any]:
    """Words as float32: one vector, or the even and the odd columns."""
    if kind == "float32":
        return [builder.bitcast(words, VECTOR)]
    if kind == "int8":
        lifted = [builder.shl(words, simd.same(8 * (3 - i), WORDS)) if i < 3 else words for i in range(4)]
        return [builder.sitofp(builder.ashr(word, simd.same(24, WORDS)), VECTOR) for word in lifted]
    if kind == "bfloat16":
        even = builder.shl(words, simd.same(16, WORDS))
        odd = builder.and_(words, simd.same(0xFFFF0000, WORDS))
        return [builder.bitcast(even, VECTOR), builder.bitcast(odd, VECTOR)]
    parts = (words, builder.lshr(words, simd.same(16, WORDS)))
    return [builder.fpext(builder.bitcast(builder.trunc(part, simd.HALVES), _HALF_VECTOR), VECTOR) for part in parts]


def _load_values(builder: Any, kind: str, address: Any, mask: Any, wanted: Sequence[int]) -> list[Any]:
    """The parts `wanted` of a vector of words of values, as float32."""
    if kind != "int8":
        parts = _split(
            builder, kind, _load_words(builder, address) if mask is None else _load_some(builder, address, mask)
        )
        return [parts[i] for i in wanted]
    if mask is None:
        items = [simd.load_from(builder, _offset(builder, address, i * LANES), _BYTES, align=1) for i in wanted]
    else:
        whole = builder.bitcast(_load_some(builder, address, mask), ir.VectorType(ir.IntType(8), 4 * LANES))
        lanes = [ir.Constant(WORDS, list(range(i * LANES, (i + 1) * LANES))) for i in wanted]
        items = [builder.shuffle_vector(whole, whole, some) for some in lanes]
    return [builder.sitofp(builder.sext(some, WORDS), VECTOR) for some in items]


def _merge(builder: Any, kind: str, parts: list[Any]) -> Any:
    """The inverse of _split: rounded to nearest, ties to even."""
    if kind == "float32":
        return builder.bitcast(parts[0], WORDS)
    if kind == "bfloat16":
        halves = [simd.narrow(builder, part) for part in parts]
    else:
        halves = [builder.bitcast(builder.fptrunc(part, _HALF_VECTOR), simd.HALVES) for part in parts]
    even, odd = (builder.zext(half, WORDS) for half in halves)
    return builder.or_(even, builder.shl(odd, simd.same(16, WORDS)))


def num_parts(kind: str) -> int:
    """Vectors of float32 in a vector of words."""
    return {"float32": 1, "int8": 4}.get(kind, 2)


def lines_of(kind: str) -> int:
    """Vectors of words that a value tile takes at once: those of int8 have sums enough to carry on."""
    return 1 if kind == "int8" else LINES


def takes_words(kind: str) -> bool:
    """Whether the processor multiplies words of this kind as they are; else queries are widened to float32."""
    return kind == "bfloat16" and simd.PAIRS_PAY


def is_multiplied_by_bytes(kind: str) -> bool:
    """Whether queries are split into bytes, for the processor's own products of these."""
    return kind == "int8" and simd.BYTES


def _multiply(builder: Any, kind: str, keys: Any, query: Any, word: Any, total: Any) -> Any:
    """total + key * query for word number `word` of a query."""
    if takes_words(kind):
        at = builder.add(query, builder.mul(word, word.type(4)))
        pair = simd.spread(builder, simd.load_from(builder, at, I32))
        operands = [total, builder.bitcast(keys, _PAIRS), builder.bitcast(pair, _PAIRS)]
        return simd.call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", VECTOR, operands)
    at = builder.add(query, builder.mul(word, word.type(4 * num_parts(kind))))
    for i, part in enumerate(_split(builder, kind, keys)):
        value = simd.spread(builder, simd.load_from(builder, _offset(builder, at, 4 * i), simd.FLOAT))
        total = simd.fused(builder, part, value, total)
    return total


def score_tile(queries: int, groups: int) -> Any:
    """tile(where, ahead, query, query_stride, words, scores, score_stride, kind, kept): scores of queries and keys.

    scores[i, g] = query[i] . keys[g], for `queries` queries and `groups` groups of LANES tokens; those of a query lie
    side by side. `where` names the addresses of the groups' keys, `ahead` those that will be wanted later: both are
    addresses of int64 `[groups]`. `kind` is that of the queries, `kept` that of the keys.
    """

    def build(builder: Any, kind: str, kept: str, where: Any, ahead: Any, query: Any, stride: Any, words: Any, scores: Any, score_stride: Any) -> None:  # fmt: skip # noqa: E501
        keys, wanted = (
            [simd.load_from(builder, _offset(builder, base, 8 * g), simd.I64) for g in range(groups)]
            for base in (where, ahead)
        )
        rows = [_step(builder, query, stride, i) for i in range(queries)]
        if is_multiplied_by_bytes(kept):
            targets = [_step(builder, scores, score_stride, i) for i in range(queries)]
            byte_tiles.build_scores(builder, keys, wanted, rows, words, targets, byte_tiles.num_planes(kind))
            return
        sums = [cgutils.alloca_once_value(builder, simd.same(0.0)) for _ in range(queries * groups * SPLITS)]

        def add(word: Any, split: int) -> None:
            at = builder.mul(word, word.type(ROW))
            for g in range(groups):
                vector = _load_words(builder, builder.add(keys[g], at))
                simd.prefetch(builder, builder.add(wanted[g], at))
                for i, row in enumerate(rows):
                    place = sums[(i * groups + g) * SPLITS + split]
                    builder.store(_multiply(builder, kept, vector, row, word, builder.load(place)), place)

        rounds = builder.udiv(words, words.type(SPLITS))
        with cgutils.for_range(builder, rounds) as loop:
            first = builder.mul(loop.index, words.type(SPLITS))
            for split in range(SPLITS):
                add(builder.add(first, words.type(split)), split)
        done = builder.mul(rounds, words.type(SPLITS))
        with cgutils.for_range(builder, builder.sub(words, done)) as loop:
            add(builder.add(done, loop.index), 0)
        for i in range(queries):
            for g in range(groups):
                first = (i * groups + g) * SPLITS
                score = builder.load(sums[first])
                for split in range(1, SPLITS):
                    score = builder.fadd(score, builder.load(sums[first + split]))
                simd.store_to(builder, score, _offset(builder, _step(builder, scores, score_stride, i), g * ROW))

    return simd.operation_of_kind(build, types.void, *[types.int64] * 7, kinds=2)


def value_tile(queries: int, lines: int, masked: bool = False) -> Any:
    """tile(values, stride, tokens, weights, weight_stride, sums, sum_stride, ahead, count, kind): adds rows.

    sums += weights . values, for `queries` rows of weights and sums and `tokens` rows of `lines` vectors of words, or
    of one (see lines_of). Of a masked tile's vectors only `count` words are there. `ahead` names rows that will be
    wanted later, `stride` apart.
    """

    def build(builder: Any, kind: str, values: Any, stride: Any, tokens: Any, weights: Any, weight_stride: Any, sums: Any, sum_stride: Any, ahead: Any, count: Any) -> None:  # fmt: skip # noqa: E501
        parts, num_lines = num_parts(kind), min(lines, lines_of(kind))
        mask = _mask(builder, count) if masked else None
        most = max(1, SUMS // queries) if kind == "int8" else num_lines * parts
        for first in range(0, num_lines * parts, most):
            vectors = range(first, min(first + most, num_lines * parts))
            targets = [
                _offset(builder, _step(builder, sums, sum_stride, i), j * ROW) for i in range(queries) for j in vectors
            ]
            places = [cgutils.alloca_once_value(builder, simd.load_from(builder, at)) for at in targets]
            with cgutils.for_range(builder, tokens) as loop:
                row = builder.mul(loop.index, stride)
                weight_at = builder.add(weights, builder.mul(loop.index, loop.index.type(4)))
                spread = [
                    simd.spread(
                        builder, simd.load_from(builder, _step(builder, weight_at, weight_stride, i), simd.FLOAT)
                    )
                    for i in range(queries)
                ]
                for line in range(num_lines):
                    wanted = [j - line * parts for j in vectors if j // parts == line]
                    if not wanted:
                        continue
                    if wanted[0] == 0:
                        simd.prefetch(builder, _offset(builder, builder.add(ahead, row), line * ROW))
                    at = _offset(builder, builder.add(values, row), line * ROW)
                    for j, part in zip(wanted, _load_values(builder, kind, at, mask, wanted), strict=True):
                        for i in range(queries):
                            place = places[i * len(vectors) + line * parts + j - first]
                            builder.store(simd.fused(builder, spread[i], part, builder.load(place)), place)
            for place, at in zip(places, targets, strict=True):
                simd.store_to(builder, builder.load(place), at)

    return simd.operation_of_kind(build, types.void, *[types.int64] * 9)


def _turn(builder: Any, source: Any, target: Any, stride: Any) -> None:
    rows = [_load_words(builder, _offset(builder, source, i * ROW)) for i in range(LANES)]
    for row in simd.turned(builder, rows):
        simd.store_to(builder, row, target)
        target = builder.add(target, stride)


def _write_line(builder: Any, kind: str, sums: Any, scale: Any, target: Any, count: Any) -> None:
    factor = simd.spread(builder, scale)
    parts = [simd.load_from(builder, _offset(builder, sums, i * ROW)) for i in range(num_parts(kind))]
    words = _merge(builder, kind, [builder.fmul(part, factor) for part in parts])
    _store_some(builder, words, target, count)


def _load_wide_item(builder: Any, kind: str, address: Any) -> Any:
    if kind == "float32":
        return simd.load_from(builder, address, simd.FLOAT)
    bits = simd.load_from(builder, address, I16, align=2)
    if kind == "float16":
        return builder.fpext(builder.bitcast(bits, ir.HalfType()), simd.FLOAT)
    return builder.bitcast(builder.shl(builder.zext(bits, I32), I32(16)), simd.FLOAT)


def _copy_word(builder: Any, kind: str, source: Any, items: Any, target: Any) -> None:
    """A word from a row of stored items, of which `items` are left; the odd one's neighbour is zero."""
    if kind == "float32":
        simd.store_to(builder, simd.load_from(builder, source, I32), target)
        return
    whole = builder.icmp_signed(">", items, items.type(1))
    with builder.if_else(whole, likely=True) as (then, otherwise):
        with then:
            simd.store_to(builder, simd.load_from(builder, source, I32, align=2), target)
        with otherwise:
            simd.store_to(builder, builder.zext(simd.load_from(builder, source, I16, align=2), I32), target)


def _load_items(builder: Any, kind: str, address: Any, count: Any) -> Any:
    """`count` items, at most LANES, as float32; zeros behind."""
    stored = VECTOR if kind == "float32" else simd.HALVES
    pointer = builder.inttoptr(address, stored.as_pointer())
    name = f"llvm.masked.load.v{LANES}{'f32' if kind == 'float32' else 'i16'}.p0"
    align = I32(4 if kind == "float32" else 2)
    arguments = [pointer, align, _mask(builder, count), ir.Constant(stored, None)]
    items = simd.call(builder, name, stored, arguments)
    if kind == "float32":
        return items
    if kind == "float16":
        return builder.fpext(builder.bitcast(items, _HALF_VECTOR), VECTOR)
    return builder.bitcast(builder.shl(builder.zext(items, WORDS), simd.same(16, WORDS)), VECTOR)


def _write_items(builder: Any, kind: str, sums: Any, scale: Any, target: Any, count: Any) -> None:
    x = builder.fmul(simd.load_from(builder, sums), simd.spread(builder, scale))
    if kind == "float32":
        _store_some(builder, builder.bitcast(x, WORDS), target, count)
        return
    half = (
        builder.bitcast(builder.fptrunc(x, _HALF_VECTOR), simd.HALVES) if kind == "float16" else simd.narrow(builder, x)
    )
    pointer = builder.inttoptr(target, simd.HALVES.as_pointer())
    arguments = [half, pointer, I32(2), _mask(builder, count)]
    simd.call(builder, f"llvm.masked.store.v{LANES}i16.p0", ir.VoidType(), arguments)


def _write_rounded(builder: Any, x: Any, scale: Any, target: Any, stride: Any, count: Any) -> None:
    items = builder.trunc(simd.whole(builder, builder.fdiv(x, simd.spread(builder, scale)), 127), _BYTES)
    place = cgutils.alloca_once_value(builder, items)
    source = builder.ptrtoint(place, simd.I64)
    with cgutils.for_range(builder, count) as loop:
        word = simd.load_from(builder, builder.add(source, builder.mul(loop.index, simd.I64(4))), I32, align=1)
        simd.store_to(builder, word, builder.add(target, builder.mul(loop.index, stride)))


def _constant(value_of: Any, result: Any) -> Any:
    """An operation without arguments but the kind."""
    return simd.operation_of_kind(lambda builder, kind: value_of(kind), result)


# write_line(sums, scale, target, count, kind): `count` words of output from a line's sums.
write_line = simd.operation_of_kind(_write_line, types.void, _address, types.float32, _address, types.int64)
# write_items(sums, scale, target, count, kind): `count` items of output from a vector of sums of neighbouring columns.
write_items = simd.operation_of_kind(_write_items, types.void, _address, types.float32, _address, types.int64)
# write_rounded(x, scale, target, stride, count): x / scale in int8, as `count` words that are `stride` bytes apart.
write_rounded = simd.operation(
    _write_rounded, types.void, simd.vector, types.float32, _address, types.int64, types.int64
)
# load_items(address, count, kind): `count` items as float32, zeros behind.
load_items = simd.operation_of_kind(_load_items, simd.vector, _address, types.int64)
# load_item(address, kind): a stored item as float32.
load_item = simd.operation_of_kind(_load_wide_item, types.float32, _address)
# copy_word(source, items, target, kind)
copy_word = simd.operation_of_kind(_copy_word, types.void, _address, types.int64, _address)
# items_per_word(kind), scale_words(kind): behind a row; is_multiplied_as_words(kind); has_planes(kind)
items_per_word = _constant(lambda kind: simd.I64(num_parts(kind)), types.int64)
scale_words = _constant(lambda kind: simd.I64(int(kind == "int8")), types.int64)
is_multiplied_as_words = _constant(lambda kind: ir.Constant(ir.IntType(1), int(takes_words(kind))), types.boolean)
# lines(kind): vectors of words that a value tile takes at once.
lines = _constant(lambda kind: simd.I64(lines_of(kind)), types.int64)
has_planes = _constant(lambda kind: ir.Constant(ir.IntType(1), int(is_multiplied_by_bytes(kind))), types.boolean)
load_address = simd.operation(lambda b, at: simd.load_from(b, at, simd.I64), types.int64, _address)
store_address = simd.operation(simd.store_to, types.void, types.int64, _address)
# turn(source, target, stride): LANES vectors, each a word of LANES tokens, as rows of tokens.
turn = simd.operation(_turn, types.void, _address, _address, types.int64)
prefetch = simd.operation(simd.prefetch, types.void, _address)  # starts to fetch a cache line
