"""Recurrences of the gated delta rule and of Mamba 2, token by token: a head's state stays in the cache while its
tokens go by, and is read from where it lies and written to where it is to lie once each. In float32.

    delta    S' = decay * S;  S'' = S' + key (beta * (value - key . S'));  output = query . S''     S `[H, K, V]`
    mamba    S' = decay * S + x B;  output = S' . C                                                 S `[H, P, N]`

Decays of the delta rule are one for a head, or one for each of its K. Threads take heads of sequences from a shared
counter. Memory is named by address, all of it contiguous; the last dimension of states is in whole vectors.
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

_DELTA = (
    "begun", "taken", "sources", "targets", "query", "key", "value", "decay", "beta", "output", "sequences", "tokens",
    "heads", "rows", "columns", "decay_step",
)  # fmt: skip
_MAMBA = (
    "begun", "taken", "sources", "targets", "x", "decay", "inputs", "outputs", "output", "sequences", "tokens", "heads",
    "groups", "rows", "columns",
)  # fmt: skip
_read_delta, _read_mamba = (simd.record(np.dtype([(name, np.int64) for name in names])) for names in (_DELTA, _MAMBA))
_ZERO = np.float32(0)
_STEP = 4 * LANES  # bytes of a vector


@kernel
def _keep(value, address, once):  # type: ignore[no-untyped-def]
    """`once`: it is not read soon."""
    if once:
        simd.stream(value, address)
    else:
        simd.store(value, address)


@kernel
def _four(call, source, target, query, key, value, decay, beta, output, once):  # type: ignore[no-untyped-def]
    """A token, four vectors of V."""
    stride, size = 4 * call.columns, call.rows
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
        _keep(s0, target, once)
        _keep(s1, target + _STEP, once)
        _keep(s2, target + 2 * _STEP, once)
        _keep(s3, target + 3 * _STEP, once)
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
def _one(call, source, target, query, key, value, decay, beta, output, once):  # type: ignore[no-untyped-def]
    """A token, one vector of V."""
    stride, size = 4 * call.columns, call.rows
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
        _keep(state, target, once)
        total = simd.multiply_add(simd.splat(simd.load_float(query + 4 * k)), state, total)
        at += stride
        target += stride
    simd.store(total, output)


def delta(address: int) -> None:
    """One thread's part."""
    call = _read_delta(address)
    items, state_bytes = call.sequences * call.heads, 4 * call.rows * call.columns
    decays, once = (call.rows if call.decay_step != 0 else 1), call.tokens == 1
    item = simd.fetch_add(address + 8)
    while item < items:
        sequence, head = item // call.heads, item % call.heads
        begin = simd.load_int(call.sources + 8 * sequence) + head * state_bytes
        target = simd.load_int(call.targets + 8 * sequence) + head * state_bytes
        place = 0
        while place < 4 * call.columns:
            whole = place + 4 * _STEP <= 4 * call.columns
            source = begin
            for token in range(call.tokens):
                row = (sequence * call.tokens + token) * call.heads + head
                query, key = call.query + 4 * row * call.rows, call.key + 4 * row * call.rows
                value = call.value + 4 * row * call.columns + place
                output = call.output + 4 * row * call.columns + place
                decay, beta = call.decay + 4 * row * decays, call.beta + 4 * row
                if whole:
                    _four(call, source + place, target + place, query, key, value, decay, beta, output, once)
                else:
                    _one(call, source + place, target + place, query, key, value, decay, beta, output, once)
                source = target
            place += 4 * _STEP if whole else _STEP
        item = simd.fetch_add(address + 8)


@kernel
def _mamba_four(call, source, target, x, decay, inputs, outputs, output, once):  # type: ignore[no-untyped-def]
    """Four of a head's P."""
    stride, less = 4 * call.columns, simd.splat(decay)
    x0, x1 = simd.splat(simd.load_float(x)), simd.splat(simd.load_float(x + 4))
    x2, x3 = simd.splat(simd.load_float(x + 8)), simd.splat(simd.load_float(x + 12))
    y0, y1, y2, y3 = simd.splat(_ZERO), simd.splat(_ZERO), simd.splat(_ZERO), simd.splat(_ZERO)
    for at in range(0, stride, _STEP):
        more, asked = simd.load(inputs + at), simd.load(outputs + at)
        s0 = simd.multiply_add(x0, more, simd.multiply(simd.load(source + at), less))
        s1 = simd.multiply_add(x1, more, simd.multiply(simd.load(source + stride + at), less))
        s2 = simd.multiply_add(x2, more, simd.multiply(simd.load(source + 2 * stride + at), less))
        s3 = simd.multiply_add(x3, more, simd.multiply(simd.load(source + 3 * stride + at), less))
        _keep(s0, target + at, once)
        _keep(s1, target + stride + at, once)
        _keep(s2, target + 2 * stride + at, once)
        _keep(s3, target + 3 * stride + at, once)
        y0 = simd.multiply_add(s0, asked, y0)
        y1 = simd.multiply_add(s1, asked, y1)
        y2 = simd.multiply_add(s2, asked, y2)
        y3 = simd.multiply_add(s3, asked, y3)
    simd.store_float(simd.total(y0), output)
    simd.store_float(simd.total(y1), output + 4)
    simd.store_float(simd.total(y2), output + 8)
    simd.store_float(simd.total(y3), output + 12)


@kernel
def _mamba_row(call, source, target, x, decay, inputs, outputs, once):  # type: ignore[no-untyped-def]
    """One of a head's P, with the output."""
    more, less, total = simd.splat(x), simd.splat(decay), simd.splat(_ZERO)
    for at in range(0, 4 * call.columns, _STEP):
        state = simd.multiply_add(more, simd.load(inputs + at), simd.multiply(simd.load(source + at), less))
        _keep(state, target + at, once)
        total = simd.multiply_add(state, simd.load(outputs + at), total)
    return simd.total(total)


def mamba(address: int) -> None:
    """One thread's part."""
    call = _read_mamba(address)
    items, state_bytes, stride = call.sequences * call.heads, 4 * call.rows * call.columns, 4 * call.columns
    once = call.tokens == 1
    item = simd.fetch_add(address + 8)
    while item < items:
        sequence, head = item // call.heads, item % call.heads
        source = simd.load_int(call.sources + 8 * sequence) + head * state_bytes
        target = simd.load_int(call.targets + 8 * sequence) + head * state_bytes
        group = head // (call.heads // call.groups)
        for token in range(call.tokens):
            place = sequence * call.tokens + token
            row = place * call.heads + head
            inputs = call.inputs + (place * call.groups + group) * stride
            outputs = call.outputs + (place * call.groups + group) * stride
            x, output = call.x + 4 * row * call.rows, call.output + 4 * row * call.rows
            decay = simd.load_float(call.decay + 4 * row)
            whole = call.rows // 4 * 4
            for p in range(0, whole, 4):
                at, to = source + p * stride, target + p * stride
                _mamba_four(call, at, to, x + 4 * p, decay, inputs, outputs, output + 4 * p, once)
            for p in range(whole, call.rows):
                found = _mamba_row(
                    call, source + p * stride, target + p * stride, simd.load_float(x + 4 * p), decay, inputs, outputs,
                    once,
                )  # fmt: skip
                simd.store_float(found, output + 4 * p)
            source = target
        item = simd.fetch_add(address + 8)


@cache
def _compiled(function: Any) -> Any:
    return from_cache(lambda: cfunc(types.void(types.int64), cache=True, **OPTIONS)(function), function.__name__)


def run(function: Any, threads: int, *fields: int) -> None:
    """One of `delta` and `mamba`; `fields` are those of its record behind the two counters."""
    record = ctypes.create_string_buffer(struct.pack(f"{len(fields) + 2}q", 0, 0, *fields))
    prefill_cpu.parallel()(ctypes.c_void_p(_compiled(function).address), record, threads, 0)
