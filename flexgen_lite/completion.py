"""What comes back for one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Logprob:
    """Of one token in one place.

    Attributes:
        logprob: natural logarithm of its probability, by the model's own logits.
        rank: 1 for the most likely token.
        decoded_token: its text; empty where the model has no tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished request.

    Attributes:
        index: place of the prompt among those submitted together.
        prompt: as it was given, text or token ids.
        text: the generated text; empty where the model has no tokenizer, or after an error.
        token_ids: the generated tokens, a stop token included.
        num_prompt_tokens: tokens of the prompt.
        finish_reason: "stop", "length" or "cancelled"; "error" where `error` is set.
        error: why this request failed, or None.
        logprobs: for each generated token, token id -> Logprob of that token and of the most likely ones; None where
            they were not asked for.
    """

    index: int
    prompt: Prompt
    text: str
    token_ids: list[int]
    num_prompt_tokens: int
    finish_reason: str
    error: str | None = None
    logprobs: list[dict[int, Logprob]] | None = None

    def __str__(self) -> str:
        return self.text
