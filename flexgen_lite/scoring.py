"""How likely given continuations are: what evaluations ask for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flexgen_lite.completion import Completion, Prompt
from flexgen_lite.request import Request
from flexgen_lite.sampling_params import SamplingParams

SCORED = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0)


@dataclass(frozen=True, slots=True)
class Score:
    """Of one continuation after its context.

    Attributes:
        logprob: natural logarithm of its probability: the sum over its tokens.
        is_greedy: each of its tokens is the most likely one in its place.
        token_ids: of the continuation.
        token_logprobs: of each of them.
    """

    logprob: float
    is_greedy: bool
    token_ids: list[int]
    token_logprobs: list[float]


def requests(contexts: Iterable[Prompt], continuations: Iterable[Prompt]) -> Iterator[Request]:
    """One request for each pair: two texts, or two lists of token ids.

    White space at the end of a context counts as the beginning of the continuation: tokens more often begin with a
    space than end with one.

    Raises:
        ValueError: there are not as many of the one as of the other, a pair is mixed, or a continuation is empty.
    """
    for index, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
        if len(continuation) == 0:
            raise ValueError(f"continuation {index} is empty: give at least one token")
        if isinstance(context, str) and isinstance(continuation, str):
            yield Request(context + continuation, SCORED, context=len(context.rstrip()))
        elif isinstance(context, str) or isinstance(continuation, str):
            raise ValueError(f"pair {index} is a text and a list of token ids: give two of a kind")
        elif len(context) == 0:
            raise ValueError(f"context {index} is empty: give at least one token")
        else:
            yield Request([*context, *continuation], SCORED, scored_from=len(context))


def texts_alone(texts: Iterable[Prompt]) -> Iterator[Request]:
    """One request for each text, scored from its first token on; of a list of token ids, from the second."""
    for text in texts:
        yield Request(text, SCORED, context=0 if isinstance(text, str) else None)


def score_of(completion: Completion) -> Score:
    """
    Raises:
        ValueError: the request failed, or was cancelled; the message says why.
    """
    if completion.error is not None:
        raise ValueError(f"pair {completion.index}: {completion.error}")
    if any(output.finish_reason == "cancelled" for output in completion.outputs):
        raise ValueError(f"pair {completion.index}: it was cancelled")
    token_ids, logprobs, greedy = [], [], True
    for token, place in zip(completion.prompt_token_ids or (), completion.prompt_logprobs or (), strict=True):
        if place is not None:
            token_ids.append(token)
            logprobs.append(place[token].logprob)
            greedy &= place[token].rank == 1
    return Score(sum(logprobs), greedy, token_ids, logprobs)
