"""Where q, k, v, the attention output and the sinks lie in one exchange region: pure arithmetic.

A region carries one micro-batch through one attention call at a time. Row r of every part is the micro-batch's token r,
so a micro-batch of T tokens uses the first T rows of each part and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from flexgen_lite.model.spec import AttentionSpec

ALIGNMENT = 64  # bytes: a cache line
REGION_ALIGNMENT = 4096  # bytes: a page of memory
SINK_BYTES = 4  # sinks are always float32


@dataclass(frozen=True, slots=True)
class ExchangeLayout:
    """Byte offsets from the start of a region, each a multiple of 64.

    q `[max_tokens, num_heads * head_dim]`, k `[max_tokens, num_kv_heads * head_dim]`,
    v `[max_tokens, num_kv_heads * stored_value_dim]`, out `[max_tokens, num_heads * value_dim]`, all of the
    exchange's dtype; sinks `[num_heads]`, float32.
    """

    q: int
    k: int
    v: int
    out: int
    sinks: int
    num_bytes: int


def layout(spec: AttentionSpec, max_tokens: int, itemsize: int) -> ExchangeLayout:
    """The parts of a region for a layer like `spec`; `itemsize` in bytes."""
    if max_tokens < 1 or itemsize < 1:
        raise ValueError(f"an exchange region of {max_tokens} tokens of {itemsize}-byte items: both must be positive")
    q = 0
    k = _round_up(q + max_tokens * spec.num_heads * spec.head_dim * itemsize, ALIGNMENT)
    v = _round_up(k + max_tokens * spec.num_kv_heads * spec.head_dim * itemsize, ALIGNMENT)
    out = _round_up(v + max_tokens * spec.num_kv_heads * spec.stored_value_dim * itemsize, ALIGNMENT)
    sinks = _round_up(out + max_tokens * spec.num_heads * spec.value_dim * itemsize, ALIGNMENT)
    num_bytes = _round_up(sinks + spec.num_heads * SINK_BYTES, ALIGNMENT)
    return ExchangeLayout(q, k, v, out, sinks, num_bytes)


def region_bytes(specs: Iterable[AttentionSpec], max_tokens: int, itemsize: int) -> int:
    """Bytes of a region that serves every one of the layers, a multiple of 4096."""
    return _round_up(max(layout(spec, max_tokens, itemsize).num_bytes for spec in specs), REGION_ALIGNMENT)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
