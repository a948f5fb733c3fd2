import itertools

import pytest

from flexgen_lite.memory import exchange
from flexgen_lite.memory.exchange import layout, region_bytes
from flexgen_lite.model.spec import AttentionSpec

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
