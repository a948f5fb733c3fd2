"""Transformers with a KV cache that is rounded to 8 bits as ours is, and what it generates.

Shapes: B batch, G key/value heads, T tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache
from transformers.models.auto.modeling_auto import AutoModelForCausalLM


def rounded(x_BGTD: torch.Tensor, order: int) -> torch.Tensor:
    """What int8 keeps of rows of D items, with a scale for each, between two Hadamard transforms."""
    x_BGTD = hadamard(x_BGTD, order)
    scale_BGT1 = x_BGTD.abs().amax(-1, keepdim=True) / 127
    kept_BGTD = torch.where(scale_BGT1 > 0, torch.round(x_BGTD / scale_BGT1) * (scale_BGT1 / order), 0)
    return hadamard(kept_BGTD, order)


def hadamard(x_BGTD: torch.Tensor, order: int) -> torch.Tensor:
    """Times the matrix of workers/hadamard.py, with sums in the order in which the kernels have them."""
    size = 1
    while 4 * size <= order:
        parts = x_BGTD.unflatten(-1, (-1, 4, size))
        a, b, c, d = parts.unbind(-2)
        x_BGTD = (((a + b) + (c + d)).unsqueeze(-2) - 2 * parts).flatten(-3)
        size *= 4
    if size < order:
        low, high = x_BGTD.unflatten(-1, (-1, 2, size)).unbind(-2)
        x_BGTD = torch.stack((low + high, low - high), dim=-2).flatten(-3)
    return x_BGTD


class Int8Cache(DynamicCache):
    """Gives what is kept, of the tokens that are stored as well.

    Attributes:
        joined: keys and values are latents and rotary keys, which are kept as one row.
    """

    joined = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.joined:
            sizes = [key_states.shape[-1], value_states.shape[-1]]
            order = min(size & -size for size in sizes)
            key, value = rounded(torch.cat((key_states, value_states), dim=-1), order).split(sizes, dim=-1)
        else:
            key, value = (rounded(x, x.shape[-1] & -x.shape[-1]) for x in (key_states, value_states))
        return super().update(key, value, layer_idx, *args, **kwargs)


@torch.inference_mode()
def int8_tokens(directory: Path, prompts: Sequence[list[int]], max_tokens: int) -> list[list[int]]:
    """Greedy tokens in float32, each prompt alone."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    answers = []
    for prompt in prompts:
        answer: list[int] = []
        cache = Int8Cache()
        cache.joined = hasattr(model.config, "kv_lora_rank")
        rest = prompt
        while len(answer) < max_tokens:
            logits = model(torch.tensor([rest]), cache=cache, use_cache=True).logits
            rest = [int(logits[0, -1].argmax())]
            answer += rest
        answers.append(answer)
    return answers
