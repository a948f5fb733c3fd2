"""What is made of logprobs and answers: the figures of one row."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

Rows = list[list[float]]


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a model in one setting said.

    Attributes:
        windows: logprobs of the windows' tokens, all but the first of each.
        forced: logprobs of the reference's answers, read after their prompts.
        likeliest: of each of these tokens, whether it is the most likely one there.
        answers: its own greedy tokens; None where it was not asked to generate.
    """

    windows: Rows
    forced: Rows
    likeliest: list[list[bool]]
    answers: list[list[int]] | None


@dataclasses.dataclass(frozen=True)
class Figures:
    """Attributes:
    perplexity: of the windows.
    change: of the perplexity against the reference's, as a share; None: it is the reference.
    error: standard error of `change`, from the differences token by token.
    likeliest: share of the reference's greedy tokens that are the most likely ones here too, after the same tokens.
    difference: mean absolute difference of the logprobs of these tokens.
    same: share of the greedy tokens before the first that differs from the reference's; None: it generated nothing.
    """

    perplexity: float
    change: float | None
    error: float | None
    likeliest: float
    difference: float | None
    same: float | None

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def figures(scored: Scored, reference: Scored | None) -> Figures:
    """Of one row against its reference; None: it is the reference."""
    own, tokens = _flat(scored.windows), [value for row in scored.likeliest for value in row]
    likeliest = sum(tokens) / len(tokens)
    if reference is None:
        return Figures(perplexity(own), None, None, likeliest, None, None)
    theirs = _flat(reference.windows)
    lost = [b - a for a, b in zip(own, theirs, strict=True)]
    change = math.expm1(statistics.fmean(lost))
    error = (1 + change) * statistics.stdev(lost) / math.sqrt(len(lost)) if len(lost) > 1 else None
    pairs = zip(_flat(scored.forced), _flat(reference.forced), strict=True)
    difference = statistics.fmean(abs(a - b) for a, b in pairs)
    same = None
    if scored.answers is not None and reference.answers is not None:
        same = alike(scored.answers, reference.answers)
    return Figures(perplexity(own), change, error, likeliest, difference, same)


def alike(answers: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> float:
    """Share of the reference's tokens before the first in which an answer differs, or ends."""
    kept = 0
    for own, theirs in zip(answers, reference, strict=True):
        kept += next((i for i, token in enumerate(theirs) if i >= len(own) or own[i] != token), len(theirs))
    return kept / sum(map(len, reference))


def perplexity(logprobs: Sequence[float]) -> float:
    return math.exp(-statistics.fmean(logprobs))


def _flat(rows: Rows) -> list[float]:
    return [value for row in rows for value in row]
