"""Casts between float formats as bit arithmetic on unsigned integers, compiled by numba.

Rounding is to the nearest, ties to even. Every intermediate is cast back to 32 bits: numba would widen it to
64 and halve the number of elements per SIMD instruction. Imported only when a cast is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from flexgen_lite.workers.kernel_cache import guard

guard()

U16, U32 = np.uint16, np.uint32


def _as_float_code(typing_context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


def _as_bits_code(typing_context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


_inlined: Any = njit(inline="always")
_as_float: Any = intrinsic(_as_float_code)
_as_bits: Any = intrinsic(_as_bits_code)


@_inlined  # type: ignore[untyped-decorator]
def _to_bfloat16(bits: Any) -> Any:
    rounded = U32(U32(U32(bits + U32(0x7FFF)) + U32(U32(bits >> U32(16)) & U32(1))) >> U32(16))
    is_nan = U32(bits & U32(0x7FFFFFFF)) > U32(0x7F800000)
    return U16(U32(0x7FC0) if is_nan else rounded)


@_inlined  # type: ignore[untyped-decorator]
def _to_float16(bits: Any) -> Any:
    sign = U32(U32(bits >> U32(16)) & U32(0x8000))
    size = U32(bits & U32(0x7FFFFFFF))
    # Normal: the exponent's bias goes from 127 to 15, rounding at bit 13; a carry runs into the exponent.
    odd = U32(U32(size >> U32(13)) & U32(1))
    normal = U32(U32(U32(U32(size + U32(0xFFF)) + odd) - U32(0x38000000)) >> U32(13))
    # Below 2^-14: adding 0.5 moves multiples of 2^-24 to the lowest mantissa bits; the addition rounds.
    subnormal = U32(_as_bits(_as_float(size) + np.float32(0.5)) - U32(0x3F000000))
    result = subnormal if size < U32(0x38800000) else normal
    result = U32(0x7C00) if size >= U32(0x477FF000) else result
    result = U32(0x7E00) if size > U32(0x7F800000) else result
    return U16(U32(result | sign))


@_inlined  # type: ignore[untyped-decorator]
def _from_float16(half: Any) -> Any:
    sign = U32(U32(half & U32(0x8000)) << U32(16))
    size = U32(U32(half & U32(0x7FFF)) << U32(13))
    # 2^112 is the difference of the exponents' biases; the product is exact, for subnormal numbers too.
    bits = _as_bits(_as_float(size) * np.float32(2.0**112))
    bits = U32(bits | U32(0x7F800000)) if size >= U32(0x0F800000) else bits
    return U32(bits | sign)


def _compiled(kernel: Callable[..., None]) -> Any:
    try:
        return njit(nogil=True, cache=True)(kernel)
    except RuntimeError:  # no folder to keep the compiled code in
        return njit(nogil=True)(kernel)


def _float32_to_bfloat16(source: Any, target: Any) -> None:
    for i in range(source.size):
        target[i] = _to_bfloat16(source[i])


def _float32_to_float16(source: Any, target: Any) -> None:
    for i in range(source.size):
        target[i] = _to_float16(source[i])


def _float16_to_float32(source: Any, target: Any) -> None:
    for i in range(source.size):
        target[i] = _from_float16(U32(source[i]))


def _float16_to_bfloat16(source: Any, target: Any) -> None:
    for i in range(source.size):
        target[i] = _to_bfloat16(_from_float16(U32(source[i])))


def _bfloat16_to_float16(source: Any, target: Any) -> None:
    for i in range(source.size):
        target[i] = _to_float16(U32(U32(source[i]) << U32(16)))


# By source and target dtype: kernel(source, target) on contiguous 1-D arrays of bits, uint16 or uint32.
KERNELS: dict[tuple[str, str], Any] = {
    ("float32", "bfloat16"): _compiled(_float32_to_bfloat16),
    ("float32", "float16"): _compiled(_float32_to_float16),
    ("float16", "float32"): _compiled(_float16_to_float32),
    ("float16", "bfloat16"): _compiled(_float16_to_bfloat16),
    ("bfloat16", "float16"): _compiled(_bfloat16_to_float16),
}
