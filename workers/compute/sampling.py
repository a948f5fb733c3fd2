"""Drawing the next token. A sequence's random numbers come from its own seed and step, so its tokens do not depend on
what else is in the batch.

Shapes: N sequences, V vocabulary.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from flexgen_lite.wire.sampling import NO_TOKEN, Penalties, Sample, TokenLogprobs

GREEDY_BELOW = 1e-5  # a temperature below this leaves nothing to draw


@dataclass(frozen=True, slots=True)
class Drawn:
    """What came of some sequences' logits, in two flat tensors, so that two copies take it off a device.

    Attributes:
        integers: int64: one token id per sequence, NO_TOKEN where the logits are not finite; then, of each sequence
            that asked for logprobs, the rank of its token and the ids of the most likely ones.
        floats: float32: of each sequence that asked, the logprob of its token and those of the most likely ones.
    """

    integers: torch.Tensor
    floats: torch.Tensor


def sample(logits_NV: torch.Tensor, samples: Sequence[Sample]) -> Drawn:
    """Draw one token per row of float32 logits, which stay as they are.

    Bias, penalties and banned tokens, then temperature, top-k, top-p and min-p, in the order of Transformers'
    processors. Rows that want more than the most likely token are taken one at a time: a copy of all of them may not
    fit.
    """
    finite_N = torch.isfinite(logits_NV.amax(dim=-1))
    tokens_N = logits_NV.argmax(dim=-1)
    for row, how in enumerate(samples):
        if not _takes_the_best(how) and finite_N[row]:
            tokens_N[row] = _choose(_changed(logits_NV[row], how), how)
    integers, floats = [torch.where(finite_N, tokens_N, NO_TOKEN)], []
    for row, how in enumerate(samples):
        if how.num_logprobs >= 0:
            logits_V, token = logits_NV[row], tokens_N[row]
            values, ids = logits_V.topk(how.num_logprobs)
            rank = (logits_V > logits_V[token]).sum() + 1
            integers += [rank.view(1), ids]
            best = logits_V.max()  # taken off first, as in log_softmax: near 0 logprobs keep their digits
            chosen = torch.cat([logits_V[token].view(1), values])
            floats.append((chosen - best) - (logits_V - best).exp().sum().log())
    return Drawn(torch.cat(integers), torch.cat(floats) if floats else logits_NV.new_empty(0))


def read(drawn: Drawn, samples: Sequence[Sample]) -> tuple[tuple[int, ...], tuple[TokenLogprobs, ...]]:
    """The token of each sequence, and the logprobs of those that asked; `drawn` is on the host."""
    integers, floats = drawn.integers.tolist(), drawn.floats.tolist()
    return tuple(integers[: len(samples)]), tuple(_logprobs(integers, floats, samples))


def _logprobs(integers: list[int], floats: list[float], samples: Sequence[Sample]) -> Iterator[TokenLogprobs]:
    at, at_float = len(samples), 0
    for how in samples:
        if how.num_logprobs >= 0:
            size = how.num_logprobs + 1
            ids, values = integers[at : at + size], floats[at_float : at_float + size]
            yield TokenLogprobs(values[0], ids[0], tuple(zip(ids[1:], values[1:], strict=True)))
            at, at_float = at + size, at_float + size


@dataclass(frozen=True, slots=True)
class Scores:
    """Of rows whose next token is known, in tensors that go to the host as they are.

    Attributes:
        ranks_N: int64, of the tokens.
        values_N: float32, their logprobs.
        top_ids_NK: int64, the most likely tokens.
        top_values_NK: float32, their logprobs.
        num_top: how many of them each row asked for.
    """

    ranks_N: torch.Tensor
    values_N: torch.Tensor
    top_ids_NK: torch.Tensor
    top_values_NK: torch.Tensor
    num_top: tuple[int, ...]


def score(logits_NV: torch.Tensor, targets_N: torch.Tensor, num_top: Sequence[int]) -> Scores:
    """The logprob of each row's target by float32 logits, which are overwritten; nan where they are not finite."""
    most = min(max(num_top), logits_NV.shape[1])
    best_N1 = logits_NV.max(dim=-1, keepdim=True)
    logits_NV -= best_N1.values  # first, as in log_softmax: near 0 logprobs keep their digits
    chosen_N1 = logits_NV.gather(1, targets_N[:, None])
    ranks_N = (logits_NV > chosen_N1).sum(dim=-1) + 1
    ranks_N += (ranks_N == 1) & (targets_N != best_N1.indices[:, 0])  # equally likely, but not what would be drawn
    top_values_NK, top_ids_NK = logits_NV.topk(most, dim=-1)
    norms_N1 = logits_NV.exp_().sum(dim=-1, keepdim=True).log_()
    return Scores(ranks_N, (chosen_N1 - norms_N1)[:, 0], top_ids_NK, top_values_NK - norms_N1, tuple(num_top))


def read_scores(scores: Scores) -> Iterator[TokenLogprobs]:
    """One entry for each row; `scores` is on the host."""
    rows = zip(scores.ranks_N.tolist(), scores.values_N.tolist(), scores.num_top, strict=True)
    ids, values = scores.top_ids_NK.tolist(), scores.top_values_NK.tolist()
    for row, (rank, value, num_top) in enumerate(rows):
        top = zip(ids[row][:num_top], values[row][:num_top], strict=True)
        yield TokenLogprobs(value, rank, tuple(top))


def uniform(seed: int, step: int) -> float:
    """The random number of a sequence's step, in [0, 1)."""
    digest = hashlib.blake2b(struct.pack("<Qq", seed % 2**64, step), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _takes_the_best(how: Sample) -> bool:
    return how.temperature < GREEDY_BELOW and not (how.banned or how.bias or how.penalties)


def _changed(logits_V: torch.Tensor, how: Sample) -> torch.Tensor:
    """The logits after bias, penalties and banned tokens."""
    if not (how.banned or how.bias or how.penalties):
        return logits_V
    logits_V = logits_V.clone()
    if how.bias:
        ids, values = zip(*how.bias, strict=True)
        logits_V[list(ids)] += torch.tensor(values, dtype=logits_V.dtype, device=logits_V.device)
    if how.penalties is not None:
        _penalise(logits_V, how.penalties)
    if how.banned:
        logits_V[list(how.banned)] = float("-inf")
    return logits_V


def _penalise(logits_V: torch.Tensor, penalties: Penalties) -> None:
    """Repetition as Transformers does it (arXiv:1909.05858), then frequency and presence as the OpenAI API says."""
    generated = torch.tensor(penalties.generated, dtype=torch.long, device=logits_V.device)
    if penalties.repetition != 1:
        ids = torch.cat([generated, generated.new_tensor(penalties.prompt)]).unique()
        old = logits_V[ids]
        logits_V[ids] = torch.where(old < 0, old * penalties.repetition, old / penalties.repetition)
    ids, counts = generated.unique(return_counts=True)
    logits_V[ids] -= counts * penalties.frequency + penalties.presence


def _choose(logits_V: torch.Tensor, how: Sample) -> torch.Tensor:
    if how.temperature < GREEDY_BELOW:
        return logits_V.argmax()
    logits_V = (logits_V - logits_V.max()) / how.temperature
    ids_V = None
    if how.top_k > 0:
        logits_V, ids_V = logits_V.topk(min(how.top_k, logits_V.shape[0]))
    elif how.top_p < 1:
        logits_V, ids_V = logits_V.sort(descending=True)
    probs_V = torch.softmax(logits_V.double(), dim=-1)
    cumulative_V = probs_V.cumsum(dim=-1)
    if how.top_p < 1:
        probs_V = torch.where(cumulative_V - probs_V < how.top_p, probs_V, 0)
    if how.min_p > 0:
        probs_V = torch.where(probs_V >= how.min_p * probs_V.max(), probs_V, 0)
    if how.top_p < 1 or how.min_p > 0:
        cumulative_V = probs_V.cumsum(dim=-1)
    target = uniform(how.seed, how.step) * cumulative_V[-1]
    index = torch.searchsorted(cumulative_V, target.view(1), right=True).clamp(max=cumulative_V.shape[0] - 1)[0]
    if probs_V[index] == 0:  # rounding at the very end of the distribution
        index = probs_V.argmax()
    return index if ids_V is None else ids_V[index]
