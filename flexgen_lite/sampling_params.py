"""How a request's tokens are drawn, under vLLM's names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flexgen_lite.messages import WireParams

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
    if type(value) not in (int, float) or not math.isfinite(value):  # type: ignore[arg-type]
        raise ValueError(f"{name}={value!r} is not allowed: give a finite number")
    return float(value)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to generate the tokens of one request.

    Attributes:
        max_tokens: most tokens to generate.
        min_tokens: no end of sequence and no stop token before so many tokens.
        temperature: 0 is greedy, 1 the model's own distribution.
        top_k: draw among the k most likely tokens; 0 and -1 mean all.
        top_p: draw among the most likely tokens that together have this probability, above 0 and up to 1.
        seed: makes the draw repeatable, whatever else is in the batch; None lets the engine choose.
        stop_token_ids: tokens that end the sequence besides the model's own.
        ignore_eos: go on after the model's end of sequence.
        skip_special_tokens: leave special tokens out of the text.

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

    def __post_init__(self) -> None:
        _require_int("max_tokens", self.max_tokens, 1)
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
        object.__setattr__(self, "temperature", temperature)
        object.__setattr__(self, "top_p", top_p)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))

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
        )


GREEDY = SamplingParams(temperature=0.0)
"""What requests without SamplingParams get: the most likely token each time, 16 tokens."""
