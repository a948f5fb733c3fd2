"""Rounding the rows of a prompt's keys and values to what a KV cache of 8 bits keeps, in one pass over them.

Threads take some rows of a head from a shared counter. Memory is named by address.
"""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import cfunc, types

from flexgen_lite.workers import hadamard, simd
from flexgen_lite.workers.compute import prefill_cpu
from flexgen_lite.workers.compute.prefill_packing import OPTIONS, kernel
from flexgen_lite.workers.kernel_cache import from_cache
from flexgen_lite.workers.simd import LANES

ROWS = 64  # that a thread takes at once

CALL = np.dtype(
    [
        *((name, np.int64) for name in ("begun", "taken")),  # counters, 0 before a call: threads, pieces of work
        *((name, np.int64) for name in ("source", "target", "scratch")),  # addresses
        *((name, np.int64) for name in ("heads", "rows", "dim", "order")),
        *((name, np.int64) for name in ("row_stride", "head_stride")),  # of the source, in bytes
    ]
)
_FIELDS = struct.Struct(f"{len(CALL.names or ())}q")
_call: Any = simd.record(CALL)
_F = np.float32
_ZERO, _MOST = _F(0), _F(127)


@kernel
def row_bytes(dim):  # type: ignore[no-untyped-def]
    """Room for a row, as _round_row needs it."""
    return (dim // LANES + 2) * 4 * LANES


def _keep(builder: Any, x: Any, scale: Any, kept_scale: Any) -> Any:
    items = simd.call(builder, f"llvm.rint.v{LANES}f32", simd.VECTOR, [builder.fdiv(x, simd.spread(builder, scale))])
    return builder.fmul(items, simd.spread(builder, kept_scale))


_keep_items = simd.operation(_keep, simd.vector, simd.vector, types.float32, types.float32)


@kernel
def _round_row(source, target, row, dim, order, kind):  # type: ignore[no-untyped-def]
    """A row of `dim` items; `row` is room for it as float32, and for two vectors more."""
    size = 2 if simd.is_bfloat16(kind) else 4
    whole = dim // LANES * LANES
    for i in range(0, whole, LANES):
        simd.store(simd.load_items(source + i * size, kind), row + 4 * i)
    simd.store(simd.splat(_ZERO), row + 4 * whole)
    for i in range(whole, dim):
        simd.store_float(simd.load_item(source + i * size, kind), row + 4 * i)
    hadamard.multiply(row, dim, order)
    top, flaw = hadamard.largest(row, dim)
    scale = top / _MOST + flaw
    if scale != _ZERO:  # all zeros are kept as they are
        for i in range(row, row + 4 * dim, 4 * LANES):
            simd.store(_keep_items(simd.load(i), scale, scale / _F(order)), i)
    hadamard.multiply(row, dim, order)
    for i in range(0, whole, LANES):
        simd.store_items(simd.load(row + 4 * i), target + i * size, kind)
    for i in range(whole, dim):
        _store_item(simd.load(row + 4 * i), target + i * size, kind)


def _store_first(builder: Any, kind: str, x: Any, target: Any) -> None:
    half = kind == "bfloat16"
    item = builder.extract_element(simd.narrow(builder, x) if half else x, simd.I32(0))
    simd.store_to(builder, item, target, align=2 if half else 4)


# store_item(x, target, kind): the first lane of x.
_store_item = simd.operation_of_kind(_store_first, types.void, simd.vector, types.int64)


@kernel
def _round_rows(address, kind):  # type: ignore[no-untyped-def]
    call = _call(address)
    size = 2 if simd.is_bfloat16(kind) else 4
    pieces = (call.rows + ROWS - 1) // ROWS
    row = call.scratch + simd.fetch_add(address) * row_bytes(call.dim)
    piece = simd.fetch_add(address + 8)
    while piece < pieces * call.heads:
        head, first = piece // pieces, piece % pieces * ROWS
        for i in range(first, min(first + ROWS, call.rows)):
            source = call.source + head * call.head_stride + i * call.row_stride
            target = call.target + (head * call.rows + i) * call.dim * size
            _round_row(source, target, row, call.dim, call.order, kind)
        piece = simd.fetch_add(address + 8)


def round_float32(address: int) -> None:
    """One thread's part."""
    _round_rows(address, np.float32(0))


def round_bfloat16(address: int) -> None:
    """The same in bfloat16."""
    _round_rows(address, np.uint16(0))


@cache
def compiled(function: Any) -> Any:
    """One of the two above as a C function, `void f(CALL *)`, to be run by every thread."""
    return from_cache(lambda: cfunc(types.void(types.int64), cache=True, **OPTIONS)(function), function.__name__)


def prepare(dtype: torch.dtype) -> None:
    """Loads the kernel for `dtype`, or compiles it."""
    if _serves(dtype):
        _ = _kernel_for(dtype)


def serves(rows: torch.Tensor) -> bool:
    return _serves(rows.dtype)


def rounded(rows_1GTD: torch.Tensor, order: int) -> torch.Tensor:
    """See int8_rows.rounded; for rows that it serves. Runs on PyTorch's threads."""
    source = rows_1GTD if rows_1GTD.stride(3) == 1 else rows_1GTD.contiguous()
    _, heads, rows, dim = source.shape
    target = torch.empty(source.shape, dtype=source.dtype)
    threads, item = torch.get_num_threads(), source.element_size()
    record = ctypes.create_string_buffer(
        _FIELDS.pack(
            0, 0, source.data_ptr(), target.data_ptr(), prefill_cpu.scratch_address(threads * row_bytes(dim)),
            heads, rows, dim, order, source.stride(2) * item, source.stride(1) * item,
        )
    )  # fmt: skip
    prefill_cpu.parallel()(ctypes.c_void_p(_kernel_for(source.dtype).address), record, threads, 0)
    return target


def _serves(dtype: torch.dtype) -> bool:
    return prefill_cpu.parallel() is not None and dtype in prefill_cpu.DTYPES


def _kernel_for(dtype: torch.dtype) -> Any:
    return compiled(round_bfloat16 if dtype == torch.bfloat16 else round_float32)
