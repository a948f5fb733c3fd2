"""What an attention worker knows: its arenas, and a pass's spans as index arrays."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flexgen_lite import exchange as exchange_layout
from flexgen_lite.messages import AttachAttention, Attend, BeginAttention, KvBatch, KvSpan
from flexgen_lite.model_spec import ITEM_BYTES
from flexgen_lite.workers import attention_kernels as kernels
from flexgen_lite.workers.team import Job, Team

Memory = memoryview | mmap.mmap
Ints = npt.NDArray[np.int64]

STORAGE: dict[str, npt.DTypeLike] = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.uint16}
UNITS_PER_THREAD = 8  # sequences longer than this share of a micro-batch are split into their chunks


@dataclass(slots=True)
class _Units:
    """`units` and `joins` as the kernel takes them, for layers with one group size and window."""

    units: Ints
    joins: Ints
    num_partials: int  # queries per key/value head in partial units


@dataclass(slots=True)
class _Batch:
    region: int  # where it begins in the exchange arena, in items
    pages: Ints
    pieces: Ints
    units: dict[tuple[int, int], _Units]  # by group size and window


class AttentionState:
    """Stores K and V and computes attention for the spans of one pass at a time.

    `kv` and `exchange` are the arenas. Process memory grows with the largest micro-batch seen, by a few per
    cent of the KV that it reads in one layer, and not after.
    """

    def __init__(self, attach: AttachAttention, kv: Memory, exchange: Memory) -> None:
        if attach.kv.dtype not in STORAGE or attach.exchange.dtype != attach.kv.dtype:
            raise ValueError(
                f"KV of {attach.kv.dtype} and an exchange of {attach.exchange.dtype}: "
                f"both must be the same one of {', '.join(STORAGE)}"
            )
        self._attach = attach
        self._kv = _items(kv, attach.kv.arena_bytes, "KV", attach.kv.dtype)
        self._exchange = _items(
            exchange,
            attach.exchange.num_regions * attach.exchange.region_bytes,
            "exchange",
            attach.exchange.dtype,
        )
        self._floats = self._exchange.view(np.float32)
        self._shapes = [self._shape(layer) for layer in range(len(attach.layers))]
        self._counter = np.zeros(1, np.int64)
        self._partials = np.zeros(0, np.float32)
        self._pass_id: int | None = None
        self._batches: dict[int, _Batch] = {}
        self._team = Team(0)
        self._set_threads(attach.threads)

    def begin(self, message: BeginAttention) -> None:
        """Forgets the last pass and prepares this one. ValueError for spans that do not fit the arenas."""
        self._pass_id, self._batches = None, {}
        self._set_threads(message.threads)
        self._batches = {batch.micro_batch: self._prepare(batch) for batch in message.batches}
        self._pass_id = message.pass_id

    def attend(self, message: Attend) -> None:
        """Stores a micro-batch's K and V in one layer, then writes the output of the rows that attend."""
        if message.pass_id != self._pass_id:
            raise ValueError(f"attend in pass {message.pass_id}, but the pass that began is {self._pass_id}")
        if message.micro_batch not in self._batches:
            raise ValueError(f"micro-batch {message.micro_batch} is not in pass {message.pass_id}")
        if not 0 <= message.layer < len(self._shapes):
            raise ValueError(f"layer {message.layer}: the model has {len(self._shapes)} layers")
        self._run(self._batches[message.micro_batch], self._shapes[message.layer])

    def warm_up(self) -> None:
        """Compiles the kernels, or loads them from the disk cache; touches neither arena."""
        layer = self._shapes[0]._replace(
            num_heads=1, num_kv_heads=1, head_dim=8, value_dim=8, page_tokens=8, window=0, has_sinks=True,
            keys=0, values=64, q=0, k=8, v=16, out=24, sinks=64,
        )  # fmt: skip
        region = np.zeros(256, self._exchange.dtype)
        pages = np.zeros(1, np.int64)
        pieces = np.array([[0, 1, 0, 0]], np.int64)
        units = np.array([[0, 0, 0, 0, 1, 0, 1, 0]], np.int64)
        joins = np.array([[0, 1]], np.int64)
        partials = np.zeros(kernels.places(8, 8).value_stride + 2, np.float32)
        kv = np.zeros(128, self._kv.dtype)
        work, counter = self._work[0], self._counter
        counter[0] = 0
        kernels.store(kv, region, 0, pages, pieces, layer, counter)
        counter[0] = 0
        kernels.attend(kv, region, region.view(np.float32), 0, pages, units, layer, work, partials, counter)
        counter[0] = 0
        kernels.join(region, region.view(np.float32), 0, units, joins, layer, work, partials, counter)

    def _run(self, batch: _Batch, shape: kernels.Shape) -> None:
        kv, exchange, floats, work = self._kv, self._exchange, self._floats, self._work
        region, pages, partials, counter = batch.region, batch.pages, self._partials, self._counter
        plan = batch.units[_unit_key(shape)]
        self._share(
            len(batch.pieces),
            lambda member: kernels.store(kv, exchange, region, pages, batch.pieces, shape, counter),
        )
        self._share(
            len(plan.units),
            lambda member: kernels.attend(
                kv, exchange, floats, region, pages, plan.units, shape, work[member], partials, counter
            ),
        )
        self._share(
            len(plan.joins),
            lambda member: kernels.join(
                exchange, floats, region, plan.units, plan.joins, shape, work[member], partials, counter
            ),
        )

    def _share(self, num_items: int, job: Job) -> None:
        if num_items:
            self._counter[0] = 0
            self._team.run(job)

    def _shape(self, layer: int) -> kernels.Shape:
        spec, kv = self._attach.layers[layer], self._attach.kv
        size = ITEM_BYTES[kv.dtype]
        at = exchange_layout.layout(spec, self._attach.exchange.max_tokens, size)
        if at.num_bytes > self._attach.exchange.region_bytes:
            raise ValueError(
                f"layer {layer} needs exchange regions of {at.num_bytes} bytes, "
                f"they have {self._attach.exchange.region_bytes}"
            )
        return kernels.Shape(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            value_dim=spec.value_dim,
            page_tokens=kv.page_tokens,
            window=spec.sliding_window or 0,
            half=kv.dtype == "float16",
            has_sinks=spec.sinks,
            scaling=np.float32(spec.scaling),
            softcap=np.float32(spec.softcap or 0.0),
            keys=kv.key_offsets[layer] // size,
            values=kv.value_offsets[layer] // size,
            q=at.q // size,
            k=at.k // size,
            v=at.v // size,
            out=at.out // size,
            sinks=at.sinks // exchange_layout.SINK_BYTES,
        )

    def _set_threads(self, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"{threads} attention threads: at least one")
        if threads != self._team.size:
            self._team.close()
            self._team = Team(threads)
            floats = max(kernels.places(s.head_dim, s.value_dim).num_floats for s in self._shapes)
            self._work = _aligned(threads, floats)

    def _prepare(self, batch: KvBatch) -> _Batch:
        exchange = self._attach.exchange
        if not 0 <= batch.region < exchange.num_regions:
            raise ValueError(
                f"micro-batch {batch.micro_batch} in region {batch.region} of {exchange.num_regions} regions"
            )
        starts = []
        num_pages = 0
        for span in batch.spans:
            self._check(batch.micro_batch, span)
            starts.append(num_pages)
            num_pages += len(span.pages)
        pages = np.fromiter((page for span in batch.spans for page in span.pages), np.int64, num_pages)
        spans = list(zip(batch.spans, starts, strict=True))
        result = _Batch(
            region=batch.region * exchange.region_bytes // self._exchange.itemsize,
            pages=pages,
            pieces=_pieces(spans),
            units={},
        )
        for shape in self._shapes:
            if _unit_key(shape) not in result.units:
                result.units[_unit_key(shape)] = _units(spans, *_unit_key(shape), len(self._work))
            self._reserve(result.units[_unit_key(shape)].num_partials, shape)
        return result

    def _check(self, micro_batch: int, span: KvSpan) -> None:
        kv, what = self._attach.kv, f"micro-batch {micro_batch}, span at row {span.row}"
        if span.row < 0 or span.num_rows < 1 or span.row + span.num_rows > self._attach.exchange.max_tokens:
            raise ValueError(f"{what}: {span.num_rows} rows, the regions have {self._attach.exchange.max_tokens}")
        held = len(span.pages) * kv.page_tokens
        if span.position < 0 or span.position + span.num_rows > held:
            raise ValueError(
                f"{what}: positions {span.position} .. {span.position + span.num_rows - 1}, "
                f"its {len(span.pages)} pages hold {held} tokens"
            )
        for page in span.pages:
            if not 0 <= page < kv.num_pages:
                raise ValueError(f"{what}: page {page}, the arena has {kv.num_pages} pages")

    def _reserve(self, num_partials: int, shape: kernels.Shape) -> None:
        stride = kernels.places(shape.head_dim, shape.value_dim).value_stride + 2
        floats = num_partials * shape.num_kv_heads * stride
        if floats > len(self._partials):
            self._partials = np.zeros(floats, np.float32)


def _unit_key(shape: kernels.Shape) -> tuple[int, int]:
    return shape.num_heads // shape.num_kv_heads, shape.window


def _pieces(spans: list[tuple[KvSpan, int]]) -> Ints:
    """Every span cut into runs of rows that one thread stores."""
    pieces = [
        (span.row + i, min(kernels.STORE_ROWS, span.num_rows - i), span.position + i, pages)
        for span, pages in spans
        for i in range(0, span.num_rows, kernels.STORE_ROWS)
    ]
    return np.array(pieces, np.int64).reshape(len(pieces), 4)


def _units(spans: list[tuple[KvSpan, int]], group: int, window: int, threads: int) -> _Units:
    """The spans that attend, cut into units; a long one with few queries into a unit per chunk."""
    attending = [(span, pages) for span, pages in spans if span.attend]
    tokens = [(span.num_rows * _visible(span, window), span, pages) for span, pages in attending]
    share = sum(count for count, _, _ in tokens) / (UNITS_PER_THREAD * threads)
    units: list[tuple[int, ...]] = []
    joins: list[tuple[int, int]] = []
    num_partials = 0
    for count, span, pages in tokens:
        queries = span.num_rows * group
        for first in range(0, queries, kernels.QUERIES):
            last = min(first + kernels.QUERIES, queries)
            begin, end = _token_range(span, first // group, (last - 1) // group, window)
            chunk, chunk_stop = begin // kernels.CHUNK, -(-end // kernels.CHUNK)
            where = (span.row, span.position, pages, first, last)
            if count <= share or queries > kernels.QUERIES or chunk_stop - chunk == 1:
                units.append((*where, chunk, chunk_stop, -1))
                continue
            joins.append((len(units), chunk_stop - chunk))
            for part in range(chunk, chunk_stop):
                units.append((*where, part, part + 1, num_partials))
                num_partials += last - first
    return _Units(
        np.array(units, np.int64).reshape(len(units), 8),
        np.array(joins, np.int64).reshape(len(joins), 2),
        num_partials,
    )


def _token_range(span: KvSpan, first_row: int, last_row: int, window: int) -> tuple[int, int]:
    """The tokens that any of these rows sees."""
    begin = max(0, span.position + first_row + 1 - window) if window else 0
    return begin, span.position + last_row + 1


def _visible(span: KvSpan, window: int) -> int:
    begin, end = _token_range(span, span.num_rows - 1, span.num_rows - 1, window)
    return end - begin


def _items(memory: Memory, num_bytes: int, name: str, dtype: str) -> npt.NDArray[Any]:
    if len(memory) < num_bytes:
        raise ValueError(f"the {name} arena has {len(memory)} bytes, {num_bytes} expected")
    return np.frombuffer(memory, np.uint8, num_bytes).view(STORAGE[dtype])


def _aligned(rows: int, columns: int) -> npt.NDArray[np.float32]:
    """Zeros `[rows, columns]`, each row on a cache line of its own."""
    columns = -(-columns // 16) * 16
    memory = np.zeros(rows * columns + 16, np.float32)
    start = -memory.ctypes.data % 64 // 4
    return memory[start : start + rows * columns].reshape(rows, columns)
