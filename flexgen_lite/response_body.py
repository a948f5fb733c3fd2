"""Answers in the form of the OpenAI API's completions and chat completions."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from flexgen_lite.chat_template import Chat
from flexgen_lite.completion import Completion, CompletionOutput, Logprob, Prompt
from flexgen_lite.sampling_params import SamplingParams

ID_PREFIXES = {"text_completion": "cmpl", "chat.completion": "chatcmpl"}
Places = Sequence[Mapping[int, Logprob] | None]


class Asked(Protocol):
    """What a request was, as far as its answer depends on it."""

    @property
    def prompt(self) -> Prompt | Chat: ...

    @property
    def params(self) -> SamplingParams: ...

    @property
    def return_token_ids(self) -> bool: ...

    @property
    def echo(self) -> bool: ...


def response_body(asked: Asked, completion: Completion, model: str) -> dict[str, Any]:
    """The body of a good answer, but for its id."""
    is_chat = isinstance(asked.prompt, Chat)
    return {
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            (_chat_choice if is_chat else _choice)(index, asked, completion, output)
            for index, output in enumerate(completion.outputs)
        ],
        "usage": usage(completion),
    }


def usage(completion: Completion) -> dict[str, int]:
    prompt_tokens = completion.num_prompt_tokens
    completion_tokens = sum(len(output.token_ids) for output in completion.outputs)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _choice(index: int, asked: Asked, completion: Completion, output: CompletionOutput) -> dict[str, Any]:
    tokens, places = list(output.token_ids), list[Mapping[int, Logprob] | None](output.logprobs or [])
    text = output.text
    if asked.echo:
        text = echoed(completion) + text
        if output.logprobs is not None:
            tokens = [*(completion.prompt_token_ids or ()), *tokens]
            places = [*(completion.prompt_logprobs or ()), *places]
    choice: dict[str, Any] = {
        "index": index,
        "text": text,
        "finish_reason": output.finish_reason,
        "logprobs": None if output.logprobs is None else text_logprobs(tokens, places, completion.token_texts),
    }
    return choice | _extras(asked, completion, output)


def _chat_choice(index: int, asked: Asked, completion: Completion, output: CompletionOutput) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": index,
        "message": {"role": "assistant", "content": output.text},
        "finish_reason": output.finish_reason,
        "logprobs": chat_logprobs(output.token_ids, output.logprobs, asked.params.logprobs),
    }
    return choice | _extras(asked, completion, output)


def _extras(asked: Asked, completion: Completion, output: CompletionOutput) -> dict[str, Any]:
    """What vLLM adds to the API's own fields, for those who asked."""
    extras: dict[str, Any] = {}
    if asked.params.prompt_logprobs is not None and not asked.echo:
        extras["prompt_logprobs"] = [
            None if place is None else {str(token): asdict(found) for token, found in place.items()}
            for place in completion.prompt_logprobs or ()
        ]
    if asked.return_token_ids:
        extras["token_ids"] = output.token_ids
    return extras


def echoed(completion: Completion) -> str:
    """The prompt's text."""
    return completion.prompt if isinstance(completion.prompt, str) else completion.prompt_text or ""


def text_logprobs(
    tokens: Sequence[int], places: Places, token_texts: Mapping[int, str], offset: int = 0
) -> dict[str, Any]:
    """In the form of the completions API; the first token of a prompt has no logprob. `offset`: characters of the
    tokens before."""
    texts: list[str] = []
    values: list[float | None] = []
    top: list[dict[str, float] | None] = []
    offsets = []
    for token, place in zip(tokens, places, strict=False):
        texts.append(place[token].decoded_token if place is not None else token_texts.get(token, ""))
        values.append(place[token].logprob if place is not None else None)
        top.append(None if place is None else {found.decoded_token: found.logprob for found in place.values()})
        offsets.append(offset)
        offset += len(texts[-1])
    return {"tokens": texts, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}


def chat_logprobs(
    tokens: Sequence[int], places: Sequence[Mapping[int, Logprob]] | None, num_top: int | None
) -> dict[str, Any] | None:
    """In the form of the chat API, with the `num_top` most likely tokens of each place."""
    if places is None:
        return None
    content = []
    for token, place in zip(tokens, places, strict=False):
        entry = _chat_entry(place[token])
        top = sorted(place.values(), key=lambda found: found.rank)
        entry["top_logprobs"] = [_chat_entry(found) for found in top if found.rank <= (num_top or 0)]
        content.append(entry)
    return {"content": content}


def _chat_entry(found: Logprob) -> dict[str, Any]:
    text = found.decoded_token
    return {"token": text, "logprob": found.logprob, "bytes": list(text.encode())}
