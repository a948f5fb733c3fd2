"""A setting of the engine, measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.quality.figures import Scored
from benchmarks.quality.task import Task
from flexgen_lite import Completion, FlexGenLite, SamplingParams

SCORED = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0)


def measure(model: str, options: Mapping[str, Any], task: Task, answers: list[list[int]] | None) -> Scored:
    """Score the windows, generate, and score the reference's answers; None: its own are the reference's.

    Raises:
        RuntimeError, ValueError: the engine refuses the options, or a request failed.
    """
    greedy = SamplingParams(max_tokens=task.max_tokens, temperature=0.0, ignore_eos=task.ignore_eos)
    with FlexGenLite(model, **options) as engine:
        windows = [_logprobs(done, 1)[0] for done in _checked(engine.generate(task.windows, SCORED))]
        own = [list(done.token_ids) for done in _checked(engine.generate(task.prompts, greedy))]
        answered = [[*prompt, *answer] for prompt, answer in zip(task.prompts, answers or own, strict=True)]
        done = _checked(engine.generate(answered, SCORED))
        forced = [_logprobs(one, len(prompt)) for one, prompt in zip(done, task.prompts, strict=True)]
    return Scored(windows, [values for values, _ in forced], [ranks for _, ranks in forced], own)


def _checked(completions: list[Completion]) -> list[Completion]:
    for done in completions:
        if done.error is not None:
            raise RuntimeError(done.error)
    return completions


def _logprobs(done: Completion, first: int) -> tuple[list[float], list[bool]]:
    """Of the prompt's tokens from `first` on: their logprobs, and whether each is the most likely one."""
    found = []
    for token, place in zip(done.prompt_token_ids or (), done.prompt_logprobs or (), strict=True):
        found.append(None if place is None else place[token])
    told = [one for one in found[first:] if one is not None]
    return [one.logprob for one in told], [one.rank == 1 for one in told]
