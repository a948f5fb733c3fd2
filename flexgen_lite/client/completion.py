"""What comes back for one prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
class CompletionOutput:
    """One answer to a prompt.

    Attributes:
        text: the generated text; empty where the model has no tokenizer.
        token_ids: the generated tokens, a stop token included.
        finish_reason: "stop", "length" or "cancelled"; "error" where the request failed.
        logprobs: for each generated token, token id -> Logprob of that token and of the most likely ones; None where
            they were not asked for.
        text_offsets: with the logprobs, where what each of these tokens added begins in the text; at its end for those
            behind a stop string's beginning.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[dict[int, Logprob]] | None = None
    text_offsets: list[int] | None = None


FAILED = CompletionOutput("", [], "error")


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished request.

    Attributes:
        index: place of the prompt among those submitted together.
        prompt: as it was given, text or token ids.
        outputs: the answers, `n` of them; none after an error, fewer where it was cancelled.
        num_prompt_tokens: tokens of the prompt.
        error: why this request failed, or None.
        prompt_token_ids: the prompt as the model saw it, where prompt_logprobs or echo were asked for.
        prompt_logprobs: for each of those tokens what `logprobs` says of the generated ones; None for the first, which
            has none, and altogether where they were not asked for.
        prompt_text: the text of the prompt's tokens, where echo was asked for; without those that the tokenizer has put
            around a text.
        token_texts: the text of each token that occurs in logprobs.
        token_bytes: of those of them that are not whole characters.
        prompt_offsets: where what each of the prompt's tokens added begins in `prompt_text`, where echo and logprobs
            were asked for.
    """

    index: int
    prompt: Prompt
    outputs: list[CompletionOutput]
    num_prompt_tokens: int
    error: str | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    prompt_text: str | None = None
    token_texts: Mapping[int, str] = field(default_factory=dict)
    token_bytes: Mapping[int, bytes] = field(default_factory=dict)
    prompt_offsets: list[int] | None = None

    @property
    def _first(self) -> CompletionOutput:
        return self.outputs[0] if self.outputs else FAILED

    @property
    def text(self) -> str:
        """Of the first answer; empty after an error."""
        return self._first.text

    @property
    def token_ids(self) -> list[int]:
        """Of the first answer."""
        return self._first.token_ids

    @property
    def finish_reason(self) -> str:
        """Of the first answer; "error" where `error` is set."""
        return self._first.finish_reason

    @property
    def logprobs(self) -> list[dict[int, Logprob]] | None:
        """Of the first answer."""
        return self._first.logprobs

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Delta:
    """What has come of one answer since the last Delta of it.

    Attributes:
        index: place of the prompt among those submitted together.
        number: which of the prompt's `n` answers.
        text: it may lag behind the tokens by a part of a character, or what may become a stop string.
        token_ids: new tokens; with logprobs, none whose place in the text is not certain.
        logprobs: of each of them, as in CompletionOutput.
        finish_reason: with the last one; None before.
        text_offsets: of each of them, in the answer's whole text.
        token_bytes: of tokens in the logprobs that are not whole characters.
    """

    index: int
    number: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    text_offsets: list[int] | None = None
    token_bytes: Mapping[int, bytes] = field(default_factory=dict)
