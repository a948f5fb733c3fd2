"""Weights that our own kernels multiply with (product_kernels.py), one or many, and the calls of these.

Measured on 2 cores of a Zen 4 with benchmarks/products.py, weights of six shapes from RAM: times oneDNN's rate with the
same weights, lowest and highest of the shapes.

    rows      4            8            16           32           48           64
           1.1 - 1.4    1.1 - 1.5    1.2 - 1.3    1.1 - 1.2    1.0 - 1.1    1.0 - 1.05
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from flexgen_lite.model.packing import STEP, TABLES, Packing
from flexgen_lite.workers import simd
from flexgen_lite.workers.compute import prefill_cpu, product_kernels
from flexgen_lite.workers.compute import product_amx as amx
from flexgen_lite.workers.compute.product_kernels import CALL, SEGMENT
from flexgen_lite.workers.compute.product_panels import (
    ADDED,
    BYTES4,
    BYTES8,
    E4M3,
    FINISHES,
    INT4,
    INT8,
    PACKED,
    ROWS,
    STEP_BYTES,
    SUBTRACTED,
    TRANSPOSED,
)
from flexgen_lite.workers.compute.product_scratch import scratch
from flexgen_lite.workers.compute.product_tiles import COLUMNS, ROW, WIDENED
from flexgen_lite.workers.compute.product_unpack import table_address
from flexgen_lite.workers.compute.scale_loads import FIELDS, fields_of
from flexgen_lite.workers.simd import LANES

MAX_ROWS = 64  # of a segment, for vectors
MAX_TILE_ROWS = 256  # for tiles
WORDS_BYTES = 4 << 20  # of a segment's packed rows, where there are more than MAX_ROWS of them
ALL_WORDS_BYTES = 64 << 20  # of all threads together, likewise
CHUNK = 512  # steps
FEW_ROWS, FEW_ROWS_CHUNK = 16, 64  # of weights that are unpacked: a panel that stays in the first-level cache
MAX_SPAN = 8  # blocks of an item


@dataclass(frozen=True, slots=True)
class Weights:
    """`count` weights `[N, K]`, one behind the other from `address` on, stored as `storage` says.

    Attributes:
        scales: of weights of 8 and 4 bits, see FIELDS of scale_loads.py.
        table: address of what codes of 4 bits stand for.
        group: items of K that have a scale.
        finish: of products of values and scales, see product_panels.py.
    """

    address: int
    storage: int
    columns: int
    width: int
    count: int = 1
    scales: tuple[int, ...] = (0,) * len(FIELDS)
    table: int = 0
    group: int = 0
    finish: int = 0

    @property
    def most_rows(self) -> int:
        """Of a segment."""
        if not amx.allowed() and self.storage not in (BYTES8, BYTES4):
            return MAX_ROWS
        room = min(WORDS_BYTES, ALL_WORDS_BYTES // torch.get_num_threads())
        return max(MAX_ROWS, min(MAX_TILE_ROWS, room // (2 * self.width) // (2 * amx.ROWS) * 2 * amx.ROWS))

    def is_faster(self, num_rows: int) -> bool:
        """Whether the kernel computes so many rows faster than oneDNN."""
        return are_fastest() or num_rows <= MAX_ROWS

    def in_panels(self) -> Weights:
        """The same where another process has put them into panels already."""
        return replace(self, storage=PACKED)

    def multiply(self, x: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
        """y `[..., N]` of the first weight and x `[..., K]`, contiguous and not empty."""
        output = x.new_empty((*x.shape[:-1], self.columns))
        self._multiply(output, x, bias_N, *_rows_in_order(x.numel() // self.width, self.most_rows))
        return output

    def multiply_segments(
        self,
        output: torch.Tensor,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        parts: npt.NDArray[Any],
        x_rows: torch.Tensor | None = None,
        y_rows: torch.Tensor | None = None,
    ) -> None:
        """Products of several weights into contiguous memory, on PyTorch's threads; not to be called by two threads at
        once.

        Args:
            bias: `[count, N]`.
            parts: SEGMENTs; their rows count in the order of `x_rows` and `y_rows`.
            x_rows: numbers of rows of `x`, int64; None: its rows in order.
            y_rows: likewise of `output`.
        """
        if len(parts):
            most_rows, address = int(parts["rows"].max()), parts.ctypes.data
            self._multiply(output, x, bias, _Segments(address, len(parts), most_rows), parts, x_rows, y_rows)

    def _multiply(
        self,
        output: torch.Tensor,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        segments: _Segments,
        parts: npt.NDArray[Any],
        x_rows: torch.Tensor | None = None,
        y_rows: torch.Tensor | None = None,
    ) -> None:
        """`parts` is what `segments` points into."""
        assert x.dtype == output.dtype == torch.bfloat16 and x.is_contiguous() and x.shape[-1] == self.width
        assert bias is None or bias.dtype == torch.bfloat16
        threads, most_rows = torch.get_num_threads(), segments.most_rows
        tiles = amx.CONFIG if amx.allowed() and self.storage not in (BYTES8, BYTES4) else 0
        call = _layout(self.storage, self.columns, self.width, self.group, most_rows, segments.number, threads, tiles)
        _FIELDS.pack_into(
            _record, 0, 0, 0,
            x.data_ptr(), _address(x_rows), output.data_ptr(), _address(y_rows), segments.address, segments.number,
            prefill_cpu.scratch_address(threads * call.scratch_bytes), call.scratch_bytes,
            self.address, call.weight_bytes, *self.scales, self.table, self.group, self.finish,
            _address(bias), self.storage, call.step_bytes,
            self.columns, self.width // 2, call.chunk, call.span, most_rows, tiles,
        )  # fmt: skip
        prefill_cpu.parallel()(call.function, _record_address, threads, 0)

    def pack(self) -> Weights:
        """These weights, which lie row by row, put into panels where they lie."""
        assert self.storage == ROWS and fills_panels(self.columns)
        threads, scratch_bytes = torch.get_num_threads(), 2 * self.width * COLUMNS + LANES * ROW
        fields = {
            "scratch": prefill_cpu.scratch_address(threads * scratch_bytes), "scratch_bytes": scratch_bytes,
            "weights": self.address, "storage": ROWS, "columns": self.count * self.columns, "steps": self.width // 2,
            "chunk": self.width // 2,
        }  # fmt: skip
        _FIELDS.pack_into(_record, 0, *(fields.get(name, 0) for name in _NAMES))
        prefill_cpu.parallel()(_address_of(product_kernels.pack), _record_address, threads, 0)
        return self.in_panels()


class _Segments(NamedTuple):
    address: int
    number: int
    most_rows: int  # of one


class _Layout(NamedTuple):
    """What a call has beside addresses, see product_kernels.CALL."""

    function: ctypes.c_void_p
    scratch_bytes: int
    weight_bytes: int
    step_bytes: int
    chunk: int
    span: int


@lru_cache(maxsize=1024)
def _layout(
    storage: int, columns: int, width: int, group: int, most_rows: int, num_segments: int, threads: int, tiles: int
) -> _Layout:
    steps, blocks = width // 2, -(-columns // COLUMNS)
    is_unpacked = storage in (INT8, INT4, BYTES4, E4M3)
    chunk = _chunk(steps, FEW_ROWS_CHUNK if is_unpacked and most_rows <= FEW_ROWS else CHUNK)
    function = product_kernels.multiply_bytes if storage in (BYTES8, BYTES4) else product_kernels.multiply
    return _Layout(
        _address_of(function),
        scratch(0, most_rows, steps, chunk, storage, group, tiles).end,
        _weight_bytes(storage, columns, width),
        STEP_BYTES.get(storage, 0),
        chunk,
        max(1, min(MAX_SPAN, num_segments * blocks // (8 * threads))),
    )


_NAMES = CALL.names or ()
_FIELDS = struct.Struct(f"{len(_NAMES)}q")
_record = (ctypes.c_int64 * len(_NAMES))()
_record_address = ctypes.c_void_p(ctypes.addressof(_record))


def weights_in_rows(weight: torch.Tensor, is_transposed: bool = False) -> Weights | None:
    """A weight `[N, K]`, or several `[E, N, K]`, or `[K, N]` and `[E, K, N]`, as our kernels see it where it lies row
    by row; None where they do not serve it."""
    columns, width = weight.shape[-2:] if not is_transposed else weight.shape[:-3:-1]
    if weight.dtype != torch.bfloat16 or not weight.is_contiguous() or not serves_width(width):
        return None
    count = weight.shape[0] if weight.dim() == 3 else 1
    return Weights(weight.data_ptr(), TRANSPOSED if is_transposed else ROWS, columns, width, count)


def weights_of_bits(memory: torch.Tensor, packing: Packing, shape: tuple[int, ...]) -> Weights | None:
    """Weights of 8 and 4 bits; `memory` are the bytes of a parameter of `shape`. None where the kernels do not serve
    them."""
    return _weights_of_bits(memory.data_ptr(), packing, shape)


@lru_cache(maxsize=4096)  # those of all layers, wherever they come to lie
def _weights_of_bits(address: int, packing: Packing, shape: tuple[int, ...]) -> Weights | None:
    count, columns, width = packing.dimensions(shape)
    if packing.group % STEP or not serves_width(width):
        return None
    finish = FINISHES[packing.finish]
    if packing.order == "int8":
        if not simd.BYTES or not packing.rounds_rows:
            return None
        storage = BYTES4 if packing.bits == 4 else BYTES8
    else:
        if finish == 0 and packing.has_zeros and packing.scale_dtype == "float32":  # zero * scale is not exact then
            finish = SUBTRACTED
        if packing.zeros == "float32" and packing.scale_dtype == "float32":  # nor is value * scale
            assert finish == 0, "no format has offsets and another finish"
            finish = ADDED
        storage = INT4 if packing.bits == 4 else (E4M3 if packing.kind == "e4m3" else INT8)
    return Weights(
        address, storage, columns, width, count,
        scales=fields_of(packing, shape, address),
        table=table_address(packing.kind) if packing.kind in TABLES else 0, group=packing.group,
        finish=finish,
    )  # fmt: skip


def segments(rows: Iterable[tuple[int, int]], most_rows: int) -> npt.NDArray[Any]:
    """SEGMENTs of consecutive rows, as even as they can be, of pairs (weight, number of rows)."""
    found, first = [], 0
    for weight, count in rows:
        parts = -(-count // most_rows)
        for part in range(parts):
            begin, end = part * count // parts, (part + 1) * count // parts
            found.append((weight, first + begin, end - begin))
        first += count
    return np.array(found, dtype=SEGMENT)


@lru_cache(maxsize=64)
def _rows_in_order(count: int, most_rows: int) -> tuple[_Segments, npt.NDArray[Any]]:
    parts = segments([(0, count)], most_rows)
    return _Segments(parts.ctypes.data, len(parts), int(parts["rows"].max())), parts


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _weight_bytes(storage: int, columns: int, width: int) -> int:
    if storage in STEP_BYTES:
        return -(-columns // COLUMNS) * STEP_BYTES[storage] * width // 2
    return 2 * width * columns


@cache
def _address_of(function: Callable[[int], None]) -> ctypes.c_void_p:
    return ctypes.c_void_p(product_kernels.compiled(function).address)


def _chunk(steps: int, most: int) -> int:
    """Steps of a chunk: as even as they can be, in whole vectors."""
    return -(-steps // -(-steps // most) // LANES) * LANES


def fills_panels(columns: int) -> bool:
    """Whether a weight of so many columns takes no more room in panels."""
    return columns % COLUMNS == 0


def weight_of_onednn(address: int, num_bytes: int, shape: torch.Size) -> Weights | None:
    """`num_bytes` of a weight that oneDNN has packed; None where our kernel does not serve it."""
    columns, width = shape
    if num_bytes != _weight_bytes(PACKED, columns, width) or not serves_width(width) or not _is_order_of_onednn():
        return None
    return Weights(address, PACKED, columns, width)


def are_fastest() -> bool:
    """Whether the kernels are faster than oneDNN with any number of rows: oneDNN widens no weights."""
    return amx.allowed() or WIDENED


def serves_width(width: int) -> bool:
    """Whether this processor has the kernel, for weights of K = `width`."""
    return width % (2 * LANES) == 0 and simd.PAIRS and prefill_cpu.parallel() is not None


@cache
def _is_order_of_onednn() -> bool:
    """Whether oneDNN keeps weights in panels."""
    columns, width, ops = 200, 96, torch.ops.mkldnn
    weight_NK = torch.arange(128, 128 + columns * width, dtype=torch.int16).view(columns, width)
    packed: Any = ops._reorder_linear_weight(weight_NK.view(torch.bfloat16))
    blocks = torch.zeros(-(-columns // COLUMNS) * COLUMNS, width, dtype=torch.int16)
    blocks[:columns] = weight_NK
    expected = blocks.view(-1, COLUMNS, width // 2, 2).transpose(1, 2).contiguous().numpy().tobytes()
    if ops._nbytes(packed) != len(expected):
        return False
    return bool(ctypes.string_at(ops.data_ptr(packed), len(expected)) == expected)
