"""How a request's tokens are drawn, under vLLM's names."""

from __future__ import annotations

import contextlib
import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexgen_lite.text.shown import shown
from flexgen_lite.wire.sampling import NUMBERS, WHOLE_NUMBERS, WireParams, allows

MAX_TOKEN_ID = (1 << 31) - 1
_MAX_EXACT = 1 << 53  # floating-point numbers up to there are what was written
_OPTIONAL = ("seed", "logprobs", "prompt_logprobs")


def whole_number(name: str, value: object, low: int, high: int) -> int:
    """The value as an int; NumPy's whole numbers are taken too, True and False are none.

    Raises:
        ValueError: it is none, or out of bounds.
    """
    number = as_int(value)
    if number is None or not low <= number <= high:
        raise ValueError(
            f"{name}={shown(value)} is not allowed: give a whole number from {low} to {high}{_hint(value)}"
        )
    return number


def as_int(value: Any) -> int | None:
    """A whole number of whatever library, or None. An array is none, though one of a single element would pass."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__") or bool(getattr(value, "ndim", None)):
        return None
    with contextlib.suppress(TypeError, ValueError):  # a tensor of other numbers has __index__ too
        return operator.index(value)
    return None


def _hint(value: object) -> str:
    """What is wrong with the way in which a good number is written."""
    if isinstance(value, bool):
        return f", not {value}"
    if isinstance(value, float) and value.is_integer() and abs(value) <= _MAX_EXACT:
        return f", written as {int(value)}"
    if isinstance(value, str) and value.lstrip("-").replace(".", "", 1).isdecimal():
        return ", without quotation marks"
    return ""


def _require_bool(name: str, value: object) -> None:
    if type(value) is not bool:
        raise ValueError(f"{name}={shown(value)} is not allowed: give True or False")


def _number(name: str, value: object) -> float:
    number = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # a whole number beyond all floating-point ones
            number = float(value)
    if not math.isfinite(number) or not allows(name, number):
        raise ValueError(f"{name}={shown(value)} is not allowed: give {NUMBERS[name]}{_hint(value)}")
    return number


def _require_bias(value: object) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"logit_bias={shown(value)} is not allowed: give token ids and what is added to their logits")
    return {
        whole_number("logit_bias", token_id, 0, MAX_TOKEN_ID): _number("logit_bias", bias)
        for token_id, bias in value.items()
    }


def _require_strings(name: str, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, list | tuple) or not all(isinstance(text, str) for text in strings):
        raise ValueError(f"{name}={shown(value)} is not allowed: give a string or a list of strings")
    for text in strings:
        if any(0xD800 <= ord(character) < 0xE000 for character in text):
            raise ValueError(f"{name}={shown(text)} has characters that are not Unicode text")
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
        for name in ("max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs", "n"):
            if (value := getattr(self, name)) is not None or name not in _OPTIONAL:
                low, high = WHOLE_NUMBERS[name]
                self._set(name, whole_number(name, value, -1 if name == "top_k" else low, high))
        for name in NUMBERS:
            if name != "logit_bias":
                self._set(name, _number(name, getattr(self, name)))
        if not isinstance(self.stop_token_ids, list | tuple):
            raise ValueError(f"stop_token_ids={shown(self.stop_token_ids)} is not allowed: give a list of token ids")
        ids = (whole_number("stop_token_ids", token_id, 0, MAX_TOKEN_ID) for token_id in self.stop_token_ids)
        self._set("stop_token_ids", tuple(ids))
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            _require_bool(name, getattr(self, name))
        self._set("logit_bias", _require_bias(self.logit_bias))
        self._set("stop", _require_strings("stop", self.stop))
        wrong = self.to_wire().problem()
        if wrong is not None:
            raise ValueError(wrong)

    def _set(self, name: str, value: object) -> None:
        """In the form of the wire, once."""
        object.__setattr__(self, name, value)

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
