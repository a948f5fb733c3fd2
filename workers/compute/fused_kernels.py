"""What stands between a layer's products, each in one pass over its rows, in bfloat16: norms of root mean squares,
gates, and rotary positions.

Every step is rounded as in Transformers' own code: `simd.rounded` stands where that makes a bfloat16 tensor. Threads
take some rows from a shared counter. Memory is named by address, strides are bytes.
"""

from __future__ import annotations

import ctypes
import math
import struct
from functools import cache
from typing import Any

import numpy as np
from numba import cfunc, types

from flexgen_lite.workers import simd
from flexgen_lite.workers.compute import prefill_cpu
from flexgen_lite.workers.compute.prefill_packing import OPTIONS, kernel
from flexgen_lite.workers.kernel_cache import from_cache
from flexgen_lite.workers.simd import LANES

ROUNDED_FIRST, ONE_MORE, IN_FLOAT32 = range(3)
"""Ways to multiply a normed row n with the weight w: round n, times w; n times (1 + w); n times w; then round."""
SILU, GELU_TANH = range(2)

_ITEMS = 1 << 14  # that a thread takes at once, more or less
_HALF = np.uint16(0)
_F = np.float32
_ONE = _F(1)
_LOG2E = _F(math.log2(math.e))
_GELU_1 = _F(-2 * math.sqrt(2 / math.pi) * math.log2(math.e))
_GELU_3 = _F(-2 * math.sqrt(2 / math.pi) * math.log2(math.e) * 0.044715)
_NOTHING = _F(-100)  # is as good as 0 behind an activation
_LEAST, _MOST = _F(-200), _F(126)  # exponents of two: 1 + 2 ** _LEAST is 1


class _Record:
    """A kernel's argument: `names` are int64, then come float32."""

    def __init__(self, names: str, floats: str = "") -> None:
        fields = [(name, np.int64) for name in ["taken", *names.split()]] + [(n, np.float32) for n in floats.split()]
        self.read = simd.record(np.dtype(fields))
        self.pack = struct.Struct(f"{len(names.split()) + 1}q{len(floats.split())}f").pack


_norm = _Record("source weight target rows dim stride way", "eps")
_gate = _Record("gate up target rows dim gate_stride up_stride way")
_rotary = _Record("source cos sin target rows heads dim rotary row_stride head_stride cos_stride to_row to_head")
_read_norm, _read_gate, _read_rotary = _norm.read, _gate.read, _rotary.read
norm_record, gate_record, rotary_record = _norm.pack, _gate.pack, _rotary.pack


@kernel
def _norm_row(call, source, target):  # type: ignore[no-untyped-def]
    squares = simd.splat(_F(0))
    for i in range(0, 2 * call.dim, 2 * LANES):
        x = simd.load_items(source + i, _HALF)
        squares = simd.multiply_add(x, x, squares)
    mean = simd.total(squares) / _F(call.dim)
    factor = simd.splat(_ONE / _F(math.sqrt(mean + call.eps)))
    for i in range(0, 2 * call.dim, 2 * LANES):
        x = simd.multiply(simd.load_items(source + i, _HALF), factor)
        weight = simd.load_items(call.weight + i, _HALF)
        if call.way == ROUNDED_FIRST:
            x = simd.rounded(x)
        elif call.way == ONE_MORE:
            weight = simd.add(weight, simd.splat(_ONE))
        simd.store_items(simd.multiply(x, weight), target + i, _HALF)


def norm(address: int) -> None:
    """One thread's part of a norm."""
    call = _read_norm(address)
    piece = (_ITEMS + call.dim - 1) // call.dim
    first = simd.fetch_add(address) * piece
    while first < call.rows:
        for row in range(first, min(first + piece, call.rows)):
            _norm_row(call, call.source + row * call.stride, call.target + row * call.dim * 2)
        first = simd.fetch_add(address) * piece


@kernel
def _one_and_power(exponent):  # type: ignore[no-untyped-def]
    """1 + 2 ** exponent."""
    exponent = simd.maximum(simd.splat(_LEAST), simd.minimum(simd.splat(_MOST), exponent))
    return simd.add(simd.splat(_ONE), simd.exp2(exponent))


@kernel
def _gate_row(call, gate, up, target):  # type: ignore[no-untyped-def]
    for i in range(0, 2 * call.dim, 2 * LANES):
        x = simd.load_items(gate + i, _HALF)
        low = simd.minimum(simd.splat(_F(0)), x)
        low = simd.subtract(low, low)  # no number where x is -infinity, as 0 times that is none
        x = simd.subtract(simd.maximum(simd.splat(_NOTHING), x), low)
        if call.way == SILU:
            y = simd.divide(x, _one_and_power(simd.multiply(x, simd.splat(-_LOG2E))))
        else:
            factor = simd.multiply_add(simd.multiply(x, x), simd.splat(_GELU_3), simd.splat(_GELU_1))
            two_parts = simd.divide(simd.splat(_F(2)), _one_and_power(simd.multiply(x, factor)))
            tanh = simd.subtract(two_parts, simd.splat(_ONE))  # rounded here, as what PyTorch adds 1 to
            y = simd.multiply(simd.multiply(x, simd.splat(_F(0.5))), simd.add(tanh, simd.splat(_ONE)))
        y = simd.rounded(y)
        simd.store_items(simd.multiply(y, simd.load_items(up + i, _HALF)), target + i, _HALF)


def gate(address: int) -> None:
    """One thread's part of act(gate) * up."""
    call = _read_gate(address)
    piece = (_ITEMS + call.dim - 1) // call.dim
    first = simd.fetch_add(address) * piece
    while first < call.rows:
        for row in range(first, min(first + piece, call.rows)):
            target = call.target + row * call.dim * 2
            _gate_row(call, call.gate + row * call.gate_stride, call.up + row * call.up_stride, target)
        first = simd.fetch_add(address) * piece


@kernel
def _turn(first, second, cos, sin):  # type: ignore[no-untyped-def]
    """first * cos + second * sin."""
    return simd.add(simd.rounded(simd.multiply(first, cos)), simd.rounded(simd.multiply(second, sin)))


@kernel
def _rotate_head(call, source, cos, sin, target):  # type: ignore[no-untyped-def]
    for i in range(0, call.rotary, 2 * LANES):
        j = i + call.rotary  # half of its items, and twice as many bytes
        x, y = simd.load_items(source + i, _HALF), simd.load_items(source + j, _HALF)
        minus_y = simd.subtract(simd.splat(_F(0)), y)
        turned = _turn(x, minus_y, simd.load_items(cos + i, _HALF), simd.load_items(sin + i, _HALF))
        simd.store_items(turned, target + i, _HALF)
        turned = _turn(y, x, simd.load_items(cos + j, _HALF), simd.load_items(sin + j, _HALF))
        simd.store_items(turned, target + j, _HALF)
    for i in range(2 * call.rotary, 2 * call.dim, 2 * LANES):
        simd.store_items(simd.load_items(source + i, _HALF), target + i, _HALF)


def rotary(address: int) -> None:
    """One thread's part of turning all heads of queries, or of keys."""
    call = _read_rotary(address)
    piece = (_ITEMS + call.heads * call.dim - 1) // (call.heads * call.dim)
    first = simd.fetch_add(address) * piece
    while first < call.rows:
        for row in range(first, min(first + piece, call.rows)):
            cos, sin = call.cos + row * call.cos_stride, call.sin + row * call.cos_stride
            source, target = call.source + row * call.row_stride, call.target + row * call.to_row
            for head in range(call.heads):
                _rotate_head(call, source + head * call.head_stride, cos, sin, target + head * call.to_head)
        first = simd.fetch_add(address) * piece


@cache
def compiled(function: Any) -> Any:
    """One of the three above as a C function, `void f(record *)`, to be run by every thread."""
    return from_cache(lambda: cfunc(types.void(types.int64), cache=True, **OPTIONS)(function), function.__name__)


@cache
def _entry(function: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(compiled(function).address)


_one_thread = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _direct(function: Any) -> Any:
    return _one_thread(compiled(function).address)


def run(function: Any, record: bytes, items: int, threads: int) -> None:
    """Runs one of the three for a record, in `threads` threads where there is enough for two."""
    buffer = ctypes.create_string_buffer(record)
    if threads == 1 or items <= 2 * _ITEMS:
        _direct(function)(ctypes.addressof(buffer))
    else:
        prefill_cpu.parallel()(_entry(function), buffer, threads, 0)
