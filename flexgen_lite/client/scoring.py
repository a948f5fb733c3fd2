"""How likely given continuations are: what evaluations ask for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flexgen_lite.client.arguments import pairs, several_prompts
from flexgen_lite.client.completion import Completion, Prompt
from flexgen_lite.client.request import Request, is_one_prompt, wire_prompt
from flexgen_lite.client.sampling_params import SamplingParams

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


def requests(contexts: Any, continuations: Any) -> Iterator[Request]:
    """One request for each pair: two texts, or two lists of token ids.

    White space at the end of a context counts as the beginning of the continuation: tokens more often begin with a
    space than end with one.

    Args:
        contexts: one, or several of them.
        continuations: as many.

    Raises:
        TypeError: they are none.
        ValueError: there are not as many of the one as of the other, a pair is mixed, or a continuation is empty; of
            what comes out of a generator, when it comes.
    """
    is_one = is_one_prompt(contexts)
    if is_one != is_one_prompt(continuations):
        which = "contexts is one, continuations are" if is_one else "continuations is one, contexts are"
        raise ValueError(f"{which} several or none: give one of each, or as many of the one as of the other")
    befores, num_before = several_prompts("contexts", "context", contexts)
    afters, num_after = several_prompts("continuations", "continuation", continuations)
    if num_before is not None and num_after is not None:
        if num_before != num_after:
            raise ValueError(
                f"{num_before} contexts for {num_after} continuations: give as many of the one as of the other"
            )
        for index, pair in enumerate(zip(befores, afters, strict=True)):
            _request(index, *pair)
    both = pairs("contexts", befores, "continuations", afters)
    return (_request(index, *pair) for index, pair in enumerate(both))


def _request(index: int, context: Prompt, continuation: Prompt) -> Request:
    before, after = wire_prompt(f"context {index}", context), wire_prompt(f"continuation {index}", continuation)
    if len(after) == 0:
        raise ValueError(f"continuation {index} is empty: give at least one token")
    if isinstance(before, str) and isinstance(after, str):
        return Request(before + after, SCORED, context=len(before.rstrip()))
    if isinstance(before, str) or isinstance(after, str):
        raise ValueError(f"pair {index} is a text and a list of token ids: give two of a kind")
    if len(before) == 0:
        raise ValueError(f"context {index} is empty: give at least one token")
    return Request(before + after, SCORED, scored_from=len(before))


def texts_alone(texts: Any) -> Iterator[Request]:
    """One request for each text, scored from its first token on; of a list of token ids, from the second.

    Raises:
        TypeError: they are none.
        ValueError: one has nothing to be scored; of what comes out of a generator, when it comes.
    """
    several, length = several_prompts("texts", "text", texts)
    if length is not None:
        for index, text in enumerate(several):
            _request_alone(index, text)
    return (_request_alone(index, text) for index, text in enumerate(several))


def _request_alone(index: int, text: Prompt) -> Request:
    prompt = wire_prompt(f"text {index}", text)
    if len(prompt) == 0:
        raise ValueError(f"text {index} is empty: give at least one token")
    if isinstance(prompt, str):
        return Request(prompt, SCORED, context=0)
    if len(prompt) == 1:
        raise ValueError(f"text {index} is a single token id, and the first is not scored: give at least two")
    return Request(prompt, SCORED)


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
