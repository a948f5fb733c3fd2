"""How tokens are drawn, and how likely they were, in messages."""

from __future__ import annotations

import math
from dataclasses import dataclass

NO_TOKEN = -1
"""In the place of a sampled token: the model's logits were not finite."""

MAX_LOGPROBS = 20
MAX_N = 128  # answers to one prompt
LOGITS_BYTES = 32 << 20
"""Float32 logits that are held at once."""
MAX_LOGIT_BIAS = 100.0
MAX_BIASED = 1024  # tokens with a bias: they travel with every pass
MAX_PENALTY = 2.0  # presence, frequency
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1000
MAX_INT = (1 << 63) - 1
WHOLE_NUMBERS = {
    "max_tokens": (0, MAX_INT),
    "min_tokens": (0, MAX_INT),
    "top_k": (0, MAX_INT),
    "seed": (0, MAX_INT),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
    "n": (1, MAX_N),
    "scored_from": (1, MAX_INT),
}
"""The lowest and the highest value of each."""
NUMBERS = {
    "temperature": "a finite number from 0 (greedy) up",
    "top_p": "a number above 0 and up to 1",
    "min_p": "a number from 0 to 1",
    "repetition_penalty": "a finite number above 0; 1 is none",
    "presence_penalty": f"a number from -{MAX_PENALTY:g} to {MAX_PENALTY:g}",
    "frequency_penalty": f"a number from -{MAX_PENALTY:g} to {MAX_PENALTY:g}",
    "logit_bias": f"a finite number from -{MAX_LOGIT_BIAS:g} to {MAX_LOGIT_BIAS:g}",
}
"""What is allowed, in words."""


@dataclass(frozen=True, slots=True)
class Penalties:
    """See SamplingParams. `prompt`: its token ids, each once, where the repetition penalty needs them; `generated`: all
    tokens generated so far, in their order."""

    repetition: float
    presence: float
    frequency: float
    prompt: tuple[int, ...]
    generated: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """How to draw one sequence's next token, made of its WireParams by `RunningRequest.next_sample`. `seed` and `step`
    alone decide the random number."""

    temperature: float  # 0: greedy
    top_k: int  # 0: all
    top_p: float
    seed: int
    step: int  # tokens generated so far
    banned: tuple[int, ...] = ()  # token ids that may not come (end of sequence before min_tokens)
    min_p: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()  # token id, what is added to its logit
    penalties: Penalties | None = None
    num_logprobs: int = -1  # most likely tokens to be told beside the one drawn; -1: no logprobs at all


@dataclass(frozen=True, slots=True)
class Scored:
    """Rows of a span whose next token is known, and is to be told the logprob of: from the row `skip` of the span on,
    one for each of `targets`."""

    skip: int
    targets: tuple[int, ...]
    num_top: int  # most likely tokens to be told beside each


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of one token in its place, and of the most likely ones there, by the model's own logits: nothing added, at
    temperature 1.

    `rank`: 1 for the most likely token; a scored one that is only equally likely has 2.
    """

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]  # token id, logprob; the most likely first


@dataclass(frozen=True, slots=True)
class WireParams:
    """SamplingParams on the wire; see there for what each means."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    skip_special_tokens: bool
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    n: int = 1
    prompt_logprobs: int | None = None
    scored_from: int = 1  # first token of the prompt whose logprob is told

    def problem(self) -> str | None:
        """What is wrong with the values, or None: a client need not have used SamplingParams."""
        for name, (low, high) in WHOLE_NUMBERS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                return f"{name}={value} is not allowed: give {low} to {high}"
        if self.max_tokens == 0 and self.prompt_logprobs is None:
            return f"max_tokens=0 is not allowed: give 1 or more, up to {MAX_INT}, or 0 with prompt_logprobs"
        if self.min_tokens > self.max_tokens:
            return (
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}: lower it or raise max_tokens"
            )
        for name, allowed in NUMBERS.items():
            if name != "logit_bias" and not allows(name, getattr(self, name)):
                return f"{name}={getattr(self, name)} is not allowed: give {allowed}"
        if len(self.logit_bias) > MAX_BIASED:
            return f"logit_bias=<{len(self.logit_bias)} tokens> is not allowed: give at most {MAX_BIASED}"
        for token_id, bias in self.logit_bias:
            if not allows("logit_bias", bias):
                return f"logit_bias={bias} of token {token_id} is not allowed: give {NUMBERS['logit_bias']}"
        if len(self.stop) > MAX_STOPS:
            return f"stop=<{len(self.stop)} strings> is not allowed: give at most {MAX_STOPS}"
        for text in self.stop:
            if not 0 < len(text) <= MAX_STOP_CHARACTERS:
                return f"stop=<{len(text)} characters> is not allowed: give 1 to {MAX_STOP_CHARACTERS}"
        return None


def allows(name: str, value: float) -> bool:
    """Whether one of NUMBERS may have the value; NaN is never allowed."""
    match name:
        case "temperature":
            return 0 <= value < math.inf
        case "top_p":
            return 0 < value <= 1
        case "min_p":
            return 0 <= value <= 1
        case "repetition_penalty":
            return 0 < value < math.inf
        case "logit_bias":
            return abs(value) <= MAX_LOGIT_BIAS
        case "presence_penalty" | "frequency_penalty":
            return abs(value) <= MAX_PENALTY
    raise KeyError(name)
