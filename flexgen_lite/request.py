"""What is asked of the engine for one prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flexgen_lite.client_messages import WireRequest
from flexgen_lite.completion import Prompt
from flexgen_lite.sampling_params import MAX_TOKEN_ID, SamplingParams

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
            ValueError, TypeError: the prompt is none; `index` names it in the message.
        """
        params = self.params.to_wire()
        if self.scored_from != 1:
            params = replace(params, scored_from=self.scored_from)
        prompt, context = _wire_prompt(index, self.prompt), -1 if self.context is None else self.context
        return WireRequest(index, prompt, params, self.echo, self.add_special_tokens, context, self.stream)


def _wire_prompt(index: int, prompt: object) -> str | tuple[int, ...]:
    if isinstance(prompt, str | list | tuple) and len(prompt) > MAX_PROMPT_UNITS:
        unit = "characters" if isinstance(prompt, str) else "tokens"
        raise ValueError(f"prompt {index} has {len(prompt)} {unit}, {MAX_PROMPT_UNITS} allowed: no model takes as many")
    if isinstance(prompt, str):
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ValueError(f"prompt {index} has characters that are not Unicode text") from None
        return prompt
    if isinstance(prompt, list | tuple):
        for token_id in prompt:
            if type(token_id) is not int or not 0 <= token_id <= MAX_TOKEN_ID:
                raise ValueError(f"prompt {index} has {token_id!r} among its token ids: give whole numbers from 0 up")
        return tuple(prompt)
    raise TypeError(f"prompt {index} is a {type(prompt).__name__}: give a string or a list of token ids")
