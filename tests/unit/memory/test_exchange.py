import itertools

import pytest

from flexgen_lite.memory import exchange, kv_layout
from flexgen_lite.memory.exchange import layout, region_bytes
from flexgen_lite.model.spec import ITEM_BYTES, AttentionSpec

SPECS = [
    AttentionSpec(4, 2, 8, 8, 1.0, None, None, False),
    AttentionSpec(5, 1, 24, 40, 1.0, 16, None, True),
    AttentionSpec(128, 128, 192, 128, 1.0, None, None, False),
]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("max_tokens", [1, 7, 512])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_parts_are_aligned_and_do_not_overlap(spec: AttentionSpec, max_tokens: int, itemsize: int) -> None:
    at = layout(spec, max_tokens, itemsize)
    parts = [
        (at.q, max_tokens * spec.num_heads * spec.head_dim * itemsize),
        (at.k, max_tokens * spec.num_kv_heads * spec.head_dim * itemsize),
        (at.v, max_tokens * spec.num_kv_heads * spec.value_dim * itemsize),
        (at.out, max_tokens * spec.num_heads * spec.value_dim * itemsize),
        (at.sinks, 4 * spec.num_heads),
        (at.num_bytes, 0),
    ]
    assert all(offset % exchange.ALIGNMENT == 0 for offset, _ in parts)
    assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(parts))
    assert at.num_bytes >= max_tokens * spec.exchange_width * itemsize + 4 * spec.num_heads


def test_a_region_serves_the_largest_layer() -> None:
    size = region_bytes(SPECS, 33, 2)
    largest = max(layout(spec, 33, 2).num_bytes for spec in SPECS)
    assert size % 4096 == 0
    assert largest <= size < largest + 4096


def test_no_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 tokens"):
        layout(SPECS[0], 0, 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_kv_layers_are_aligned_and_do_not_overlap(dtype: str) -> None:
    kv = kv_layout.kv_spec(SPECS, range(len(SPECS)), 3, 5, dtype)
    end = 0
    for spec, keys, values in zip(SPECS, kv.key_offsets, kv.value_offsets, strict=True):
        slots = 3 * 5 * spec.num_kv_heads * ITEM_BYTES[dtype]
        assert keys % 4096 == values % 4096 == 0
        assert keys >= end
        assert values >= keys + slots * spec.head_dim
        end = values + slots * spec.value_dim
    assert kv.arena_bytes >= end
    exact = 3 * kv_layout.page_bytes(SPECS, 5, dtype)
    assert exact <= kv.arena_bytes <= exact + 2 * 4096 * len(SPECS)


def test_columns_that_read_anothers_keys_and_values_take_no_room() -> None:
    own = kv_layout.kv_spec(SPECS[:2], (0, 1), 3, 16, "float32")
    kv = kv_layout.kv_spec([*SPECS[:2], SPECS[1], SPECS[0], SPECS[1]], (0, 1, 1, 0, 1), 3, 16, "float32")
    assert kv.arena_bytes == own.arena_bytes
    for offsets, of_own in ((kv.key_offsets, own.key_offsets), (kv.value_offsets, own.value_offsets)):
        assert offsets == (*of_own, of_own[1], of_own[0], of_own[1])


def test_kv_of_an_unknown_dtype_is_an_error() -> None:
    with pytest.raises(ValueError, match="int8"):
        kv_layout.page_bytes(SPECS, 16, "int8")
