"""One token of the gated delta rule, for many sequences at once: each state is read once, where it lies, and written
once, where it is to lie next. In float32; bound by the memory that states are in.

    S' = decay * S;  S'' = S' + key (beta * (value - key . S'));  output = query . S''

A state `[H, K, V]` is of one sequence; decays are one for a head, or one for each of its K. Threads take heads of
sequences from a shared counter. Memory is named by address, all of it contiguous.
"""

from __future__ import annotations

import ctypes
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

_NAMES = (
    "begun", "taken", "sources", "targets", "query", "key", "value", "decay", "beta", "output", "sequences", "heads",
    "key_dim", "value_dim", "decay_step",
)  # fmt: skip
_read = simd.record(np.dtype([(name, np.int64) for name in _NAMES]))
_pack = struct.Struct(f"{len(_NAMES)}q").pack
_ZERO = np.float32(0)
_STEP = 4 * LANES  # bytes of a vector


@kernel
def _four(call, source, target, query, key, value, decay, beta, output):  # type: ignore[no-untyped-def]
    """Of four vectors of V."""
    stride, size = 4 * call.value_dim, call.key_dim
    m0, m1, m2, m3 = simd.splat(_ZERO), simd.splat(_ZERO), simd.splat(_ZERO), simd.splat(_ZERO)
    at = source
    for k in range(size):
        factor = simd.splat(simd.load_float(key + 4 * k))
        less = simd.splat(simd.load_float(decay + call.decay_step * k))
        m0 = simd.multiply_add(simd.multiply(simd.load(at), less), factor, m0)
        m1 = simd.multiply_add(simd.multiply(simd.load(at + _STEP), less), factor, m1)
        m2 = simd.multiply_add(simd.multiply(simd.load(at + 2 * _STEP), less), factor, m2)
        m3 = simd.multiply_add(simd.multiply(simd.load(at + 3 * _STEP), less), factor, m3)
        at += stride
    share = simd.splat(simd.load_float(beta))
    m0 = simd.multiply(simd.subtract(simd.load(value), m0), share)
    m1 = simd.multiply(simd.subtract(simd.load(value + _STEP), m1), share)
    m2 = simd.multiply(simd.subtract(simd.load(value + 2 * _STEP), m2), share)
    m3 = simd.multiply(simd.subtract(simd.load(value + 3 * _STEP), m3), share)
    y0, y1, y2, y3 = simd.splat(_ZERO), simd.splat(_ZERO), simd.splat(_ZERO), simd.splat(_ZERO)
    at = source
    for k in range(size):
        factor = simd.splat(simd.load_float(key + 4 * k))
        less = simd.splat(simd.load_float(decay + call.decay_step * k))
        asked = simd.splat(simd.load_float(query + 4 * k))
        s0 = simd.multiply_add(factor, m0, simd.multiply(simd.load(at), less))
        s1 = simd.multiply_add(factor, m1, simd.multiply(simd.load(at + _STEP), less))
        s2 = simd.multiply_add(factor, m2, simd.multiply(simd.load(at + 2 * _STEP), less))
        s3 = simd.multiply_add(factor, m3, simd.multiply(simd.load(at + 3 * _STEP), less))
        simd.stream(s0, target)
        simd.stream(s1, target + _STEP)
        simd.stream(s2, target + 2 * _STEP)
        simd.stream(s3, target + 3 * _STEP)
        y0 = simd.multiply_add(asked, s0, y0)
        y1 = simd.multiply_add(asked, s1, y1)
        y2 = simd.multiply_add(asked, s2, y2)
        y3 = simd.multiply_add(asked, s3, y3)
        at += stride
        target += stride
    simd.store(y0, output)
    simd.store(y1, output + _STEP)
    simd.store(y2, output + 2 * _STEP)
    simd.store(y3, output + 3 * _STEP)


@kernel
def _one(call, source, target, query, key, value, decay, beta, output):  # type: ignore[no-untyped-def]
    """Of one vector of V."""
    stride, size = 4 * call.value_dim, call.key_dim
    more, at = simd.splat(_ZERO), source
    for k in range(size):
        state = simd.multiply(simd.load(at), simd.splat(simd.load_float(decay + call.decay_step * k)))
        more = simd.multiply_add(state, simd.splat(simd.load_float(key + 4 * k)), more)
        at += stride
    more = simd.multiply(simd.subtract(simd.load(value), more), simd.splat(simd.load_float(beta)))
    total, at = simd.splat(_ZERO), source
    for k in range(size):
        state = simd.multiply(simd.load(at), simd.splat(simd.load_float(decay + call.decay_step * k)))
        state = simd.multiply_add(simd.splat(simd.load_float(key + 4 * k)), more, state)
        simd.stream(state, target)
        total = simd.multiply_add(simd.splat(simd.load_float(query + 4 * k)), state, total)
        at += stride
        target += stride
    simd.store(total, output)


def delta(address: int) -> None:
    """One thread's part."""
    call = _read(address)
    items, state_bytes = call.sequences * call.heads, 4 * call.key_dim * call.value_dim
    decays = call.decay_step // 4 * call.key_dim if call.decay_step != 0 else 1  # of a head
    item = simd.fetch_add(address + 8)
    while item < items:
        sequence, head = item // call.heads, item % call.heads
        source = simd.load_int(call.sources + 8 * sequence) + head * state_bytes
        target = simd.load_int(call.targets + 8 * sequence) + head * state_bytes
        query, key = call.query + 4 * item * call.key_dim, call.key + 4 * item * call.key_dim
        value, output = call.value + 4 * item * call.value_dim, call.output + 4 * item * call.value_dim
        decay, beta, place = call.decay + 4 * item * decays, call.beta + 4 * item, 0
        while place + 4 * _STEP <= 4 * call.value_dim:
            _four(call, source + place, target + place, query, key, value + place, decay, beta, output + place)
            place += 4 * _STEP
        while place < 4 * call.value_dim:
            _one(call, source + place, target + place, query, key, value + place, decay, beta, output + place)
            place += _STEP
        item = simd.fetch_add(address + 8)


@cache
def _compiled() -> Any:
    return from_cache(lambda: cfunc(types.void(types.int64), cache=True, **OPTIONS)(delta), delta.__name__)


def run(threads: int, *fields: int) -> None:
    """`fields` are those behind the two counters."""
    record = ctypes.create_string_buffer(_pack(0, 0, *fields))
    prefill_cpu.parallel()(ctypes.c_void_p(_compiled().address), record, threads, 0)
