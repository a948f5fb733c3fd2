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
    """How to draw one sequence's next token. `seed` and `step` alone decide the random number."""

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
        if not self.max_tokens >= (0 if self.prompt_logprobs is not None else 1):
            return f"max_tokens={self.max_tokens} is not allowed: give 1 or more, or 0 with prompt_logprobs"
        if not 0 <= self.min_tokens <= self.max_tokens:
            return f"min_tokens={self.min_tokens} is not allowed: give 0 to max_tokens ({self.max_tokens})"
        if not 0 <= self.temperature < math.inf:
            return f"temperature={self.temperature} is not allowed: give 0 (greedy) or more"
        if self.top_k < 0:
            return f"top_k={self.top_k} is not allowed: give 0 (all) or more"
        if not 0 < self.top_p <= 1:
            return f"top_p={self.top_p} is not allowed: give a number above 0 and up to 1"
        if self.seed is not None and self.seed < 0:
            return f"seed={self.seed} is not allowed: give 0 or more"
        if not 0 <= self.min_p <= 1:
            return f"min_p={self.min_p} is not allowed: give a number from 0 to 1"
        if not 0 < self.repetition_penalty < math.inf:
            return f"repetition_penalty={self.repetition_penalty} is not allowed: give a number above 0; 1 is none"
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(getattr(self, name)) <= MAX_PENALTY:
                return f"{name}={getattr(self, name)} is not allowed: give a number from -2 to 2"
        if len(self.logit_bias) > MAX_BIASED:
            return f"logit_bias=<{len(self.logit_bias)} tokens> is not allowed: give at most {MAX_BIASED}"
        for token_id, bias in self.logit_bias:
            if not abs(bias) <= MAX_LOGIT_BIAS:
                return f"logit_bias={bias} of token {token_id} is not allowed: give a number from -100 to 100"
        if len(self.stop) > MAX_STOPS:
            return f"stop=<{len(self.stop)} strings> is not allowed: give at most {MAX_STOPS}"
        for text in self.stop:
            if not 0 < len(text) <= MAX_STOP_CHARACTERS:
                return f"stop=<{len(text)} characters> is not allowed: give 1 to {MAX_STOP_CHARACTERS}"
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_LOGPROBS:
                return f"{name}={value} is not allowed: give 0 to {MAX_LOGPROBS}, or None"
        if not 1 <= self.n <= MAX_N:
            return f"n={self.n} is not allowed: give 1 to {MAX_N}"
        if self.scored_from < 1:
            return f"scored_from={self.scored_from} is not allowed: give 1 or more, the first token has no logprob"
        return None
