"""Where each column's keys and values lie in the KV arena: pure arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from flexgen_lite.model.spec import ITEM_BYTES, AttentionSpec
from flexgen_lite.wire.worker_messages import KvSpec

ALIGNMENT = 4096  # bytes


def kv_spec(
    columns: Sequence[AttentionSpec], kv_columns: Sequence[int], num_pages: int, page_tokens: int, dtype: str
) -> KvSpec:
    """The arena for `num_pages` pages of `page_tokens` tokens in every column; offsets 4096-aligned.

    Args:
        kv_columns: whose keys and values each column reads: its own, or those of one before it.
    """
    if num_pages < 1 or page_tokens < 1:
        raise ValueError(f"{num_pages} KV pages of {page_tokens} tokens: both must be positive")
    slots = num_pages * page_tokens
    key_offsets: list[int] = []
    value_offsets: list[int] = []
    end = 0
    for column, spec in enumerate(columns):
        if (source := kv_columns[column]) != column:
            key_offsets.append(key_offsets[source])
            value_offsets.append(value_offsets[source])
            continue
        key_offsets.append(end)
        end = _round_up(end + slots * spec.num_kv_heads * row_bytes(spec.head_dim, dtype))
        value_offsets.append(end)
        end = _round_up(end + slots * spec.num_kv_heads * row_bytes(spec.value_dim, dtype))
    return KvSpec(num_pages, page_tokens, dtype, tuple(key_offsets), tuple(value_offsets), end)


def page_bytes(columns: Sequence[AttentionSpec], page_tokens: int, dtype: str) -> int:
    """Bytes that one page takes in all these columns; the arena adds less than 8 KiB for each, for alignment."""
    token = sum(
        spec.num_kv_heads * (row_bytes(spec.head_dim, dtype) + row_bytes(spec.value_dim, dtype)) for spec in columns
    )
    return page_tokens * token


def token_bytes_by_window(columns: Sequence[AttentionSpec], dtype: str) -> dict[int, int]:
    """Bytes of a token's K and V in all columns that have the same window; 0: none."""
    found: Counter[int] = Counter()
    for spec in columns:
        found[spec.sliding_window or 0] += page_bytes([spec], 1, dtype)
    return dict(found)


def row_bytes(dim: int, dtype: str) -> int:
    """A row of `dim` items in whole words of 32 bits."""
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"KV cache of dtype {dtype!r}: float32, bfloat16 or float16 expected")
    return -(-dim * ITEM_BYTES[dtype] // 4) * 4


def _round_up(value: int) -> int:
    return -(-value // ALIGNMENT) * ALIGNMENT
