"""A worker's attention on random tensors, beside the same in float64 numpy.

Shapes: T tokens, R rows of a region, H query heads, G key/value heads, D head size of q and k, E head size
of v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from flexgen_lite.memory import exchange, kv_layout
from flexgen_lite.model.spec import ITEM_BYTES, AttentionSpec
from flexgen_lite.wire.arena_specs import ExchangeSpec, KvGroup, PageRun
from flexgen_lite.wire.worker_messages import AttachAttention, Attend, BeginAttention, KvBatch, KvSpan
from flexgen_lite.workers.attention.state import STORAGE, AttentionState
from flexgen_lite.workers.simd import BYTES, LANES

Floats = npt.NDArray[np.float64]
T = TypeVar("T", np.float32, np.float64)

# The relative step of each dtype: the output is rounded to it once, everything else is float32.
EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def decode(items: npt.NDArray[np.generic], dtype: str) -> Floats:
    if dtype == "bfloat16":
        return (items.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return items.view(np.float16 if dtype == "float16" else np.float32).astype(np.float64)


def encode(values: Floats, dtype: str) -> npt.NDArray[np.generic]:
    """Rounds to nearest, ties to even; values are finite."""
    if dtype != "bfloat16":
        return values.astype(np.float16 if dtype == "float16" else np.float32).view(STORAGE[dtype])
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def rounded(values: Floats, dtype: str, order: int) -> Floats:
    """Of the rows `[..., D]`, what a cache of `dtype` keeps; `order`: of the matrices, in int8."""
    if dtype != "int8":
        return decode(encode(values, dtype), dtype)
    return from_int8(*in_int8(values, order), order)


def in_int8(values: Floats, order: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Items `[..., D]` and scales `[...]` of rows of float32 or narrower numbers."""
    rows = hadamard(values.astype(np.float32), order)
    scales = np.abs(rows).max(axis=-1, initial=0) / np.float32(127)
    with np.errstate(invalid="ignore", divide="ignore"):
        items = np.nan_to_num(np.rint(rows / scales[..., None])).astype(np.int8)
    return items, scales / np.float32(order)


def from_int8(items: npt.NDArray[np.int8], scales: npt.NDArray[np.float32], order: int) -> Floats:
    return hadamard(items.astype(np.float64) * scales[..., None].astype(np.float64), order)


def hadamard(rows: npt.NDArray[T], order: int) -> npt.NDArray[T]:
    """Times the matrix of workers/hadamard.py, with sums in the order in which the kernels have them."""
    size = 1
    while 4 * size <= order:
        parts = rows.reshape(*rows.shape[:-1], -1, 4, size)
        a, b, c, d = (parts[..., i, :] for i in range(4))
        rows = (((a + b) + (c + d))[..., None, :] - 2 * parts).reshape(rows.shape)
        size *= 4
    if size < order:
        pairs = rows.reshape(*rows.shape[:-1], -1, 2, size)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        rows = np.stack((low + high, low - high), axis=-2).reshape(rows.shape)
    return rows


def split_query(rows: Floats, order: int) -> Floats:
    """What is left of queries of bfloat16 as two planes of bytes."""
    rows = hadamard(rows, order)
    top = np.abs(rows).max(axis=-1, keepdims=True) * (1 + 2.0**-7)
    step = 2.0 ** (np.floor(np.log2(np.maximum(top, 1e-30))) - 14)
    return hadamard(np.rint(rows / step) * step, order) / order


def reference(spec: AttentionSpec, q_HD: Floats, k_TGD: Floats, v_TGE: Floats, sinks_H: Floats) -> Floats:
    """The attention `[H, E]` of the last token of T."""
    begin = max(0, len(k_TGD) - spec.sliding_window) if spec.sliding_window else 0
    if spec.attention_chunk:
        begin = (len(k_TGD) - 1) // spec.attention_chunk * spec.attention_chunk
    k_TGD, v_TGE = k_TGD[begin:], v_TGE[begin:]
    group = spec.num_heads // spec.num_kv_heads
    scores_HT = np.einsum("hd,thd->ht", q_HD, np.repeat(k_TGD, group, axis=1)) * spec.scaling
    if spec.softcap:
        scores_HT = spec.softcap * np.tanh(scores_HT / spec.softcap)
    if spec.sinks:
        scores_HT = np.concatenate([scores_HT, sinks_H[:, None]], axis=1)
    weights_HT = np.exp(scores_HT - scores_HT.max(axis=1, keepdims=True))
    weights_HT /= weights_HT.sum(axis=1, keepdims=True)
    result: Floats = np.einsum("ht,the->he", weights_HT[:, : len(v_TGE)], np.repeat(v_TGE, group, axis=1))
    return result


@dataclass
class Sequence:
    """`past` tokens are in the cache when the pass begins, `rows` more come with it."""

    past: int
    rows: int
    attend: bool = True


class Case:
    """One layer's worker with a cache of random sequences, which have no page behind what their next tokens see."""

    def __init__(
        self,
        spec: AttentionSpec,
        sequences: list[Sequence],
        dtype: str,
        page_tokens: int,
        seed: int = 0,
        threads: int = 2,
        kv_dtype: str | None = None,
    ) -> None:
        self.spec, self.sequences, self.dtype, self.kv_dtype = spec, sequences, dtype, kv_dtype or dtype
        self.orders = dict(zip(("key", "value"), kv_layout.hadamard_orders(spec), strict=True))
        self.random = np.random.default_rng(seed)
        self.num_rows = sum(s.rows for s in sequences) + 2  # rows of nobody, before and behind
        itemsize = ITEM_BYTES[dtype]
        counts = [-(-(s.past + s.rows) // page_tokens) for s in sequences]
        num_pages = sum(counts) + 3
        order = self.random.permutation(num_pages)
        self.pages = [tuple(int(p) for p in part) for part in np.split(order, np.cumsum(counts))]
        self.group = KvGroup((0,), page_tokens, spec.sliding_window or 0, spec.attention_chunk or 0)
        self.kv_spec = kv_layout.kv_spec([spec], (0,), [self.group], num_pages, self.kv_dtype)
        region_bytes = exchange.region_bytes([spec], self.num_rows, itemsize)
        self.kv = bytearray(b"\xff" * self.kv_spec.arena_bytes)  # NaN in every dtype: unwritten tokens must not be read
        self.exchange = bytearray(b"\xff" * (2 * region_bytes))
        self.attach = AttachAttention(
            (spec,), (0,), ExchangeSpec(2, region_bytes, self.num_rows, dtype), self.kv_spec, threads, ()
        )
        self.state = AttentionState(self.attach, memoryview(self.kv), memoryview(self.exchange))
        self._region = np.frombuffer(self.exchange, np.uint8)[region_bytes:]
        self._fill()

    def _part(self, offset: int, *shape: int) -> npt.NDArray[np.generic]:
        size = int(np.prod(shape)) * ITEM_BYTES[self.dtype]
        return self._region[offset : offset + size].view(STORAGE[self.dtype]).reshape(shape)

    def _rounded(self, *shape: int) -> Floats:
        return decode(encode(self.random.standard_normal(shape), self.dtype), self.dtype)

    def _fill(self) -> None:
        spec, rows = self.spec, self.num_rows
        at = exchange.layout(spec, rows, ITEM_BYTES[self.dtype])
        self.q = self._part(at.q, rows, spec.num_heads, spec.head_dim)
        self.k = self._part(at.k, rows, spec.num_kv_heads, spec.head_dim)
        self.v = self._part(at.v, rows, spec.num_kv_heads, spec.stored_value_dim)
        self.out = self._part(at.out, rows, spec.num_heads, spec.value_dim)
        self.sinks_H = self.random.standard_normal(spec.num_heads).astype(np.float32)
        self._region[at.sinks : at.sinks + 4 * spec.num_heads].view(np.float32)[:] = self.sinks_H
        self.q_RHD = self._rounded(*self.q.shape)
        self.q[:] = encode(self.q_RHD, self.dtype)
        keys = [self._rounded(s.past + s.rows, *self.k.shape[1:]) for s in self.sequences]
        values = [self._rounded(s.past + s.rows, *self.v.shape[1:]) for s in self.sequences]
        self.keys = [rounded(rows_TGD, self.kv_dtype, self.orders["key"]) for rows_TGD in keys]
        self.values = [rounded(rows_TGE, self.kv_dtype, self.orders["value"]) for rows_TGE in values]
        if spec.values_in_keys:
            self.values = [keys_TGD[..., : spec.value_dim] for keys_TGD in self.keys]
        row, self.spans = 1, []
        for sequence, pages, k_TGD, v_TGE in zip(self.sequences, self.pages[:-1], keys, values, strict=True):
            first = self.group.first_seen(sequence.past) if sequence.attend else sequence.past
            first //= self.group.page_tokens
            for t in range(first * self.group.page_tokens, sequence.past):
                self.write("key", pages, t, k_TGD[t])
                if not spec.values_in_keys:
                    self.write("value", pages, t, v_TGE[t])
            self.k[row : row + sequence.rows] = encode(k_TGD[sequence.past :], self.dtype)
            if not spec.values_in_keys:
                self.v[row : row + sequence.rows] = encode(v_TGE[sequence.past :], self.dtype)
            run = PageRun(first, pages[first:])
            self.spans.append(KvSpan(row, sequence.rows, sequence.past, sequence.attend, (run,)))
            row += sequence.rows

    def _page_part(self, part: str, behind: bool, kind: npt.DTypeLike, *shape: int) -> npt.NDArray[np.generic]:
        """What lies in a group of LANES tokens: `[pages, G, groups, *shape]`; `behind`: the scales, behind the rows."""
        kv, heads, groups = self.kv_spec, self.spec.num_kv_heads, self.group.page_tokens // LANES
        words = -(-self._width(part) // self._per_word)
        group_bytes = (words + (self.kv_dtype == "int8")) * 4 * LANES
        offset = (kv.key_offsets if part == "key" else kv.value_offsets)[0] + (words * 4 * LANES if behind else 0)
        dtype = np.dtype(kind)
        strides = tuple(dtype.itemsize * int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
        strides = (kv.page_bytes, groups * group_bytes, group_bytes, *strides)
        return np.ndarray((kv.num_pages, heads, groups, *shape), dtype, self.kv, offset, strides)

    @property
    def _per_word(self) -> int:
        return 4 // kv_layout.KV_ITEM_BYTES[self.kv_dtype]

    def _width(self, part: str) -> int:
        return self.spec.head_dim if part == "key" else self.spec.value_dim

    def rows(self, part: str, pages: tuple[int, ...], token: int) -> npt.NDArray[np.generic]:
        """Where a token's keys or values lie: `[G, words, items of a word]` or `[G, items]`."""
        page, within = divmod(token, self.group.page_tokens)
        words, kind = (
            -(-self._width(part) // self._per_word),
            np.int8 if self.kv_dtype == "int8" else STORAGE[self.dtype],
        )
        if part == "key":
            whole = self._page_part(part, False, kind, words, LANES, self._per_word)
            return whole[pages[page], :, within // LANES, :, within % LANES]
        whole = self._page_part(part, False, kind, LANES, words * self._per_word)
        return whole[pages[page], :, within // LANES, within % LANES]

    def scales(self, part: str, pages: tuple[int, ...], token: int) -> npt.NDArray[np.generic]:
        """Where the scales `[G]` of a token's keys or values in int8 lie."""
        page, within = divmod(token, self.group.page_tokens)
        return self._page_part(part, True, np.float32, LANES)[pages[page], :, within // LANES, within % LANES]

    def read(self, part: str, pages: tuple[int, ...], token: int) -> Floats:
        """A token's keys `[G, D]` or values `[G, E]`, as they are kept."""
        rows = self.rows(part, pages, token).reshape(self.spec.num_kv_heads, -1)[:, : self._width(part)]
        if self.kv_dtype != "int8":
            return decode(rows, self.dtype)
        return from_int8(rows.view(np.int8), self.scales(part, pages, token).view(np.float32), self.orders[part])

    def write(self, part: str, pages: tuple[int, ...], token: int, rows: Floats) -> None:
        """Keeps a token's keys or values; what is behind the row in its last word is zero then."""
        if self.kv_dtype == "int8":
            items, self.scales(part, pages, token)[:] = in_int8(rows, self.orders[part])
        else:
            items = encode(rows, self.dtype)
        target = self.rows(part, pages, token)
        target[:] = np.pad(items, ((0, 0), (0, -rows.shape[1] % self._per_word))).reshape(target.shape)

    def begin(self, threads: int = 2) -> None:
        """Begins pass 1, in which the sequences are micro-batch 3."""
        self.state.begin(BeginAttention(1, threads, (KvBatch(3, 1, tuple(self.spans)),)))

    def run(self, threads: int = 2) -> npt.NDArray[np.uint8]:
        """A pass: returns a copy of the output's bytes."""
        self.begin(threads)
        self.state.attend(Attend(1, 0, 3))
        return self.out.view(np.uint8).copy()

    def check(self) -> None:
        """Asserts the output of every row that attends, and that K and V of every row are in their pages."""
        for sequence, span, pages, k_TGD, v_TGE in zip(
            self.sequences, self.spans, self.pages[:-1], self.keys, self.values, strict=True
        ):
            for i in range(sequence.rows):
                stop = sequence.past + i + 1
                assert (self.read("key", pages, stop - 1) == k_TGD[stop - 1]).all()
                if not self.spec.values_in_keys:
                    assert (self.read("value", pages, stop - 1) == v_TGE[stop - 1]).all()
                if not sequence.attend:
                    continue
                q_HD = self.q_RHD[span.row + i]
                if self.kv_dtype == "int8" and self.dtype == "bfloat16" and BYTES:
                    q_HD = split_query(q_HD, self.orders["key"])
                expected = reference(self.spec, q_HD, k_TGD[:stop], v_TGE[:stop], self.sinks_H.astype(np.float64))
                actual = decode(self.out[span.row + i], self.dtype)
                step = EPSILON[self.dtype] * np.abs(expected) + 2e-5 * (1 + np.abs(v_TGE[:stop]).max())
                np.testing.assert_array_less(np.abs(actual - expected), step, err_msg=f"{span} row {i}")
