"""Vectors for the kernels of attention and products: a numba type for one register of float32, and what it can do.

A `Vector` holds LANES float32. Memory is named by address, an int64. Functions that differ by how items are stored take
a *kind* as their last argument, a value whose type alone counts: float32, uint16 for bfloat16, int16 for float16, int8.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any

from llvmlite import ir
from numba import from_dtype, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic, models, register_model

from flexgen_lite.workers.kernel_cache import guard

guard()

_name, _all_features = cpu_target.target_context.codegen().magic_tuple()[1:]
_features = _all_features.split(",")
WIDE = "+avx512f" in _features
PAIRS = "+avx512bf16" in _features  # whether there are products of bfloat16 pairs
PAIRS_PAY = PAIRS and _name.startswith("znver")
"""Whether a product of pairs takes less time than two of float32. On processors of Intel it takes twice as long: 1.4 a
nanosecond, and 5.7 of float32, on an Emerald Rapids."""
TILES = "+amx-bf16" in _features and PAIRS  # and on tiles
LANES = 16 if WIDE else 8
BYTE_TABLES = WIDE and "+avx512vbmi" in _features  # whether bytes can be places in a table of 128
BYTES = WIDE and "+avx512vnni" in _features  # whether there are products of bytes that add up to int32

FLOAT, I16, I32, I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
VECTOR, HALVES, WORDS = (ir.VectorType(kind, LANES) for kind in (FLOAT, I16, I32))
_FUSE = ("contract",)


class BFloatType(ir.Type):
    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloatType)

    def __hash__(self) -> int:
        return hash(BFloatType)


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"Vector({LANES})")


vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, VECTOR)


def _intrinsic(operation: Any, count: int) -> Any:
    """`operation(typing, *arguments)` as an intrinsic of `count` arguments; numba goes by the names of parameters."""
    names = ["typing", *(f"a{i}" for i in range(count))]
    operation.__signature__ = Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names])
    return intrinsic(operation)


def operation(build: Callable[..., Any], result: Any, *arguments: Any) -> Any:
    """An intrinsic of fixed argument types; `build` gets the IR builder and the values."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        out = build(builder, *values)
        return context.get_dummy_value() if result is types.void else out

    def typed(typing: Any, *given: Any) -> Any:
        return result(*arguments), generate

    return _intrinsic(typed, len(arguments))


KINDS = {types.float32: "float32", types.uint16: "bfloat16", types.int16: "float16", types.int8: "int8"}


def operation_of_kind(build: Callable[..., Any], result: Any, *arguments: Any, kinds: int = 1) -> Any:
    """An intrinsic with a kind, or several, as last arguments; `build` gets the builder, their names, the values."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        out = build(builder, *(KINDS[kind] for kind in signature.args[-kinds:]), *values[:-kinds])
        return context.get_dummy_value() if result is types.void else out

    def typed(typing: Any, *given: Any) -> Any:
        return result(*arguments, *given[-kinds:]), generate

    return _intrinsic(typed, len(arguments) + kinds)


def operation_by_kind(build: Callable[..., Any], result: Any, *arguments: Any) -> Any:
    """The same for float32 and bfloat16 alone; `build` gets the builder, whether it is bfloat16, and the values."""
    return operation_of_kind(lambda b, kind, *values: build(b, kind == "bfloat16", *values), result, *arguments)


def record(dtype: Any) -> Any:
    """record(address): the NumPy record of `dtype` that lies there."""
    kind = from_dtype(dtype)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], context.get_value_type(kind))

    def typed(typing: Any, *given: Any) -> Any:
        return kind(types.int64), generate

    return _intrinsic(typed, 1)


def same(value: float | int, kind: Any = VECTOR) -> Any:
    """The constant vector with `value` in all lanes."""
    return ir.Constant(kind, [value] * kind.count)


def load_from(builder: Any, address: Any, kind: Any = VECTOR, align: int = 4) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def store_to(builder: Any, value: Any, address: Any, align: int = 4) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=align)


def store_past_caches(builder: Any, value: Any, address: Any) -> None:
    """To memory that is not read soon, whose lines need not be fetched before; `address` is a multiple of 64."""
    instruction = builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=4 * LANES)
    instruction.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))


def call(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    function_type = ir.FunctionType(result, [value.type for value in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), arguments)


def spread(builder: Any, scalar: Any) -> Any:
    """A vector with `scalar` in all lanes."""
    first = builder.insert_element(ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined), scalar, I32(0))
    return builder.shuffle_vector(first, first, same(0, WORDS))


def fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c."""
    return builder.fadd(builder.fmul(a, b, flags=_FUSE), c, flags=_FUSE)


def _larger(builder: Any, x: Any, y: Any) -> Any:
    """One instruction on x86; a NaN in y stays."""
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def _smaller(builder: Any, x: Any, y: Any) -> Any:
    """The same."""
    return builder.select(builder.fcmp_ordered("<", x, y), x, y)


def reduced(builder: Any, x: Any, combine: Callable[[Any, Any, Any], Any]) -> Any:
    """All lanes combined, in an order that depends on nothing."""
    width = LANES // 2
    while width:
        lanes = ir.Constant(WORDS, [(i + width) % LANES for i in range(LANES)])
        x = combine(builder, x, builder.shuffle_vector(x, x, lanes))
        width //= 2
    return builder.extract_element(x, I32(0))


def _any_above(builder: Any, x: Any, y: Any) -> Any:
    bits = builder.bitcast(builder.fcmp_ordered(">", x, y), ir.IntType(LANES))
    return builder.icmp_unsigned("!=", bits, bits.type(0))


def turned(builder: Any, rows: list[Any]) -> list[Any]:
    """LANES vectors as a matrix, its rows for its columns."""
    rows, width = list(rows), 1
    while width < LANES:
        low = [lane if not lane & width else LANES + lane - width for lane in range(LANES)]
        high = [lane + width if not lane & width else LANES + lane for lane in range(LANES)]
        for i in (i for i in range(LANES) if not i & width):
            a, b = rows[i], rows[i + width]
            rows[i], rows[i + width] = (
                builder.shuffle_vector(a, b, ir.Constant(WORDS, lanes)) for lanes in (low, high)
            )
        width *= 2
    return rows


def turn(builder: Any, source: Any, stride: Any, target: Any, target_stride: int) -> None:
    """LANES rows of LANES words, `stride` bytes apart, to their columns, `target_stride` bytes apart."""
    rows = []
    for _ in range(LANES):
        rows.append(load_from(builder, source, WORDS))
        source = builder.add(source, stride)
    for i, column in enumerate(turned(builder, rows)):
        store_to(builder, column, builder.add(target, target.type(i * target_stride)))


def _hide(builder: Any, x: Any, first: Any, last: Any, value: Any) -> Any:
    lanes = ir.Constant(WORDS, list(range(LANES)))
    low, high = (spread(builder, builder.trunc(bound, I32)) for bound in (first, last))
    inside = builder.and_(builder.icmp_signed(">=", lanes, low), builder.icmp_signed("<=", lanes, high))
    return builder.select(inside, x, spread(builder, value))


# 2**f for f in [-0.5, 0.5]: the polynomial of least relative error (2e-9) with constant term 1, found by
# Lawson's iteration.
_EXP2 = (
    0.6931471824645996, 0.24022647738456726, 0.055503323674201965,
    0.00961843691766262, 0.0013398875016719103, 0.00015353361959569156,
)  # fmt: skip


def _exp2(builder: Any, x: Any) -> Any:
    whole = call(builder, f"llvm.rint.v{LANES}f32", VECTOR, [x])
    fraction = builder.fsub(x, whole)
    power = same(_EXP2[-1])
    for coefficient in (*reversed(_EXP2[:-1]), 1.0):
        power = fused(builder, power, fraction, same(coefficient))
    if WIDE:
        arguments = [power, whole, same(0.0), ir.Constant(I16, -1), ir.Constant(I32, 4)]
        return call(builder, "llvm.x86.avx512.mask.scalef.ps.512", VECTOR, arguments)
    exponent = builder.add(builder.fptosi(_larger(builder, whole, same(-127.0)), WORDS), same(127, WORDS))
    return builder.fmul(power, builder.bitcast(builder.shl(exponent, same(23, WORDS)), VECTOR))


def narrow(builder: Any, x: Any) -> Any:
    """float32 lanes to the nearest bfloat16, ties to even, as 16-bit integers."""
    if PAIRS:
        return builder.bitcast(builder.fptrunc(x, ir.VectorType(BFloatType(), LANES)), HALVES)
    bits = builder.bitcast(x, WORDS)
    odd = builder.and_(builder.lshr(bits, same(16, WORDS)), same(1, WORDS))
    rounded = builder.add(builder.add(bits, same(0x7FFF, WORDS)), odd)
    whole = builder.select(builder.fcmp_unordered("uno", x, x), same(0x7FC00000, WORDS), rounded)
    return builder.trunc(builder.lshr(whole, same(16, WORDS)), HALVES)


def widen(builder: Any, halves: Any) -> Any:
    """16-bit integers that are bfloat16 to float32 lanes."""
    return builder.bitcast(builder.shl(builder.zext(halves, WORDS), same(16, WORDS)), VECTOR)


def load_widened(builder: Any, half: bool, address: Any) -> Any:
    """LANES stored items as float32."""
    if not half:
        return load_from(builder, address)
    return widen(builder, load_from(builder, address, HALVES, align=2))


def load_stored(builder: Any, kind: str, address: Any) -> Any:
    """LANES items of float32, bfloat16 or float16 as float32."""
    if kind != "float16":
        return load_widened(builder, kind == "bfloat16", address)
    halves = load_from(builder, address, ir.VectorType(ir.HalfType(), LANES), align=2)
    return builder.fpext(halves, VECTOR)


def _store_narrowed(builder: Any, half: bool, x: Any, address: Any) -> None:
    store_to(builder, narrow(builder, x) if half else x, address, align=2 if half else 4)


def _load_item(builder: Any, half: bool, address: Any) -> Any:
    if not half:
        return load_from(builder, address, FLOAT)
    bits = builder.zext(load_from(builder, address, I16, align=2), I32)
    return builder.bitcast(builder.shl(bits, I32(16)), FLOAT)


def _copy_item(builder: Any, half: bool, source: Any, target: Any) -> None:
    kind = I16 if half else I32
    store_to(builder, load_from(builder, source, kind, align=2 if half else 4), target, align=2 if half else 4)


_address = types.int64
load = operation(load_from, vector, _address)
store = operation(store_to, types.void, vector, _address)
stream = operation(store_past_caches, types.void, vector, _address)
load_float = operation(lambda b, at: load_from(b, at, FLOAT), types.float32, _address)
store_float = operation(store_to, types.void, types.float32, _address)
load_int = operation(lambda b, at: load_from(b, at, I64), types.int64, _address)
fetch_add = operation(  # adds 1 in one atomic step and returns what was there
    lambda b, at: b.atomic_rmw("add", b.inttoptr(at, I64.as_pointer()), I64(1), "monotonic"), types.int64, _address
)
is_bfloat16 = operation_by_kind(lambda b, half: ir.Constant(ir.IntType(1), int(half)), types.boolean)
load_items = operation_by_kind(load_widened, vector, _address)  # LANES stored items, widened
store_items = operation_by_kind(_store_narrowed, types.void, vector, _address)  # ... narrowed
load_item = operation_by_kind(_load_item, types.float32, _address)
copy_item = operation_by_kind(_copy_item, types.void, _address, _address)

splat = operation(spread, vector, types.float32)
add = operation(lambda b, x, y: b.fadd(x, y), vector, vector, vector)
subtract = operation(lambda b, x, y: b.fsub(x, y), vector, vector, vector)
multiply = operation(lambda b, x, y: b.fmul(x, y), vector, vector, vector)
divide = operation(lambda b, x, y: b.fdiv(x, y), vector, vector, vector)
multiply_add = operation(fused, vector, vector, vector, vector)  # x * y + z
maximum = operation(_larger, vector, vector, vector)
minimum = operation(_smaller, vector, vector, vector)
rounded = operation(lambda b, x: widen(b, narrow(b, x)), vector, vector)  # to the nearest bfloat16
any_above = operation(_any_above, types.boolean, vector, vector)  # whether x > y in any lane
hide = operation(_hide, vector, vector, types.int64, types.int64, types.float32)  # value in lanes not in first .. last
exp2 = operation(_exp2, vector, vector)  # for -1e38 < x < 127
largest = operation(lambda b, x: reduced(b, x, _larger), types.float32, vector)  # of the lanes
total = operation(lambda b, x: reduced(b, x, lambda b, x, y: b.fadd(x, y)), types.float32, vector)  # of the lanes
first = operation(lambda b, x: b.extract_element(x, I32(0)), types.float32, vector)


def prefetch(builder: Any, address: Any) -> None:
    """Into the second-level cache: more of these can be under way than of those into the first."""
    pointer = builder.inttoptr(address, ir.IntType(8).as_pointer())
    call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, I32(0), I32(2), I32(1)])


def add_products_of_bytes(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """To each lane's int32, the products of its four bytes without and with a sign."""
    return call(builder, "llvm.x86.avx512.vpdpbusd.512", WORDS, [total, unsigned, signed])


def whole(builder: Any, x: Any, most: int) -> Any:
    """float32 lanes to the nearest int32 from -most to most, ties to even; what is no number becomes 0."""
    x = call(builder, f"llvm.rint.v{LANES}f32", VECTOR, [x])
    x = builder.select(builder.fcmp_ordered("ord", x, x), x, same(0.0))
    x = builder.select(builder.fcmp_ordered("<", x, same(float(most))), x, same(float(most)))
    x = builder.select(builder.fcmp_ordered(">", x, same(float(-most))), x, same(float(-most)))
    return builder.fptosi(x, WORDS)


def _power_below(builder: Any, x: Any) -> Any:
    return builder.bitcast(builder.and_(builder.bitcast(x, I32), I32(0x7F800000)), FLOAT)


power_below = operation(_power_below, types.float32, types.float32)  # the largest power of two that is not above x > 0
