"""What the attention kernels work on: a layer's shape, units of queries, and a thread's scratch memory."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flexgen_lite.workers.attention.tiles import ROW
from flexgen_lite.workers.simd import LANES

BLOCK = 64  # tokens, a multiple of 4 LANES
GROUPS = BLOCK // LANES  # of a block
CHUNK = 512  # tokens, a multiple of BLOCK
QUERIES = 32  # at most, per unit
STORE_ROWS = 64  # at most, per piece of a store


class Shape(NamedTuple):
    """A layer's attention as the kernels need it. Offsets are in bytes: `keys` and `values` of the layer in a page, the
    rest in an exchange region."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    key_order: int  # of the matrices that keys and queries are multiplied by in int8, see hadamard.py
    value_order: int
    page_bytes: int
    page_shift: int  # log2 of the tokens of a page
    window: int  # tokens a query sees, itself included; 0: all
    attention_chunk: int  # tokens; a query sees those of its own chunk alone; 0: no chunks
    has_sinks: bool
    values_in_keys: bool  # a value is the beginning of its key
    scaling: np.float32
    softcap: np.float32  # 0: none
    keys: int
    values: int
    q: int
    k: int
    v: int
    out: int
    sinks: int


class Unit(NamedTuple):
    """The columns of `units`. Queries count row by row, in a row by head of the KV head's group."""

    row: int
    position: int  # of the row
    pages: int  # where the sequence's pages begin in `pages`
    first: int  # query
    last: int  # query, exclusive
    chunk: int
    chunk_stop: int
    partial: int  # -1: the whole of these queries; else where its result goes, in queries per key/value head
    stores: int  # 1: the row's K and V are to be stored first


class Places(NamedTuple):
    """Where things lie in a thread's scratch memory, and the strides of rows, in bytes."""

    query_stride: int
    score_stride: int
    sum_stride: int
    query: int
    where: int  # of the block's groups: keys, keys ahead, values, values ahead; int64 each
    score: int
    sums: int
    total: int
    m: int
    l: int  # noqa: E741  # a vector each, whose lanes are yet to be summed
    total_m: int
    total_l: int
    line: int
    values: int  # of a block, as rows of tokens, where they lie in the keys
    row: int  # float32, of a key, value or query
    end: int


def places(base: int, head_dim: int, value_dim: int, per_word: int, values_in_keys: bool) -> Places:
    """`base` is a multiple of 64; so is what the places take together, `end` - `base`. Queries are words or float32;
    as planes of bytes (byte_tiles.py) they take no more than that."""
    query_stride = ((head_dim + per_word - 1) // per_word * per_word * 4 + 63) // 64 * 64
    sum_stride = ((value_dim + per_word - 1) // per_word + LANES - 1) // LANES * per_word * ROW
    where = base + QUERIES * query_stride
    score = where + 4 * GROUPS * 8
    sums = score + QUERIES * BLOCK * 4
    total = sums + QUERIES * sum_stride
    m = total + QUERIES * sum_stride
    sum_of_weights = m + QUERIES * 4
    total_m = sum_of_weights + QUERIES * ROW
    total_l = total_m + QUERIES * 4
    line = total_l + QUERIES * 4
    values = line + ROW
    row = values + (BLOCK * ((value_dim + per_word - 1) // per_word) * 4 if values_in_keys else 0)
    end = row + (max(head_dim, value_dim) + LANES - 1) // LANES * ROW
    return Places(
        query_stride, BLOCK * 4, sum_stride, base, where, score, sums, total,
        m, sum_of_weights, total_m, total_l, line, values, row, end,
    )  # fmt: skip


def partial_bytes(value_dim: int, per_word: int) -> int:
    """Of one query of a partial unit and one KV head: its sums, m and l."""
    return places(0, 1, value_dim, per_word, False).sum_stride + 64
