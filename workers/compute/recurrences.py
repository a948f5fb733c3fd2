"""Stands in for the functions that Transformers' mixers call by name for their recurrences, where ours give the same:
those of gated delta nets (Qwen3-Next, Qwen3.5, OLMo-Hybrid), of KDA (Kimi-Linear, Bailing-Hybrid) and of Mamba 2
(Nemotron-H, Granite, Bamba, Falcon-H1, Zamba2).

For single tokens states are read and written where they lie in the arena, without copies.

Shapes: B sequences, T tokens, H heads; K items of a key, V of a value; P items of a head, N of its state, G groups.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from flexgen_lite.workers.compute import prefill_cpu
from flexgen_lite.workers.simd import LANES

_TOLERANCE = 1e-4
_EPS = 1e-6  # as the functions have it in their norm of queries and keys


class StateInPlace:
    """What a mixer is given instead of a copy of its states: where they are read and written.

    Attributes:
        sources, targets: addresses of float32 matrices for each head, int64 `[B]`.
    """

    def __init__(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        self.sources, self.targets = sources, targets

    @classmethod
    def of(cls, states: torch.Tensor) -> StateInPlace:
        """States that become what they are after the last token."""
        step = 4 * states.stride(0)
        places = torch.arange(len(states)) * step + states.data_ptr()
        return cls(places, places)

    def copied(self, shape: tuple[int, ...]) -> torch.Tensor:
        """The states before the tokens."""
        states = torch.empty(shape)
        for state, source in zip(states, self.sources.tolist(), strict=True):
            ctypes.memmove(state.data_ptr(), source, 4 * state.numel())
        return states

    def put(self, states: torch.Tensor) -> None:
        """What they are after them."""
        for state, target in zip(states.contiguous(), self.targets.tolist(), strict=True):
            ctypes.memmove(target, state.data_ptr(), 4 * state.numel())


def marked(shape: tuple[int, ...], places: StateInPlace) -> torch.Tensor:
    """A tensor of that shape without memory, that stands for the states."""
    marker = torch.zeros(()).expand(shape)
    marker.places = places  # type: ignore[attr-defined]
    return marker


def places_of(states: torch.Tensor | None) -> StateInPlace | None:
    return getattr(states, "places", None)


def _serves(states: tuple[int, ...], *tensors: torch.Tensor) -> bool:
    return states[-1] % LANES == 0 and all(x.device.type == "cpu" and x.is_floating_point() for x in tensors)


def _begin(states: torch.Tensor | None, shape: tuple[int, ...]) -> tuple[torch.Tensor, StateInPlace]:
    """The states that a call gives back, and where they are."""
    if states is not None and (places := places_of(states)) is not None:
        return states, places
    new = torch.zeros(shape) if states is None else states.float().clone(memory_format=torch.contiguous_format)
    return new, StateInPlace.of(new)


class Recurrence:
    """In the place of a function.

    Args:
        unfused: the function.
    """

    def __init__(self, unfused: Callable[..., Any]) -> None:
        self.unfused = unfused

    def try_out(self) -> bool:
        """Whether it gives what the function gives."""
        raise NotImplementedError


class DeltaRule(Recurrence):
    by_key_item = False  # whether there is a decay for each item of a key

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
        batch, _, heads, columns = value.shape
        shape = (batch, heads, key.shape[-1], columns)
        if not _serves(shape, query, key, value):
            return self.unfused(
                query, key, value, g=g, beta=beta, initial_state=initial_state, output_final_state=output_final_state,
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, **kwargs,
            )  # fmt: skip
        states, places = _begin(initial_state, shape)
        output = _delta(query, key, value, g, beta, places, use_qk_l2norm_in_kernel).to(query.dtype)
        return output, states if output_final_state else None

    def try_out(self) -> bool:
        draws = _Draws()
        batch, heads, rows, columns = 3, 4, 24, 5 * LANES
        key_heads = heads if self.by_key_item else 2
        for tokens in (1, 70):
            sizes = (batch, tokens)
            arguments = [draws(*sizes, n, size) for n, size in ((key_heads, rows), (key_heads, rows), (heads, columns))]
            decays = (*sizes, heads, rows) if self.by_key_item else (*sizes, heads)
            options: dict[str, Any] = {"g": -0.1 * draws(*decays).abs(), "beta": draws(*sizes, heads).sigmoid()}
            for is_normed in (True, False):
                scale = 1.0 if is_normed else 0.1  # of keys that are not: states would grow
                given = [arguments[0], arguments[1] * scale, arguments[2]]
                options |= {"use_qk_l2norm_in_kernel": is_normed, "output_final_state": True}
                for state in (draws(batch, heads, rows, columns), None):
                    options["initial_state"] = None if state is None else state.clone()
                    expected = self.unfused(*given, **options)
                    if not _alike(self(*given, **options), expected):  # type: ignore[arg-type]
                        return False
        return True


def _delta(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    places: StateInPlace,
    is_normed: bool,
) -> torch.Tensor:
    """`[B, T, H, V]`, float32."""
    from flexgen_lite.workers.compute import recurrence_kernels as kernels

    batch, tokens, heads, columns = value.shape
    rows = key.shape[-1]
    query, key = query.float(), key.float()
    if is_normed:
        query, key = (x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + _EPS) for x in (query, key))
    query = query * rows**-0.5
    if key.shape[2] != heads:
        query, key = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (query, key))
    query, key, value = query.contiguous(), key.contiguous(), value.float().contiguous()
    decay, beta = g.float().exp().contiguous(), beta.float().contiguous()
    output = torch.empty_like(value)
    kernels.run(
        kernels.delta, torch.get_num_threads(), places.sources.data_ptr(), places.targets.data_ptr(), query.data_ptr(),
        key.data_ptr(), value.data_ptr(), decay.data_ptr(), beta.data_ptr(), output.data_ptr(), batch, tokens, heads,
        rows, columns, 4 if decay.dim() == 4 else 0,
    )  # fmt: skip
    return output


class KimiDeltaRule(DeltaRule):
    by_key_item = True


class MambaScan(Recurrence):
    """Of several tokens."""

    def __call__(
        self,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        chunk_size: int,
        D: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        initial_states: torch.Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **kwargs: Any,
    ) -> Any:
        batch, _, heads, rows = hidden_states.shape
        shape = (batch, heads, rows, B.shape[-1])
        if not _serves(shape, hidden_states, B, C) or kwargs.get("z") is not None:
            return self.unfused(
                hidden_states, dt, A, B, C, chunk_size, D=D, dt_bias=dt_bias, initial_states=initial_states,
                dt_softplus=dt_softplus, dt_limit=dt_limit, return_final_states=return_final_states, **kwargs,
            )  # fmt: skip
        states, places = _begin(initial_states, shape)
        steps_BTH = _steps(dt, dt_bias, dt_softplus).clamp(*dt_limit).float()
        output = _mamba(hidden_states, steps_BTH, A, B, C, D, places).to(hidden_states.dtype)
        return (output, states) if return_final_states else output

    def try_out(self) -> bool:
        draws = _Draws()
        batch, tokens, heads, groups, rows, columns = 2, 70, 4, 2, 5, 3 * LANES
        arguments = (
            draws(batch, tokens, heads, rows), draws(batch, tokens, heads), -draws(heads).abs(),
            draws(batch, tokens, groups, columns), draws(batch, tokens, groups, columns), 16,
        )  # fmt: skip
        options: dict[str, Any] = {
            "D": draws(heads), "dt_bias": draws(heads), "dt_softplus": True, "dt_limit": (0.01, 1.5), "z": None,
            "return_final_states": True,
        }  # fmt: skip
        for state in (None, draws(batch, heads, rows, columns)):
            expected = self.unfused(*arguments, initial_states=state, **options)
            if not _alike(self(*arguments, initial_states=state, **options), expected):
                return False
        return True


class MambaStep(Recurrence):
    """Of one token of each sequence; the states are changed in place."""

    def __call__(
        self,
        state: torch.Tensor,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        dt_softplus: bool = False,
        z: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        is_for_heads = all(x is None or 0 in (x.stride(-1), x.shape[-1] - 1) for x in (dt, A, D, dt_bias))
        is_for_heads = is_for_heads and 0 in (A.stride(1), A.shape[1] - 1)
        places = places_of(state)
        is_whole = state.dtype == torch.float32 and (places is not None or state.is_contiguous())
        if not (_serves(tuple(state.shape), hidden_states, B, C) and is_for_heads and is_whole):
            own = state if places is None else places.copied(tuple(state.shape))
            output = self.unfused(
                own, hidden_states, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=dt_softplus, z=z, **kwargs
            )
            if places is not None:
                places.put(own)
            return output
        places = places or StateInPlace.of(state)
        bias_H = None if dt_bias is None else dt_bias[:, 0]
        steps_B1H = _steps(dt[..., 0], bias_H, dt_softplus)[:, None].float()
        skip_H = None if D is None else D[:, 0]
        output = _mamba(hidden_states[:, None], steps_B1H, A[:, 0, 0], B[:, None], C[:, None], skip_H, places)[:, 0]
        return (output if z is None else output * functional.silu(z)).to(hidden_states.dtype)

    def try_out(self) -> bool:
        draws = _Draws()
        batch, heads, groups, rows, columns = 3, 4, 2, 5, 3 * LANES
        state = draws(batch, heads, rows, columns)
        of_heads = [draws(batch, heads)[..., None].expand(-1, -1, rows)]
        of_heads += [(-draws(heads).abs())[:, None, None].expand(-1, rows, columns)]
        skip, bias = (draws(heads)[:, None].expand(-1, rows) for _ in range(2))
        inputs, outputs = (draws(batch, groups, columns) for _ in range(2))
        arguments: Any = (draws(batch, heads, rows), *of_heads, inputs, outputs)
        options: dict[str, Any] = {"z": None, "dt_bias": bias, "dt_softplus": True}
        expected_state = state.clone()
        expected = self.unfused(expected_state, *arguments, skip, **options)
        found = self(state, *arguments, skip, **options)  # type: ignore[call-arg]
        return _alike((found, state), (expected, expected_state))


def _steps(dt: torch.Tensor, bias: torch.Tensor | None, softplus: bool) -> torch.Tensor:
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    return functional.softplus(dt) if softplus else dt


def _mamba(
    hidden_BTHP: torch.Tensor,
    steps_BTH: torch.Tensor,
    A_H: torch.Tensor,
    B_BTGN: torch.Tensor,
    C_BTGN: torch.Tensor,
    skip_H: torch.Tensor | None,
    places: StateInPlace,
) -> torch.Tensor:
    """`[B, T, H, P]`, float32."""
    from flexgen_lite.workers.compute import recurrence_kernels as kernels

    hidden_BTHP = hidden_BTHP.float()
    batch, tokens, heads, rows = hidden_BTHP.shape
    decay_BTH = (A_H.float() * steps_BTH).exp().contiguous()
    x_BTHP = (hidden_BTHP * steps_BTH[..., None]).contiguous()
    inputs, outputs = B_BTGN.float().contiguous(), C_BTGN.float().contiguous()
    output = torch.empty_like(x_BTHP)
    kernels.run(
        kernels.mamba, torch.get_num_threads(), places.sources.data_ptr(), places.targets.data_ptr(), x_BTHP.data_ptr(),
        decay_BTH.data_ptr(), inputs.data_ptr(), outputs.data_ptr(), output.data_ptr(), batch, tokens, heads,
        inputs.shape[2], rows, inputs.shape[3],
    )  # fmt: skip
    return output if skip_H is None else output.add_(hidden_BTHP * skip_H.float()[:, None])


class _Draws:
    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator)


def _alike(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> bool:
    return all(
        one.shape == other.shape and bool((one - other).abs().max() <= _TOLERANCE * other.abs().max())
        for one, other in zip(found, expected, strict=True)
    )


def hush() -> None:
    """Transformers does not ask for packages of kernels: they are for GPUs, and on a CPU ours stand in."""
    said = logging.getLogger("transformers.integrations.hub_kernels")
    said.addFilter(lambda record: "is falling back to its reference" not in record.getMessage())


SINGLE: dict[str, type[Recurrence]] = {
    "torch_recurrent_gated_delta_rule": DeltaRule,
    "recurrent_kimi_delta_attention": KimiDeltaRule,
    "mamba2_selective_state_update": MambaStep,
}
"""Functions for one token of each sequence, which take states that are left in place."""
SEVERAL: dict[str, type[Recurrence]] = {
    "torch_chunk_gated_delta_rule": DeltaRule,
    "chunk_kimi_delta_attention": KimiDeltaRule,
    "mamba2_chunk_scan": MambaScan,
}


def stand_in(module: nn.Module) -> bool:
    """Puts ours in the places of the functions in the code of a mixer's class. Whether that for one token is ours."""
    code = sys.modules[type(module).__module__]
    if prefill_cpu.parallel() is None:
        return False
    for name, kind in {**SINGLE, **SEVERAL}.items():
        function = getattr(code, name, None)
        if function is not None and not isinstance(function, Recurrence) and _is_right(ours := kind(function)):
            setattr(code, name, ours)
    return any(isinstance(getattr(code, name, None), Recurrence) for name in SINGLE)


def _is_right(ours: Recurrence) -> bool:
    with torch.no_grad():
        try:
            return ours.try_out()
        except Exception:  # the function takes something else
            return False
