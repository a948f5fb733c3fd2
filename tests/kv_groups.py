"""KV pages of models whose columns all see alike."""

from __future__ import annotations

from flexgen_lite.wire.arena_specs import KvGroup


def one_group(page_tokens: int, window: int = 0, attention_chunk: int = 0) -> tuple[KvGroup, ...]:
    return (KvGroup((0,), page_tokens, window, attention_chunk),)
