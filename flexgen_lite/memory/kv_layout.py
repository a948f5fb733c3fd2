"""Where each column's keys and values lie in the pages of the KV arena: pure arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from flexgen_lite.model.spec import AttentionSpec
from flexgen_lite.wire.arena_specs import KvGroup, KvSpec

KV_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
SCALE_BYTES = 4  # float32, of a token's key or value of one head in int8
BOUNCE_BYTES = 4 << 20  # of what goes to disk or comes from there, at a time
BLOCK_BYTES = 4096  # of a disk
ALIGNMENT = 64  # bytes, of a page; its parts have whole groups of tokens, and these have as many bytes


def kv_spec(
    columns: Sequence[AttentionSpec],
    kv_columns: Sequence[int],
    groups: Sequence[KvGroup],
    num_pages: int,
    dtype: str,
) -> KvSpec:
    """The arena with `num_pages` pages, as large as the largest group needs.

    Args:
        kv_columns: whose keys and values each column reads: its own, or those of one before it.
    """
    if num_pages < 1 or min(group.page_tokens for group in groups) < 1:
        raise ValueError(f"{num_pages} KV pages of {groups[0].page_tokens} tokens: both must be positive")
    group_of = {column: index for index, group in enumerate(groups) for column in group.columns}
    keys: dict[int, int] = {}
    values: dict[int, int] = {}
    for group in groups:
        end = 0
        for column in group.columns:
            spec = columns[column]
            keys[column] = end
            values[column] = end + group.page_tokens * spec.num_kv_heads * row_bytes(spec.head_dim, dtype)
            end = values[column] + group.page_tokens * spec.num_kv_heads * row_bytes(spec.stored_value_dim, dtype)
    return KvSpec(
        num_pages,
        largest_page(columns, groups, dtype),
        dtype,
        tuple(groups),
        tuple(group_of[source] for source in kv_columns),
        tuple(keys[source] for source in kv_columns),
        tuple(values[source] for source in kv_columns),
    )


def largest_page(columns: Sequence[AttentionSpec], groups: Sequence[KvGroup], dtype: str) -> int:
    """Bytes of a page that serves every group."""
    sizes = (page_bytes([columns[c] for c in group.columns], group.page_tokens, dtype) for group in groups)
    return -(-max(sizes) // ALIGNMENT) * ALIGNMENT


def disk_slot_bytes(page: int) -> int:
    """What a page of so many bytes takes on disk."""
    return max(1, -(-page // BLOCK_BYTES)) * BLOCK_BYTES


def page_bytes(columns: Sequence[AttentionSpec], page_tokens: int, dtype: str) -> int:
    """Bytes that so many tokens take in all these columns."""
    token = sum(
        spec.num_kv_heads * (row_bytes(spec.head_dim, dtype) + row_bytes(spec.stored_value_dim, dtype))
        for spec in columns
    )
    return page_tokens * token


def token_bytes_by_window(columns: Sequence[AttentionSpec], dtype: str) -> dict[int, int]:
    """Bytes of a token's K and V in all columns that have the same window; 0: none."""
    found: Counter[int] = Counter()
    for spec in columns:
        found[spec.sliding_window or spec.attention_chunk or 0] += page_bytes([spec], 1, dtype)
    return dict(found)


def hadamard_orders(spec: AttentionSpec) -> tuple[int, int]:
    """Of the matrices that keys and values are multiplied by before they are rounded to int8 (decision 033): the
    largest power of two that divides the items of a row. Keys that values lie in are divided where these end."""
    if spec.values_in_keys:
        both = spec.head_dim | spec.value_dim
        return both & -both, both & -both
    return spec.head_dim & -spec.head_dim, spec.value_dim & -spec.value_dim


def row_bytes(dim: int, dtype: str) -> int:
    """A row of `dim` items in whole words of 32 bits, with its scale where it has one."""
    if dtype not in KV_ITEM_BYTES:
        raise ValueError(f"KV cache of dtype {dtype!r}: one of {', '.join(KV_ITEM_BYTES)} expected")
    return -(-dim * KV_ITEM_BYTES[dtype] // 4) * 4 + (SCALE_BYTES if dtype == "int8" and dim else 0)
