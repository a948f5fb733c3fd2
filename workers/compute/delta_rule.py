"""Stands in for the functions that Transformers' gated delta nets call by name for single tokens (qwen3_next, qwen3_5,
olmo_hybrid ...), where they give the same: our kernel reads and writes states in the arena, without copies.

Shapes: N sequences, H heads, K items of a key, V of a value.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from flexgen_lite.workers.compute import prefill_cpu
from flexgen_lite.workers.simd import LANES

NAMES = ("torch_recurrent_gated_delta_rule",)
_TOLERANCE = 1e-4
_EPS = 1e-6  # as the functions have it in their norm of queries and keys


class StateInPlace:
    """What a mixer is given instead of a copy of its states: where they are read and written.

    Attributes:
        sources, targets: addresses of float32 `[H, K, V]`, int64 `[N]`.
    """

    def __init__(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        self.sources, self.targets = sources, targets


def marked(shape: tuple[int, ...], places: StateInPlace) -> torch.Tensor:
    """A tensor of that shape without memory, that stands for the states."""
    marker = torch.zeros(()).expand(shape)
    marker.places = places  # type: ignore[attr-defined]
    return marker


def places_of(states: torch.Tensor | None) -> StateInPlace | None:
    return getattr(states, "places", None)


class DeltaRule:
    """In the place of one of the functions."""

    def __init__(self, unfused: Callable[..., Any]) -> None:
        self._unfused = unfused

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> Any:
        places = places_of(initial_state)
        if places is None:
            return self._unfused(
                query, key, value, g=g, beta=beta, initial_state=initial_state, output_final_state=output_final_state,
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, **kwargs,
            )  # fmt: skip
        output = _delta(query[:, 0], key[:, 0], value[:, 0], g[:, 0], beta[:, 0], places, use_qk_l2norm_in_kernel)
        return output[:, None].to(query.dtype), initial_state


def _delta(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    places: StateInPlace,
    is_normed: bool,
) -> torch.Tensor:
    """`[N, H, V]`, float32."""
    from flexgen_lite.workers.compute import delta_kernels

    count, heads, value_dim = value.shape
    key_dim = key.shape[-1]
    query, key = query.float(), key.float()
    if is_normed:
        query, key = (x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + _EPS) for x in (query, key))
    query = query * key_dim**-0.5
    if key.shape[1] != heads:
        query, key = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (query, key))
    query, key, value = query.contiguous(), key.contiguous(), value.float().contiguous()
    decay, beta = g.float().exp().contiguous(), beta.float().contiguous()
    output = torch.empty_like(value)
    delta_kernels.run(
        torch.get_num_threads(), places.sources.data_ptr(), places.targets.data_ptr(), query.data_ptr(), key.data_ptr(),
        value.data_ptr(), decay.data_ptr(), beta.data_ptr(), output.data_ptr(), count, heads, key_dim, value_dim,
        4 if decay.dim() == 3 else 0,
    )  # fmt: skip
    return output


def stand_in(module: nn.Module, value_dim: int) -> bool:
    """Whether a mixer's function for single tokens is ours now, in its class's code."""
    code = sys.modules[type(module).__module__]
    if prefill_cpu.parallel() is None or value_dim % LANES:
        return False
    return any(_replaced(code, name) for name in NAMES if hasattr(code, name))


def _replaced(code: ModuleType, name: str) -> bool:
    function = getattr(code, name)
    if isinstance(function, DeltaRule):
        return True
    ours = DeltaRule(function)
    if not _gives_the_same(function, ours):
        return False
    setattr(code, name, ours)
    return True


def _gives_the_same(function: Callable[..., Any], ours: DeltaRule) -> bool:
    draws = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draws)

    count, key_heads, heads, key_dim, value_dim = 3, 2, 4, 24, 5 * LANES
    state = drawn(count, heads, key_dim, value_dim)
    arguments = (
        drawn(count, 1, key_heads, key_dim),
        drawn(count, 1, key_heads, key_dim),
        drawn(count, 1, heads, value_dim),
    )
    options: dict[str, Any] = {
        "g": -drawn(count, 1, heads).abs(),
        "beta": drawn(count, 1, heads).sigmoid(),
        "output_final_state": True,
    }
    for is_normed in (True, False):
        try:
            expected, new = function(
                *arguments, initial_state=state.clone(), use_qk_l2norm_in_kernel=is_normed, **options
            )
        except Exception:  # it takes something else
            return False
        target = torch.empty_like(state)
        addresses = [torch.tensor([x.data_ptr() for x in states]) for states in (state, target)]
        marker = marked(tuple(state.shape), StateInPlace(*addresses))
        found, _ = ours(*arguments, initial_state=marker, use_qk_l2norm_in_kernel=is_normed, **options)
        for one, other in ((found, expected), (target, new)):
            if one.shape != other.shape or (one - other).abs().max() > _TOLERANCE * other.abs().max():
                return False
    return True
