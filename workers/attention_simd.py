"""The vector instructions of the attention kernels, written as LLVM IR.

LLVM's loop vectoriser does not keep a tile of sums in registers by itself, so the two inner products of
attention are spelled out here, on vectors of LANES float32 that LLVM maps to whatever the machine has. All
of them work inside one flat float32 array, `work`, at offsets and strides counted in floats.

Numba's disk cache watches attention_kernels.py alone: touch that file after an edit here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 8

_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)
_I32 = ir.IntType(32)
_FUSE = ("contract",)


def _data(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    return context.make_array(array_type)(context, builder, array).data


def _load(builder: Any, data: Any, offset: Any) -> Any:
    address = builder.bitcast(builder.gep(data, [offset]), _VECTOR.as_pointer())
    return builder.load(address, align=4)


def _store(builder: Any, vector: Any, data: Any, offset: Any) -> None:
    address = builder.bitcast(builder.gep(data, [offset]), vector.type.as_pointer())
    builder.store(vector, address, align=4)


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


def _splat(builder: Any, data: Any, offset: Any) -> Any:
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    scalar = builder.load(builder.gep(data, [offset]))
    return _shuffle(builder, builder.insert_element(undefined, scalar, _I32(0)), undefined, [0] * LANES)


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=_FUSE), c, flags=_FUSE)


def _offset(builder: Any, start: Any, stride: Any, times: int) -> Any:
    return builder.add(start, builder.mul(stride, stride.type(times)))


def _sum_lanes(builder: Any, vectors: list[Any]) -> Any:
    """One vector whose lane i is the sum of all lanes of vectors[i]; there are LANES of them."""
    width = 1
    while len(vectors) > 1:
        low = [lane if not lane & width else LANES + lane - width for lane in range(LANES)]
        high = [lane + width if not lane & width else LANES + lane for lane in range(LANES)]
        vectors = [
            builder.fadd(_shuffle(builder, a, b, low), _shuffle(builder, a, b, high))
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        width *= 2
    return vectors[0]


def _dot_sums(builder: Any, data: Any, q_rows: list[Any], k_rows: list[Any], size: Any) -> Any:
    """The vector of q . k for every query and, within it, every key; there are LANES such pairs."""
    zero = ir.Constant(_VECTOR, [0.0] * LANES)
    sums = [[cgutils.alloca_once_value(builder, zero) for _ in k_rows] for _ in q_rows]
    with cgutils.for_range(builder, builder.udiv(size, size.type(LANES))) as loop:
        at = builder.mul(loop.index, size.type(LANES))
        q_parts = [_load(builder, data, builder.add(row, at)) for row in q_rows]
        for t, row in enumerate(k_rows):
            k_part = _load(builder, data, builder.add(row, at))
            for q_part, places in zip(q_parts, sums, strict=True):
                builder.store(_multiply_add(builder, q_part, k_part, builder.load(places[t])), places[t])
    return _sum_lanes(builder, [builder.load(place) for places in sums for place in places])


def _dot_tile(queries: int) -> Callable[..., None]:
    """dot(work, q, q_stride, k, k_stride, size, out, out_stride): scores of queries and LANES tokens.

    out[i, t] = q[i] . k[t] for `queries` (1 or 2) queries and LANES tokens of `size` floats, a multiple of
    LANES.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        work, q, q_stride, k, k_stride, size, out, out_stride = arguments
        data = _data(context, builder, signature.args[0], work)
        q_rows = [_offset(builder, q, q_stride, i) for i in range(queries)]
        k_rows = [_offset(builder, k, k_stride, t) for t in range(LANES)]
        if queries == 1:
            _store(builder, _dot_sums(builder, data, q_rows, k_rows, size), data, out)
            return context.get_dummy_value()
        half = LANES // 2
        low, high = (_dot_sums(builder, data, q_rows, k_rows[t : t + half], size) for t in (0, half))
        for i in range(2):
            lanes = list(range(i * half, (i + 1) * half))
            scores = _shuffle(builder, low, high, lanes + [LANES + lane for lane in lanes])
            _store(builder, scores, data, _offset(builder, out, out_stride, i))
        return context.get_dummy_value()

    def dot(typing: Any, work: Any, q: Any, q_stride: Any, k: Any, k_stride: Any, size: Any, out: Any, out_stride: Any) -> Any:  # fmt: skip # noqa: E501
        return types.void(work, *[types.int64] * 7), generate

    return intrinsic(dot)  # type: ignore[no-any-return]


def _add_tile(queries: int, vectors: int) -> Callable[..., None]:
    """add(work, p, p_stride, v, v_stride, tokens, sums, sums_stride, keep): weighted sums of value rows.

    sums[i] = keep[i] * sums[i] + sum over t < tokens of p[i, t] * v[t], for `queries` rows of `vectors` *
    LANES floats.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        work, p, p_stride, v, v_stride, tokens, sums, sums_stride, keep = arguments
        data = _data(context, builder, signature.args[0], work)
        places, rows = [], [_offset(builder, sums, sums_stride, i) for i in range(queries)]
        steps = [sums.type(j * LANES) for j in range(vectors)]
        for i, row in enumerate(rows):
            kept = _splat(builder, data, builder.add(keep, keep.type(i)))
            for step in steps:
                start = builder.fmul(kept, _load(builder, data, builder.add(row, step)))
                places.append(cgutils.alloca_once_value(builder, start))
        with cgutils.for_range(builder, tokens) as loop:
            v_row = builder.add(v, builder.mul(loop.index, v_stride))
            p_at = [builder.add(_offset(builder, p, p_stride, i), loop.index) for i in range(queries)]
            weights = [_splat(builder, data, at) for at in p_at]
            for j, step in enumerate(steps):
                v_part = _load(builder, data, builder.add(v_row, step))
                for i, weight in enumerate(weights):
                    place = places[i * vectors + j]
                    builder.store(_multiply_add(builder, weight, v_part, builder.load(place)), place)
        for i, row in enumerate(rows):
            for j, step in enumerate(steps):
                _store(builder, builder.load(places[i * vectors + j]), data, builder.add(row, step))
        return context.get_dummy_value()

    def add(typing: Any, work: Any, p: Any, p_stride: Any, v: Any, v_stride: Any, tokens: Any, sums: Any, sums_stride: Any, keep: Any) -> Any:  # fmt: skip # noqa: E501
        return types.void(work, *[types.int64] * 8), generate

    return intrinsic(add)  # type: ignore[no-any-return]


dot_1 = _dot_tile(1)
dot_2 = _dot_tile(2)
add_1x4 = _add_tile(1, 4)
add_1x8 = _add_tile(1, 8)
add_2x4 = _add_tile(2, 4)


@intrinsic  # type: ignore[untyped-decorator]
def widen_bfloat16(typing: Any, x: Any) -> Any:
    """A bfloat16, given as uint16, as float32; a float32 as it is."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if x == types.float32:
            return arguments[0]
        return builder.bitcast(builder.shl(builder.zext(arguments[0], _I32), _I32(16)), _FLOAT)

    return types.float32(x), generate


@intrinsic  # type: ignore[untyped-decorator]
def widen_float16(typing: Any, x: Any) -> Any:
    """A float16, given as uint16, as float32; a float32 as it is."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if x == types.float32:
            return arguments[0]
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), _FLOAT)

    return types.float32(x), generate


@intrinsic  # type: ignore[untyped-decorator]
def narrow_bfloat16(typing: Any, x: Any, like: Any) -> Any:
    """A float32 rounded to the nearest bfloat16, ties to even, as uint16; float32 if `like` is."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if like == types.float32:
            return arguments[0]
        bits = builder.bitcast(arguments[0], _I32)
        odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
        rounded = builder.add(builder.add(bits, _I32(0x7FFF)), odd)
        is_nan = builder.icmp_unsigned(">", builder.and_(bits, _I32(0x7FFFFFFF)), _I32(0x7F800000))
        return builder.trunc(builder.lshr(builder.select(is_nan, _I32(0x7FC00000), rounded), _I32(16)), ir.IntType(16))

    return like(x, like), generate


@intrinsic  # type: ignore[untyped-decorator]
def narrow_float16(typing: Any, x: Any, like: Any) -> Any:
    """A float32 rounded to the nearest float16, ties to even, as uint16; float32 if `like` is."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if like == types.float32:
            return arguments[0]
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return like(x, like), generate


@intrinsic  # type: ignore[untyped-decorator]
def power_of_two(typing: Any, exponent: Any) -> Any:
    """2.0 ** exponent as float32, for an int32 within -126 .. 127."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.shl(builder.add(arguments[0], _I32(127)), _I32(23)), _FLOAT)

    return types.float32(types.int32), generate


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typing: Any, array: Any, index: Any) -> Any:
    """Starts to fetch the cache line of array[index] into the second-level cache."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = _data(context, builder, signature.args[0], arguments[0])
        address = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
        function_type = ir.FunctionType(ir.VoidType(), [address.type, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
        builder.call(function, [address, _I32(0), _I32(2), _I32(1)])
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def fetch_add(typing: Any, counters: Any, index: Any) -> Any:
    """Adds 1 to counters[index], an int64, in one atomic step and returns what it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = _data(context, builder, signature.args[0], arguments[0])
        address = builder.gep(data, [arguments[1]])
        return builder.atomic_rmw("add", address, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counters, types.int64), generate
