"""The attention call that Transformers makes on our behalf: what arrives, and how a layer's call looks.

`flexgen_lite` is registered as an attention implementation. It hands q, k and v to the greenlet in which the model
runs; what happens to them is that greenlet's business (a trial to learn the shapes, or a real forward).

Shapes: B batch (always 1), H query heads, G key/value heads, T tokens, D head size of q and k, E head size of v.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import greenlet
import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from flexgen_lite.model.spec import AttentionSpec
from flexgen_lite.workers.model.builder import ATTENTION_NAME
from flexgen_lite.workers.serve import UserError

KNOWN_ARGUMENTS = {
    "position_ids", "cache_position", "use_cache", "output_attentions", "position_embeddings", "is_causal", "layer_idx",
    "output_router_logits", "deterministic", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
}  # fmt: skip


@dataclass(slots=True)
class AttentionCall:
    query_BHTD: torch.Tensor
    key_BGTD: torch.Tensor
    value_BGTE: torch.Tensor
    scaling: float
    sliding_window: int | None
    softcap: float | None
    sinks_H: torch.Tensor | None

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(
            num_heads=self.query_BHTD.shape[1],
            num_kv_heads=self.key_BGTD.shape[1],
            head_dim=self.query_BHTD.shape[3],
            value_dim=self.value_BGTE.shape[3],
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            softcap=self.softcap,
            sinks=self.sinks_H is not None,
        )


class ModelGreenlet(greenlet.greenlet):
    """A greenlet in which a model runs."""

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Returns the attention output, `[B, T, H, E]`."""
        raise NotImplementedError


def flexgen_lite_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if attention_mask is not None:
        raise UserError(f"{type(module).__name__} masks attention in a way of its own, which is not supported")
    if getattr(module, "is_causal", True) is False or kwargs.get("is_causal") is False:
        raise UserError(f"{type(module).__name__} is bidirectional: every token sees those behind it")
    unknown = sorted(k for k, v in kwargs.items() if v is not None and k not in KNOWN_ARGUMENTS)
    if unknown:
        raise UserError(f"{type(module).__name__} wants attention with {', '.join(unknown)}, which is not supported")
    current = greenlet.getcurrent()
    assert isinstance(current, ModelGreenlet), "attention outside of a model greenlet"
    call = AttentionCall(
        query_BHTD=query,
        key_BGTD=key,
        value_BGTE=value,
        scaling=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        sliding_window=sliding_window,
        softcap=softcap,
        sinks_H=s_aux,
    )
    return current.attend(call), None


def register() -> None:
    AttentionInterface.register(ATTENTION_NAME, flexgen_lite_attention)


class _Reached(BaseException):
    """Leaves a decoder layer at its attention call."""


class _Trial(ModelGreenlet):
    calls: list[AttentionSpec]

    def attend(self, call: AttentionCall) -> torch.Tensor:
        self.calls.append(call.spec)
        raise _Reached


def describe(model: PreTrainedModel, layers: nn.ModuleList) -> tuple[AttentionSpec, ...]:
    """Each layer's attention, learnt by running three tokens through the model up to each layer's call.

    The weights are zeros in memory that is never written and so takes no RAM. Raises UserError for a layer without
    exactly one attention call.
    """
    trial: _Trial = _Trial(lambda: _run_trial(model, layers, trial))
    trial.calls = []
    with _zero_weights(model):
        trial.switch()
    return tuple(trial.calls)


def _run_trial(model: PreTrainedModel, layers: nn.ModuleList, trial: _Trial) -> None:
    originals = [layer.forward for layer in layers]
    for index, layer in enumerate(layers):
        layer.forward = _until_attention(index, layer, trial)
    try:
        model(
            input_ids=torch.zeros((1, 3), dtype=torch.long),
            position_ids=torch.arange(3)[None],
            use_cache=False,
        )
    finally:
        for layer, forward in zip(layers, originals, strict=True):
            layer.forward = forward


def _until_attention(index: int, layer: nn.Module, trial: _Trial) -> Callable[..., torch.Tensor]:
    forward = layer.forward

    def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        try:
            forward(hidden_states, *args, **kwargs)
        except _Reached:
            return hidden_states
        raise UserError(
            f"layer {index} ({type(layer).__name__}) has no attention call: "
            "it keeps other state than a KV cache, which is not supported"
        )

    return run


@contextlib.contextmanager
def _zero_weights(model: PreTrainedModel) -> Iterator[None]:
    """Binds every parameter to the same untouched zero pages for a while."""
    places = [(m, name, p) for m in model.modules() for name, p in m._parameters.items() if p is not None]
    size = max(p.numel() * p.element_size() for _, _, p in places)
    zeros = torch.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)
    try:
        for module, name, p in places:
            view = zeros[: p.numel() * p.element_size()].view(p.dtype).view(p.shape)
            module._parameters[name] = nn.Parameter(view, requires_grad=False)
        yield
    finally:
        for module, name, p in places:
            module._parameters[name] = p
