"""A micro-batch's region of the exchange arena, as tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flexgen_lite.memory.exchange import layout
from flexgen_lite.model.spec import AttentionSpec


@dataclass(frozen=True, slots=True)
class RegionViews:
    """T the region's rows, one per token; H, G, D, E as in attention_call.py."""

    query_THD: torch.Tensor
    key_TGD: torch.Tensor
    value_TGE: torch.Tensor
    out_THE: torch.Tensor
    sinks_H: torch.Tensor


class ExchangeRegion:
    """Views of `memory`, uint8 `[region_bytes]`, for each kind of attention layer."""

    def __init__(self, memory: torch.Tensor, max_tokens: int, dtype: torch.dtype) -> None:
        self._memory = memory
        self._max_tokens = max_tokens
        self._dtype = dtype
        self._views: dict[AttentionSpec, RegionViews] = {}

    def views(self, spec: AttentionSpec) -> RegionViews:
        if spec not in self._views:
            self._views[spec] = self._make_views(spec)
        return self._views[spec]

    def _make_views(self, spec: AttentionSpec) -> RegionViews:
        at = layout(spec, self._max_tokens, self._dtype.itemsize)
        rows, heads, groups = self._max_tokens, spec.num_heads, spec.num_kv_heads
        return RegionViews(
            query_THD=self._tensor(at.q, (rows, heads, spec.head_dim), self._dtype),
            key_TGD=self._tensor(at.k, (rows, groups, spec.head_dim), self._dtype),
            value_TGE=self._tensor(at.v, (rows, groups, spec.stored_value_dim), self._dtype),
            out_THE=self._tensor(at.out, (rows, heads, spec.value_dim), self._dtype),
            sinks_H=self._tensor(at.sinks, (heads,), torch.float32),
        )

    def _tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        num_bytes = dtype.itemsize
        for size in shape:
            num_bytes *= size
        return self._memory[offset : offset + num_bytes].view(dtype).view(shape)
