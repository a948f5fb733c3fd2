"""How a request's tokens are drawn, under vLLM's names."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexgen_lite.sampling_wire import WireParams

_MAX_INT = (1 << 63) - 1
MAX_TOKEN_ID = (1 << 31) - 1


def _require_int(name: str, value: object, low: int, high: int = _MAX_INT) -> None:
    if type(value) is not int or not low <= value <= high:
        limit = f"from {low} up" if high == _MAX_INT else f"from {low} to {high}"
        raise ValueError(f"{name}={value!r} is not allowed: give a whole number {limit}")


def _require_bool(name: str, value: object) -> None:
    if type(value) is not bool:
        raise ValueError(f"{name}={value!r} is not allowed: give True or False")


def _require_float(name: str, value: object) -> float:
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # a whole number beyond all floating-point ones
            number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name}={value!r:.60} is not allowed: give a finite number")
    return number


def _require_bias(value: object) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"logit_bias={value!r} is not allowed: give token ids and what is added to their logits")
    for token_id in value:
        _require_int("logit_bias", token_id, 0, MAX_TOKEN_ID)
    return {token_id: _require_float("logit_bias", bias) for token_id, bias in value.items()}


def _require_strings(name: str, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, list | tuple) or not all(isinstance(text, str) for text in strings):
        raise ValueError(f"{name}={value!r} is not allowed: give a string or a list of strings")
    for text in strings:
        if any(0xD800 <= ord(character) < 0xE000 for character in text):
            raise ValueError(f"{name}={text!r} has characters that are not Unicode text")
    return tuple(strings)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to generate the tokens of one request.

    Attributes:
        max_tokens: most tokens to generate; 0 only with prompt_logprobs.
        min_tokens: no end of sequence and no stop token before so many tokens.
        temperature: 0 is greedy, 1 the model's own distribution.
        top_k: draw among the k most likely tokens; 0 and -1 mean all.
        top_p: draw among the most likely tokens that together have this probability, above 0 and up to 1.
        seed: makes the draw repeatable, whatever else is in the batch; None lets the engine choose.
        min_p: draw among tokens at least this many times as likely as the most likely one; 0 means all.
        repetition_penalty: above 1, tokens of the prompt and of what was generated become less likely: positive logits
            are divided by it, negative ones multiplied.
        presence_penalty: taken off the logit of every token generated so far, from -2 to 2.
        frequency_penalty: the same for each time that it was generated.
        logit_bias: token id -> what is added to its logit, from -100 to 100; up to 1,024 of them.
        stop: a string, or several, that end the text; the first one is where it is cut.
        include_stop_str_in_output: leave the string in the text.
        stop_token_ids: tokens that end the sequence besides the model's own.
        ignore_eos: go on after the model's end of sequence.
        skip_special_tokens: leave special tokens out of the text.
        logprobs: tell the logprob of each generated token, and so many of the most likely ones, up to 20, by the
            model's own logits, before anything above changes them. None: no logprobs.
        n: answers to generate for each prompt; with a seed, the k-th is drawn with the seed + k.
        prompt_logprobs: the same as logprobs for each token of the prompt but the first. Then max_tokens may be 0.

    Raises:
        ValueError: a value is not allowed; the message names it and what would be.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    stop: str | Sequence[str] | None = None
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    n: int = 1
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        _require_int("max_tokens", self.max_tokens, 0)
        _require_int("min_tokens", self.min_tokens, 0)
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}: lower it or raise max_tokens"
            )
        temperature = _require_float("temperature", self.temperature)
        if temperature < 0:
            raise ValueError(f"temperature={self.temperature!r} is not allowed: give 0 (greedy) or more")
        _require_int("top_k", self.top_k, -1)
        top_p = _require_float("top_p", self.top_p)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p={self.top_p!r} is not allowed: give a number above 0 and up to 1")
        if self.seed is not None:
            _require_int("seed", self.seed, 0)
        if not isinstance(self.stop_token_ids, list | tuple):
            raise ValueError(f"stop_token_ids={self.stop_token_ids!r} is not allowed: give a list of token ids")
        for token_id in self.stop_token_ids:
            _require_int("stop_token_ids", token_id, 0, MAX_TOKEN_ID)
        _require_bool("ignore_eos", self.ignore_eos)
        _require_bool("skip_special_tokens", self.skip_special_tokens)
        _require_bool("include_stop_str_in_output", self.include_stop_str_in_output)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _require_int(name, getattr(self, name), 0)
        _require_int("n", self.n, 1)
        object.__setattr__(self, "temperature", temperature)
        object.__setattr__(self, "top_p", top_p)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for name in ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            object.__setattr__(self, name, _require_float(name, getattr(self, name)))
        object.__setattr__(self, "logit_bias", _require_bias(self.logit_bias))
        object.__setattr__(self, "stop", _require_strings("stop", self.stop))
        wrong = self.to_wire().problem()
        if wrong is not None:
            raise ValueError(wrong)

    def to_wire(self) -> WireParams:
        """The form that a request carries them in."""
        return WireParams(
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            seed=self.seed,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple(sorted((self.logit_bias or {}).items())),
            stop=tuple(self.stop or ()),
            include_stop_str_in_output=self.include_stop_str_in_output,
            logprobs=self.logprobs,
            n=self.n,
            prompt_logprobs=self.prompt_logprobs,
        )


GREEDY = SamplingParams(temperature=0.0)
"""What requests without SamplingParams get: the most likely token each time, 16 tokens."""
CHAT_PARAMS = SamplingParams(temperature=0.0, max_tokens=256)
"""What conversations without SamplingParams get."""
