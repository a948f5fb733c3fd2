"""The attention call that Transformers makes on our behalf: what arrives.

`flexgen_lite` is registered as an attention implementation. It hands q, k and v to the greenlet in which the model
runs; what happens to them is that greenlet's business (a trial to learn the shapes, trial.py, or a real forward).

Shapes: B batch (always 1), H query heads, G key/value heads, T tokens, D head size of q and k, E head size of v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import greenlet
import torch
from torch import nn
from transformers import AttentionInterface

from flexgen_lite.model.spec import AttentionSpec
from flexgen_lite.workers.model.builder import ATTENTION_NAME
from flexgen_lite.workers.serve import UserError

KNOWN_ARGUMENTS = {
    "position_ids", "cache_position", "use_cache", "output_attentions", "position_embeddings", "is_causal", "layer_idx",
    "output_router_logits", "deterministic", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
    "logits_to_keep",
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
