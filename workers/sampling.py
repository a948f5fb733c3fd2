"""Drawing the next token. A sequence's random numbers come from its own seed and step, so its tokens do not depend on
what else is in the batch.

Shapes: N sequences, V vocabulary.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import torch

from flexgen_lite.messages import NO_TOKEN, Sample

GREEDY_BELOW = 1e-5  # a temperature below this leaves nothing to draw


def sample(logits_NV: torch.Tensor, samples: Sequence[Sample]) -> torch.Tensor:
    """One token id per row, int64 `[N]`, on the device of the logits; NO_TOKEN for a row whose logits are not finite.

    Temperature, then top-k, then top-p, as Transformers applies them. Changes `logits_NV`.
    """
    finite_N = torch.isfinite(logits_NV.amax(dim=-1))
    for row, how in enumerate(samples):
        if how.banned:
            logits_NV[row, list(how.banned)] = float("-inf")
    tokens_N = logits_NV.argmax(dim=-1)
    for row, how in enumerate(samples):
        if how.temperature >= GREEDY_BELOW and finite_N[row]:
            tokens_N[row] = _draw(logits_NV[row].float(), how)
    return torch.where(finite_N, tokens_N, NO_TOKEN)


def uniform(seed: int, step: int) -> float:
    """The random number of a sequence's step, in [0, 1)."""
    digest = hashlib.blake2b(struct.pack("<Qq", seed % 2**64, step), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _draw(logits_V: torch.Tensor, how: Sample) -> torch.Tensor:
    logits_V = (logits_V - logits_V.max()) / how.temperature
    ids_V = None
    if how.top_k > 0:
        logits_V, ids_V = logits_V.topk(min(how.top_k, logits_V.shape[0]))
    elif how.top_p < 1:
        logits_V, ids_V = logits_V.sort(descending=True)
    probs_V = torch.softmax(logits_V.double(), dim=-1)
    cumulative_V = probs_V.cumsum(dim=-1)
    if how.top_p < 1:
        kept_V = cumulative_V - probs_V < how.top_p
        cumulative_V = torch.where(kept_V, probs_V, 0).cumsum(dim=-1)
    target = uniform(how.seed, how.step) * cumulative_V[-1]
    index = torch.searchsorted(cumulative_V, target.view(1), right=True).clamp(max=cumulative_V.shape[0] - 1)[0]
    if probs_V[index] == 0:  # rounding at the very end of the distribution
        index = probs_V.argmax()
    return index if ids_V is None else ids_V[index]
