"""What is asked of the engine for one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from flexgen_lite.client.completion import Prompt
from flexgen_lite.client.sampling_params import MAX_TOKEN_ID, SamplingParams, as_int, whole_number
from flexgen_lite.text.shown import shown, shown_kind
from flexgen_lite.wire.client_messages import WireRequest
from flexgen_lite.wire.sampling import MAX_INT

MAX_PROMPT_UNITS = 8 << 20  # characters or token ids


@dataclass(frozen=True, slots=True)
class Request:
    """
    Attributes:
        prompt: text or token ids.
        params: how to go on from it.
        echo: the completion has the prompt's text and token ids too.
        add_special_tokens: those that the tokenizer puts around a text.
        scored_from: with prompt_logprobs, the first token of the prompt that is scored.
        context: the same for texts, as the characters before it; where there is none, the first token is scored after
            the model's beginning of sequence.
        stream: tell of its tokens as they come.
    """

    prompt: Prompt
    params: SamplingParams
    echo: bool = False
    add_special_tokens: bool = True
    scored_from: int = 1
    context: int | None = None
    stream: bool = False

    def to_wire(self, index: int) -> WireRequest:
        """
        Raises:
            ValueError, TypeError: the prompt, or another value, is none; `index` names the request in the message.
        """
        prompt = wire_prompt(f"prompt {index}", self.prompt)
        if not isinstance(self.params, SamplingParams):
            raise TypeError(f"params of prompt {index} is {shown_kind(self.params)}: give SamplingParams")
        for name in ("echo", "add_special_tokens", "stream"):
            if type(getattr(self, name)) is not bool:
                raise TypeError(f"{name} of prompt {index} is {shown(getattr(self, name))}: give True or False")
        params = self.params.to_wire()
        if self.scored_from != 1:
            params = replace(params, scored_from=whole_number("scored_from", self.scored_from, 1, MAX_INT))
        context = -1 if self.context is None else whole_number("context", self.context, 0, MAX_PROMPT_UNITS)
        return WireRequest(index, prompt, params, self.echo, self.add_special_tokens, context, self.stream)


def wire_prompt(where: str, prompt: object) -> str | tuple[int, ...]:
    """A prompt in the form of the wire.

    Args:
        where: what to call it in a message.
        prompt: a text, or token ids: a sequence of whole numbers of whatever library, or an array of one dimension.

    Raises:
        TypeError: it is neither.
        ValueError: it is too long, no Unicode text, or something else is among its token ids.
    """
    text_or_ids = _plain(prompt)
    if text_or_ids is None:
        raise TypeError(f"{where} is {shown_kind(prompt)}: give a text or a list of token ids")
    if len(text_or_ids) > MAX_PROMPT_UNITS:
        unit = "characters" if isinstance(prompt, str) else "tokens"
        raise ValueError(f"{where} has {len(text_or_ids)} {unit}, {MAX_PROMPT_UNITS} allowed: no model takes as many")
    if isinstance(text_or_ids, str):
        try:
            text_or_ids.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where} has characters that are not Unicode text") from None
        return text_or_ids
    token_ids = []
    for item in text_or_ids:
        token_id = item if type(item) is int else as_int(item)
        if token_id is None or not 0 <= token_id <= MAX_TOKEN_ID:
            raise ValueError(
                f"{where} has {shown(item)} among its token ids: give whole numbers from 0 to {MAX_TOKEN_ID}"
            )
        token_ids.append(token_id)
    return tuple(token_ids)


def is_one_prompt(prompts: object) -> bool:
    """Whether this is a text or a list of token ids, rather than several of them."""
    found = _plain(prompts)
    return isinstance(found, str) or (found is not None and len(found) > 0 and as_int(found[0]) is not None)


def _plain(value: Any) -> str | Sequence[Any] | None:
    """A text, or a sequence that may be of token ids; an array of NumPy, PyTorch or the standard library as a list."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes | bytearray | memoryview):  # their numbers are no token ids
        return None
    found = value.tolist() if hasattr(value, "tolist") else value
    return found if isinstance(found, Sequence) else None
