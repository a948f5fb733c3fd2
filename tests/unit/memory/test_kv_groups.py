"""Which columns share pages, where their keys and values lie in one, and how many pages a sequence takes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_lite.memory import kv_layout
from flexgen_lite.memory.kv_groups import block_tokens, kv_groups, pages_for
from flexgen_lite.model.spec import AttentionSpec
from flexgen_lite.wire.arena_specs import KvGroup

SPECS = [
    AttentionSpec(4, 2, 8, 8, 1.0, None, None, False),
    AttentionSpec(5, 1, 24, 40, 1.0, 16, None, True),
    AttentionSpec(128, 128, 192, 128, 1.0, None, None, False),
]


def column(kv_heads: int, dim: int, window: int | None = None, chunk: int | None = None) -> AttentionSpec:
    return AttentionSpec(32, kv_heads, dim, dim, 1.0, window, None, False, chunk)


def grouped(columns: Sequence[AttentionSpec], max_length: int = 1 << 18) -> tuple[tuple[KvGroup, ...], int]:
    """And bytes of a page, in bfloat16."""
    groups = kv_groups(columns, range(len(columns)), 16, "bfloat16", max_length)
    return groups, kv_layout.largest_page(columns, groups, "bfloat16")


def sequence_bytes(columns: Sequence[AttentionSpec], length: int) -> float:
    """Of a sequence, as a share of what it takes where nothing is free behind a window."""
    groups, page = grouped(columns)
    return pages_for(groups, length) * page / (length * kv_layout.page_bytes(columns, 1, "bfloat16"))


GEMMA4_26B = [column(8, 256, 1024)] * 25 + [column(2, 512)] * 5
GEMMA3_27B = [*([column(16, 128, 1024)] * 5 + [column(16, 128)]) * 10, *[column(16, 128, 1024)] * 2]
GPT_OSS_20B = [column(8, 64, 128), column(8, 64)] * 12


def test_a_model_whose_columns_see_alike_has_one_group() -> None:
    assert grouped([column(8, 128)] * 32)[0] == (KvGroup(tuple(range(32)), 16),)
    assert grouped([column(8, 128, 4096)] * 3)[0] == (KvGroup((0, 1, 2), 16, 4096),)
    assert grouped([column(8, 128, 512), column(8, 128)], max_length=512)[0] == (KvGroup((0, 1), 16),), "no window"


@pytest.mark.parametrize(
    ("columns", "shares"),
    [
        (GEMMA4_26B, {1024: 1.0, 8192: 0.21, 65536: 0.11}),
        (GEMMA3_27B, {1024: 1.05, 8192: 0.32, 65536: 0.22}),
        (GPT_OSS_20B, {1024: 0.57, 8192: 0.51, 65536: 0.51}),
        ([column(8, 128, None, 8192)] * 36 + [column(8, 128)] * 12, {8192: 1.0, 65536: 0.35}),
    ],
)
def test_what_sequences_take(columns: Sequence[AttentionSpec], shares: dict[int, float]) -> None:
    for length, share in shares.items():
        assert sequence_bytes(columns, length) <= share + 0.005


def test_columns_read_by_others_keep_what_the_others_see() -> None:
    columns = [column(1, 64, 100), column(1, 64), column(1, 64, 500), column(1, 64, 100)]
    own = kv_groups(columns[:2], (0, 1), 16, "float32", 10_000)
    assert [group.window for group in own] == [100, 0]
    assert [group.window for group in kv_groups(columns[:3], (0, 1, 0), 16, "float32", 10_000)] == [500, 0]
    assert {g.window for g in kv_groups([columns[0], columns[1]], (0, 0), 16, "float32", 10_000)} == {0}


@given(
    columns=st.lists(
        st.builds(column, st.integers(1, 8), st.integers(1, 64), st.sampled_from([None, 24, 64])), min_size=1
    ),
    page_tokens=st.sampled_from([16, 32]),
    dtype=st.sampled_from(["float32", "bfloat16", "int8"]),
)
def test_parts_of_a_page_do_not_overlap(columns: list[AttentionSpec], page_tokens: int, dtype: str) -> None:
    groups = kv_groups(columns, range(len(columns)), page_tokens, dtype, 2000)
    kv = kv_layout.kv_spec(columns, range(len(columns)), groups, 3, dtype)
    assert sorted(c for group in groups for c in group.columns) == list(range(len(columns)))
    assert kv.page_bytes % kv_layout.ALIGNMENT == 0
    for index, group in enumerate(groups):
        assert block_tokens(groups) % group.page_tokens == 0 and group.page_tokens % page_tokens == 0
        end = 0
        for c in group.columns:
            assert kv.group_of[c] == index
            rows = group.page_tokens * columns[c].num_kv_heads
            keys, values = (
                rows * kv_layout.row_bytes(dim, dtype) for dim in (columns[c].head_dim, columns[c].value_dim)
            )
            assert kv.key_offsets[c] >= end and kv.value_offsets[c] >= kv.key_offsets[c] + keys
            assert kv.key_offsets[c] % 64 == kv.value_offsets[c] % 64 == 0
            end = kv.value_offsets[c] + values
        assert end <= kv.page_bytes


@given(
    window=st.integers(1, 100),
    chunked=st.booleans(),
    page_tokens=st.sampled_from([16, 32]),
    begin=st.integers(0, 500),
    rows=st.integers(1, 100),
)
def test_no_sequence_has_more_pages_than_are_reckoned_with(
    window: int, chunked: bool, page_tokens: int, begin: int, rows: int
) -> None:
    limit = {"attention_chunk": window} if chunked else {"window": window}
    groups = (KvGroup((0,), 32), KvGroup((1,), page_tokens, **limit))
    first = groups[1].first_seen(begin) // 32 * 32
    end = -(-(begin + rows) // 32) * 32
    assert end // 32 + (end - first) // page_tokens <= pages_for(groups, begin + rows, rows)


def test_columns_that_read_anothers_keys_and_values_take_no_room() -> None:
    kv_columns, columns = (0, 1, 1, 0, 1), [*SPECS[:2], SPECS[1], SPECS[0], SPECS[1]]
    own_groups = kv_groups(SPECS[:2], (0, 1), 16, "float32", 100)
    own = kv_layout.kv_spec(SPECS[:2], (0, 1), own_groups, 3, "float32")
    groups = kv_groups(columns, kv_columns, 16, "float32", 100)
    kv = kv_layout.kv_spec(columns, kv_columns, groups, 3, "float32")
    assert groups == own_groups and kv.arena_bytes == own.arena_bytes
    for of_all, of_own in (
        (kv.key_offsets, own.key_offsets), (kv.value_offsets, own.value_offsets), (kv.group_of, own.group_of)
    ):  # fmt: skip
        assert of_all == (*of_own, of_own[1], of_own[0], of_own[1])


def test_kv_of_an_unknown_dtype_is_an_error() -> None:
    with pytest.raises(ValueError, match="int4"):
        kv_layout.page_bytes(SPECS, 16, "int4")


def test_rows_in_int8_are_multiplied_by_matrices_that_divide_them() -> None:
    for dims, orders in [((128, 128), (128, 128)), ((80, 96), (16, 32)), ((7, 12), (1, 4)), ((576, 512), (64, 512))]:
        spec = AttentionSpec(4, 1, *dims, 1.0, None, None, False)
        assert kv_layout.hadamard_orders(spec) == orders
    latents = AttentionSpec(4, 1, 576, 512, 1.0, None, None, False, values_in_keys=True)
    assert kv_layout.hadamard_orders(latents) == (64, 64), "a block does not reach beyond the values"


def test_rows_are_whole_words_and_those_of_int8_have_a_scale() -> None:
    assert [kv_layout.row_bytes(dim, "int8") for dim in (0, 1, 4, 5, 128)] == [0, 8, 8, 12, 132]
    assert [kv_layout.row_bytes(dim, "bfloat16") for dim in (0, 1, 4, 5, 128)] == [0, 4, 8, 12, 256]
    latents = AttentionSpec(128, 1, 576, 512, 0.1, None, None, False, values_in_keys=True)
    assert kv_layout.page_bytes([latents], 16, "int8") == 16 * (576 + 4)
