"""Multi-head latent attention (DeepSeek and others): what is kept of a token is what its keys and values are made of.

Such a module makes keys and values of all heads from a latent and a rotary key that all heads share, in its method
`expand_kv`. Here that method hands over the latents instead. The KV cache has them alone; attention to cached tokens is
computed in their space, as of one key/value head: queries go through the half of the weight that makes keys, outputs
through the half that makes values. Prompts attend to themselves expanded, as the model does it.

Shapes: R latent, P rotary part of a key, N the rest of it (D = N + P); others as in attention_call.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import greenlet
import torch
from torch import nn

from flexgen_lite.workers.compute.attention_call import AttentionCall, ModelGreenlet

Expand = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Latents:
    """Of the tokens of a call.

    Attributes:
        expand: makes keys `[B, H, T, D]` and values `[B, H, T, E]`.
    """

    expand: Expand
    projection: nn.Linear
    latent_B1TR: torch.Tensor
    rotary_B1TP: torch.Tensor

    def keys(self) -> torch.Tensor:
        """What is kept, `[B, 1, T, K]`, K = R + P; its first R items are the value."""
        return torch.cat((self.latent_B1TR, self.rotary_B1TP), dim=-1)

    def absorb(self, query_HTD: torch.Tensor) -> torch.Tensor:
        """Queries for latents, `[H, T, K]`."""
        key_HNR, _ = self._halves(query_HTD.shape[0], query_HTD.shape[2])
        plain_HTN, rotary_HTP = query_HTD.split([key_HNR.shape[1], self.rotary_B1TP.shape[-1]], dim=-1)
        return torch.cat((torch.matmul(plain_HTN, key_HNR), rotary_HTP), dim=-1)

    def expand_output(self, out_THR: torch.Tensor, head_dim: int) -> torch.Tensor:
        """Weighted sums of values `[T, H, E]` from those of latents; `head_dim`: D."""
        _, value_HER = self._halves(out_THR.shape[1], head_dim)
        return torch.matmul(out_THR.transpose(0, 1), value_HER.transpose(1, 2)).transpose(0, 1)

    def value_dim(self, heads: int, head_dim: int) -> int:
        """E."""
        return self.projection.weight.shape[0] // heads - (head_dim - self.rotary_B1TP.shape[-1])

    def _halves(self, heads: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        weight_HXR = self.projection.weight.view(heads, -1, self.latent_B1TR.shape[-1])
        size = head_dim - self.rotary_B1TP.shape[-1]
        return weight_HXR[:, :size], weight_HXR[:, size:]


def hand_over(modules: Iterable[nn.Module]) -> None:
    """Has those of the modules that are of this kind hand over latents."""
    for module in modules:
        expand, projection = getattr(module, "expand_kv", None), getattr(module, "kv_b_proj", None)
        if callable(expand) and isinstance(projection, nn.Linear):
            vars(module)["expand_kv"] = _instead_of(expand, projection)


def projections(modules: Iterable[nn.Module]) -> frozenset[nn.Module]:
    """Whose weights are read beside their own forward, of modules that hand over latents."""
    return frozenset(module.kv_b_proj for module in modules if "expand_kv" in vars(module))  # type: ignore[misc]


def _instead_of(expand: Expand, projection: nn.Linear) -> Expand:
    def note(latent_B1TR: torch.Tensor, rotary_B1TP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps the latents for the attention call that follows, which gets none of the keys and values."""
        running = greenlet.getcurrent()
        assert isinstance(running, ModelGreenlet), "latents outside of a model greenlet"
        running.latents = Latents(expand, projection, latent_B1TR, rotary_B1TP)
        nothing = latent_B1TR.new_zeros(()).expand(*latent_B1TR.shape[:3], 1)
        return nothing, nothing

    return note


def in_latent_space(call: AttentionCall) -> AttentionCall:
    """The same attention, to what is kept of the tokens; its output is to be expanded."""
    latents: Any = call.latents
    return AttentionCall(
        query_BHTD=latents.absorb(call.query_BHTD[0])[None],
        key_BGTD=latents.keys(),
        value_BGTE=latents.latent_B1TR,
        scaling=call.scaling,
        sliding_window=call.sliding_window,
        softcap=call.softcap,
        sinks_H=call.sinks_H,
        attention_chunk=call.attention_chunk,
    )
