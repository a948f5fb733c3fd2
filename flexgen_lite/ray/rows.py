"""What a row of a dataset asks of the engine."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flexgen_lite.chat.template import Chat
from flexgen_lite.client.completion import Prompt
from flexgen_lite.client.request import Request
from flexgen_lite.client.sampling_params import CHAT_PARAMS, GREEDY, SamplingParams
from flexgen_lite.text.shown import shown_kind, shown_names

PROMPT, TOKENS, MESSAGES, PARAMS = "prompt", "tokenized_prompt", "messages", "sampling_params"
ERROR = "__inference_error__"
READ = (PROMPT, TOKENS, MESSAGES, PARAMS)
"""Columns that say what is asked; a dataset has some of them."""
ASKED = "__asked__"
"""A column that has them as `pack` does, in the place of those."""
_PARAMS = frozenset(field.name for field in dataclasses.fields(SamplingParams))


@dataclass(frozen=True, slots=True)
class RowReader:
    """
    Attributes:
        request_of: as Client has it.
        applies_template: to `messages`.
        chat_template: instead of the model's own; None: that.
        template_kwargs: further variables of the template.
    """

    request_of: Callable[[Prompt | Chat, SamplingParams], Request]
    applies_template: bool = True
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def request(self, row: Mapping[str, Any], seed: Callable[[], int]) -> Request:
        """
        Args:
            row: what it has in the columns READ.
            seed: makes one for it, where its tokens are drawn and it has none.

        Raises:
            ValueError, TypeError: the row asks for nothing that could be done; the message names column and value.
        """
        given = row.get(PARAMS)
        asked = self._asked(row)
        params = (CHAT_PARAMS if isinstance(asked, Chat) else GREEDY) if given is None else params_of(given)
        if params.n != 1:
            raise ValueError(
                f"{PARAMS}: n={params.n}: a row has room for one answer; give the row as often as wanted, each with a "
                "seed or a number of its own in a column"
            )
        if params.temperature > 0 and params.seed is None:
            params = dataclasses.replace(params, seed=seed())
        request = self.request_of(asked, params)
        request.to_wire(0)  # what is wrong with it is found here, where it is known whose it is
        return request

    def _asked(self, row: Mapping[str, Any]) -> Prompt | Chat:
        messages, tokens, prompt = (row.get(name) for name in (MESSAGES, TOKENS, PROMPT))
        if messages is not None and self.applies_template:
            return self._chat(messages)
        if isinstance(tokens, str):
            raise TypeError(f"{TOKENS} is a text: give token ids, or the text as {PROMPT}")
        found = prompt if tokens is None else tokens
        if found is None:
            wanted = f"{PROMPT}, {TOKENS} or {MESSAGES}" if self.applies_template else f"{PROMPT} or {TOKENS}"
            raise ValueError(f"the row has no prompt: give {wanted}")
        return found  # type: ignore[no-any-return]

    def _chat(self, messages: Any) -> Chat:
        """As in `ray.data.llm`, what the assistant has begun is gone on with; otherwise an answer follows."""
        messages = plain(messages)
        if not isinstance(messages, list | tuple):
            raise TypeError(f"{MESSAGES} is {shown_kind(messages)}: give a list of messages with a role and content")
        if not messages:
            raise ValueError(f"{MESSAGES} is empty: give at least one message with a role and content")
        last = messages[-1]
        answers = not isinstance(last, Mapping) or last.get("role") != "assistant"
        return Chat(
            messages,
            template_kwargs=self.template_kwargs,
            chat_template=self.chat_template,
            add_generation_prompt=answers,
            continue_final_message=not answers,
            join_parts=True,
        )


def error_in(row: Mapping[str, Any]) -> str:
    """Why the row has failed already; empty where it has not."""
    error = row.get(ERROR)
    return error if isinstance(error, str) else ""  # a table of pandas has NaN for nothing


def pack(asked: Mapping[str, Any]) -> bytes:
    return pickle.dumps(dict(asked))


def unpack(packed: bytes | None) -> dict[str, Any]:
    """Of what another process of the same job has packed."""
    return pickle.loads(packed) if packed else {}


def params_of(given: object) -> SamplingParams:
    """What a row has as `sampling_params`. In a column of a table every row has the keys of all: those that are null
    were not given.

    Raises:
        TypeError, ValueError: it is none, or has a key or a value that is not allowed.
    """
    if isinstance(given, SamplingParams):
        return given
    if not isinstance(given, Mapping):
        raise TypeError(f"{PARAMS} is {shown_kind(given)}: give a dict, such as {{'max_tokens': 64, 'temperature': 0}}")
    values = {str(key): plain(value) for key, value in given.items() if value is not None}
    if unknown := sorted(values.keys() - _PARAMS):
        raise ValueError(f"{PARAMS}: {shown_names(unknown)}: not supported; supported are {', '.join(sorted(_PARAMS))}")
    if isinstance(bias := values.get("logit_bias"), Mapping):
        values["logit_bias"] = {_token_id(key): value for key, value in bias.items() if value is not None}
    return SamplingParams(**values)


def plain(value: Any) -> Any:
    """With lists for arrays, which Ray makes of lists in batches."""
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return {key: plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _token_id(key: Any) -> Any:
    """A table has no numbers as keys."""
    return int(key) if isinstance(key, str) and key.isdecimal() else key
