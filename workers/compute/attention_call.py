"""The attention call that Transformers makes on our behalf: what arrives.

`flexgen_lite` is registered as an attention implementation. It hands q, k and v to the greenlet in which the model
runs; what happens to them is that greenlet's business (a trial to learn the shapes, trial.py, or a real forward).

Shapes: B batch (always 1), H query heads, G key/value heads, T tokens, D head size of q and k, E head size of v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import greenlet
import torch
from torch import nn
from transformers import AttentionInterface

from flexgen_lite.model.spec import AttentionSpec
from flexgen_lite.workers.compute.indexers import ALL, NO_MASK
from flexgen_lite.workers.model.builder import ATTENTION_NAME
from flexgen_lite.workers.serve import UserError

if TYPE_CHECKING:
    from flexgen_lite.workers.compute.latents import Latents
    from flexgen_lite.workers.compute.mixers import Mixer

KNOWN_ARGUMENTS = {
    "position_ids", "cache_position", "use_cache", "output_attentions", "position_embeddings", "is_causal", "layer_idx",
    "output_router_logits", "deterministic", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
    "logits_to_keep", "output_hidden_states",
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
    attention_chunk: int | None = None
    latents: Latents | None = None  # instead of keys and values
    module: nn.Module | None = None  # that makes the call

    @property
    def spec(self) -> AttentionSpec:
        if self.latents is not None:
            value_dim = self.latents.latent_B1TR.shape[3]
            kv_heads, head_dim = 1, value_dim + self.latents.rotary_B1TP.shape[3]
        else:
            kv_heads, head_dim = self.key_BGTD.shape[1], self.query_BHTD.shape[3]
            value_dim = self.value_BGTE.shape[3]
        return AttentionSpec(
            num_heads=self.query_BHTD.shape[1],
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            softcap=self.softcap,
            sinks=self.sinks_H is not None,
            attention_chunk=self.attention_chunk,
            values_in_keys=self.latents is not None,
        )


class ModelGreenlet(greenlet.greenlet):
    """A greenlet in which a model runs.

    Attributes:
        latents: for the next attention call, instead of keys and values.
    """

    latents: Latents | None = None

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Returns the attention output, `[B, T, H, E]`."""
        raise NotImplementedError

    def mix(self, mixer: Mixer, rows_1TD: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns what a mixer makes of the rows (mixers.py), and stops behind it."""
        raise NotImplementedError

    def stop(self) -> None:
        """At the end of a layer without attention and mixer."""
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
    if attention_mask is not None and attention_mask is not NO_MASK:
        raise UserError(f"{type(module).__name__} masks attention in a way of its own, which is not supported")
    if getattr(module, "is_causal", True) is False or kwargs.get("is_causal") is False:
        raise UserError(f"{type(module).__name__} is bidirectional: every token sees those behind it")
    unknown = sorted(k for k, v in kwargs.items() if v is not None and v is not ALL and k not in KNOWN_ARGUMENTS)
    if unknown:
        raise UserError(f"{type(module).__name__} wants attention with {', '.join(unknown)}, which is not supported")
    current = greenlet.getcurrent()
    assert isinstance(current, ModelGreenlet), "attention outside of a model greenlet"
    call = AttentionCall(
        query_BHTD=query,
        key_BGTD=key,
        value_BGTE=value,
        scaling=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        sliding_window=sliding_window or None,  # some configs have 0 for none
        softcap=softcap,
        sinks_H=s_aux,
        attention_chunk=_attention_chunk(module),
        latents=current.latents,
        module=module,
    )
    current.latents = None
    return current.attend(call), None


def _attention_chunk(module: nn.Module) -> int | None:
    """Tokens of a chunk, where the layer's tokens see those of their own chunk alone; it is said by the mask alone."""
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds or index is None or kinds[index] != "chunked_attention":
        return None
    size: int = config.attention_chunk_size  # type: ignore[union-attr]
    return size


def register() -> None:
    AttentionInterface.register(ATTENTION_NAME, flexgen_lite_attention)
