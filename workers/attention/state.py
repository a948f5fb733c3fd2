"""What an attention worker knows: its arenas, and a pass's spans as index arrays."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from flexgen_lite.memory import exchange as exchange_layout
from flexgen_lite.memory.arena import Memory, take_pages
from flexgen_lite.memory.kv_layout import KV_ITEM_BYTES, hadamard_orders
from flexgen_lite.model.spec import ITEM_BYTES, first_seen
from flexgen_lite.wire.arena_specs import PageRun
from flexgen_lite.wire.worker_messages import AttachAttention, Attend, BeginAttention, KvBatch, KvSpan
from flexgen_lite.workers.attention import kernels, layout
from flexgen_lite.workers.simd import LANES
from flexgen_lite.workers.team import Job, Team

Ints = npt.NDArray[np.int64]

STORAGE: dict[str, npt.DTypeLike] = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.uint16}
KINDS = {"float32": np.float32(0), "bfloat16": np.uint16(0), "float16": np.int16(0), "int8": np.int8(0)}  # see simd.py
PREFAULT_BYTES, PREFAULT_SHARE = 2 << 30, 0.125
PREFAULT_STEP = 32 << 20  # at a time
UNITS_PER_THREAD = 8  # sequences longer than this share of a micro-batch are split into their chunks


class _Key(NamedTuple):
    """What the units of a column depend on: query heads of a key/value head, what they see, whether it stores K and V,
    and whose pages."""

    heads: int
    window: int
    attention_chunk: int
    stores: bool
    group: int


@dataclass(slots=True)
class _Units:
    """`units` and `joins` as the kernel takes them, for columns with the same _Key."""

    units: Ints
    joins: Ints
    num_partials: int  # queries per key/value head in partial units


@dataclass(slots=True)
class _Batch:
    region: int  # its address
    pages: list[Ints]  # by group, of all sequences
    pieces: list[Ints]  # by group
    units: dict[_Key, _Units]


class AttentionState:
    """Stores K and V and computes attention for the spans of one pass at a time.

    `kv` and `exchange` are the arenas. Process memory grows with the largest micro-batch seen, by a few per
    cent of the KV that it reads in one layer, and not after.
    """

    def __init__(self, attach: AttachAttention, kv: Memory, exchange: Memory) -> None:
        check_dtypes(attach.exchange.dtype, attach.kv.dtype)
        self._attach = attach
        for page_tokens in (group.page_tokens for group in attach.kv.groups):
            if page_tokens % LANES or page_tokens & (page_tokens - 1):
                raise ValueError(f"KV pages of {page_tokens} tokens: a power of two from {LANES} on expected")
        self._memory_of_kv = kv
        self._kv = _bytes(kv, attach.kv.arena_bytes, "KV")
        self._exchange = _bytes(exchange, attach.exchange.num_regions * attach.exchange.region_bytes, "exchange")
        self._kinds = KINDS[attach.exchange.dtype], KINDS[attach.kv.dtype]
        self._per_word = 4 // KV_ITEM_BYTES[attach.kv.dtype]
        self._shapes = [self._shape(column) for column in range(len(attach.columns))]
        self._keys = [
            _Key(
                shape.num_heads // shape.num_kv_heads,
                shape.window,
                shape.attention_chunk,
                attach.kv_columns[column] == column,
                attach.kv.group_of[column],
            )
            for column, shape in enumerate(self._shapes)
        ]
        self._counter = np.zeros(1, np.int64)
        self._partials = np.zeros(0, np.uint8)
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
        """Stores a micro-batch's K and V in one column, then writes the output of the rows that attend."""
        if message.pass_id != self._pass_id:
            raise ValueError(f"attend in pass {message.pass_id}, but the pass that began is {self._pass_id}")
        if message.micro_batch not in self._batches:
            raise ValueError(f"micro-batch {message.micro_batch} is not in pass {message.pass_id}")
        if not 0 <= message.column < len(self._shapes):
            raise ValueError(f"column {message.column}: the model has {len(self._shapes)}")
        self._run(self._batches[message.micro_batch], self._shapes[message.column], self._keys[message.column])

    def prefault(self, stop: threading.Event) -> None:
        """Takes memory for the pages that are used first, until `stop`; at most PREFAULT_BYTES, and PREFAULT_SHARE of
        the arena."""
        size, begin = self._attach.kv.arena_bytes, self._attach.first_page * self._attach.kv.page_bytes
        for start in range(begin, begin + min(PREFAULT_BYTES, int(size * PREFAULT_SHARE)), PREFAULT_STEP):
            if stop.is_set() or start >= size:
                return
            take_pages(self._memory_of_kv, start, min(PREFAULT_STEP, size - start))

    def _run(self, batch: _Batch, shape: layout.Shape, key: _Key) -> None:
        kv, region, scratch = self._kv.ctypes.data, batch.region, self._scratch
        pages, pieces = batch.pages[key.group], batch.pieces[key.group]
        partials, counter, kinds = self._partials.ctypes.data, self._counter.ctypes.data, self._kinds
        plan = batch.units[key]
        self._share(
            len(pieces) if key.stores else 0,
            lambda member: kernels.store(kv, region, pages, pieces, shape, scratch[member], counter, *kinds),
        )
        self._share(
            len(plan.units),
            lambda member: kernels.attend(
                kv, region, pages, plan.units, shape, scratch[member], partials, counter, *kinds
            ),
        )
        self._share(
            len(plan.joins),
            lambda member: kernels.join(
                region, plan.units, plan.joins, shape, scratch[member], partials, counter, *kinds
            ),
        )

    def _share(self, num_items: int, job: Job) -> None:
        if num_items:
            self._counter[0] = 0
            self._team.run(job)

    def _shape(self, column: int) -> layout.Shape:
        spec, kv = self._attach.columns[column], self._attach.kv
        size = ITEM_BYTES[self._attach.exchange.dtype]
        at = exchange_layout.layout(spec, self._attach.exchange.max_tokens, size)
        if at.num_bytes > self._attach.exchange.region_bytes:
            raise ValueError(
                f"column {column} needs exchange regions of {at.num_bytes} bytes, "
                f"they have {self._attach.exchange.region_bytes}"
            )
        key_order, value_order = hadamard_orders(spec)
        return layout.Shape(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            value_dim=spec.value_dim,
            key_order=key_order,
            value_order=value_order,
            page_bytes=kv.page_bytes,
            page_shift=kv.groups[kv.group_of[column]].page_tokens.bit_length() - 1,
            window=spec.sliding_window or 0,
            attention_chunk=spec.attention_chunk or 0,
            has_sinks=spec.sinks,
            values_in_keys=spec.values_in_keys,
            scaling=np.float32(spec.scaling),
            softcap=np.float32(spec.softcap or 0.0),
            keys=kv.key_offsets[column],
            values=kv.value_offsets[column],
            q=at.q,
            k=at.k,
            v=at.v,
            out=at.out,
            sinks=at.sinks,
        )

    def _set_threads(self, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"{threads} attention threads: at least one")
        if threads != self._team.size:
            self._team.close()
            self._team = Team(threads)
            size = max(
                layout.places(0, s.head_dim, s.value_dim, self._per_word, s.values_in_keys).end for s in self._shapes
            )
            self._memory = np.zeros(threads * size + 64, np.uint8)
            start = -(-self._memory.ctypes.data // 64) * 64
            self._scratch = [start + i * size for i in range(threads)]

    def _prepare(self, batch: KvBatch) -> _Batch:
        exchange = self._attach.exchange
        if not 0 <= batch.region < exchange.num_regions:
            raise ValueError(
                f"micro-batch {batch.micro_batch} in region {batch.region} of {exchange.num_regions} regions"
            )
        for span in batch.spans:
            self._check(batch.micro_batch, span)
        result = _Batch(self._exchange.ctypes.data + batch.region * exchange.region_bytes, [], [], {})
        starts: list[Ints] = []
        pieces = _pieces(batch.spans)
        for group in range(len(self._attach.kv.groups)):
            pages, starts_of_group = _flat_pages([span.pages[group] for span in batch.spans])
            starts.append(starts_of_group)
            result.pages.append(pages)
            result.pieces.append(_with_pages(pieces, 3, starts_of_group))
        made: dict[_Key, _Units] = {}  # what groups have in common
        for shape, key in zip(self._shapes, self._keys, strict=True):
            if key not in result.units:
                common = key._replace(group=0)
                if common not in made:
                    made[common] = _units(batch.spans, key, len(self._scratch))
                units = _with_pages(made[common].units, 2, starts[key.group])
                result.units[key] = dataclasses.replace(made[common], units=units)
            self._reserve(result.units[key].num_partials, shape)
        return result

    def _check(self, micro_batch: int, span: KvSpan) -> None:
        kv, what = self._attach.kv, f"micro-batch {micro_batch}, span at row {span.row}"
        if span.row < 0 or span.num_rows < 1 or span.row + span.num_rows > self._attach.exchange.max_tokens:
            raise ValueError(f"{what}: {span.num_rows} rows, the regions have {self._attach.exchange.max_tokens}")
        if len(span.pages) != len(kv.groups):
            raise ValueError(f"{what}: pages of {len(span.pages)} groups, the arena has {len(kv.groups)}")
        for group, run in zip(kv.groups, span.pages, strict=True):
            begin, end = run.first * group.page_tokens, (run.first + len(run.pages)) * group.page_tokens
            needed = group.first_seen(span.position) if span.attend else span.position
            if not 0 <= begin <= needed or span.position + span.num_rows > end:
                raise ValueError(
                    f"{what}: positions {span.position} .. {span.position + span.num_rows - 1}, "
                    f"its {len(run.pages)} pages hold tokens {begin} .. {end - 1}"
                )
            for page in (min(run.pages), max(run.pages)):
                if not 0 <= page < kv.num_pages:
                    raise ValueError(f"{what}: page {page}, the arena has {kv.num_pages} pages")

    def _reserve(self, num_partials: int, shape: layout.Shape) -> None:
        size = num_partials * shape.num_kv_heads * layout.partial_bytes(shape.value_dim, self._per_word)
        if size > len(self._partials):
            self._partials = np.zeros(size, np.uint8)


def check_dtypes(dtype: str, kv_dtype: str) -> None:
    """ValueError where there are no kernels for an exchange of `dtype` and KV of `kv_dtype`."""
    if dtype not in STORAGE or kv_dtype not in (dtype, "int8"):
        raise ValueError(
            f"an exchange of {dtype} and KV of {kv_dtype}: one of {', '.join(STORAGE)}, and the same or int8, expected"
        )


def _flat_pages(runs: list[PageRun]) -> tuple[Ints, Ints]:
    """All pages one after another, and where each sequence's would begin if it had all of them from its first token on:
    before those of the first sequences there is room for what they have no more."""
    starts: list[int] = []
    flat: list[int] = [0] * max((run.first for run in runs), default=0)
    for run in runs:
        starts.append(len(flat) - run.first)
        flat += run.pages
    return np.array(flat, np.int64), np.array(starts, np.int64)


def _with_pages(rows: Ints, column: int, starts: Ints) -> Ints:
    """Pieces or units with the place of their sequence's pages instead of the number of its span."""
    rows = rows.copy()
    rows[:, column] = starts[rows[:, column]]
    return rows


def _pieces(spans: Sequence[KvSpan]) -> Ints:
    """Spans cut into runs of rows that one thread stores; a single row that attends is stored by its unit."""
    pieces = [
        (span.row + i, min(layout.STORE_ROWS, span.num_rows - i), span.position + i, number)
        for number, span in enumerate(spans)
        if not _is_stored_by_unit(span)
        for i in range(0, span.num_rows, layout.STORE_ROWS)
    ]
    return np.array(pieces, np.int64).reshape(len(pieces), 4)


def _is_stored_by_unit(span: KvSpan) -> bool:
    return span.attend and span.num_rows == 1


def _units(spans: Sequence[KvSpan], key: _Key, threads: int) -> _Units:
    """The spans that attend, cut into units; a long one with few queries into a unit per chunk."""
    attending = [(span, number) for number, span in enumerate(spans) if span.attend]
    tokens = [(span.num_rows * _visible(span, key), span, number) for span, number in attending]
    share = sum(count for count, _, _ in tokens) / (UNITS_PER_THREAD * threads)
    units: list[tuple[int, ...]] = []
    joins: list[tuple[int, int]] = []
    num_partials = 0
    for count, span, number in tokens:
        queries = span.num_rows * key.heads
        for first in range(0, queries, layout.QUERIES):
            last = min(first + layout.QUERIES, queries)
            begin, end = _token_range(span, first // key.heads, (last - 1) // key.heads, key)
            chunk, chunk_stop = begin // layout.CHUNK, -(-end // layout.CHUNK)
            where = (span.row, span.position, number, first, last)
            stores = key.stores and _is_stored_by_unit(span)
            if count <= share or queries > layout.QUERIES or chunk_stop - chunk == 1:
                units.append((*where, chunk, chunk_stop, -1, stores))
                continue
            joins.append((len(units), chunk_stop - chunk))
            for part in range(chunk, chunk_stop):
                units.append((*where, part, part + 1, num_partials, stores and part == chunk_stop - 1))
                num_partials += last - first
    return _Units(
        np.array(units, np.int64).reshape(len(units), 9),
        np.array(joins, np.int64).reshape(len(joins), 2),
        num_partials,
    )


def _token_range(span: KvSpan, first_row: int, last_row: int, key: _Key) -> tuple[int, int]:
    """The tokens that any of these rows sees."""
    begin = first_seen(span.position + first_row, key.window, key.attention_chunk)
    return begin, span.position + last_row + 1


def _visible(span: KvSpan, key: _Key) -> int:
    begin, end = _token_range(span, span.num_rows - 1, span.num_rows - 1, key)
    return end - begin


def _bytes(memory: Memory, num_bytes: int, name: str) -> npt.NDArray[np.uint8]:
    if len(memory) < num_bytes:
        raise ValueError(f"the {name} arena has {len(memory)} bytes, {num_bytes} expected")
    return np.frombuffer(memory, np.uint8, num_bytes)
