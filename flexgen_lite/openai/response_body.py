"""Answers in the form of the OpenAI API's completions and chat completions."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from flexgen_lite.chat.template import Chat
from flexgen_lite.client.completion import Completion, CompletionOutput, Logprob, Prompt
from flexgen_lite.client.sampling_params import SamplingParams

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
    prompt = echoed(completion) if asked.echo else ""
    choice: dict[str, Any] = {
        "index": index,
        "text": prompt + output.text,
        "finish_reason": output.finish_reason,
        "logprobs": None,
    }
    if output.logprobs is not None:
        tokens, places = list(output.token_ids), list[Mapping[int, Logprob] | None](output.logprobs)
        offsets = [len(prompt) + offset for offset in output.text_offsets or ()]
        if asked.echo:
            tokens = [*(completion.prompt_token_ids or ()), *tokens]
            places = [*(completion.prompt_logprobs or ()), *places]
            offsets = [*(completion.prompt_offsets or ()), *offsets]
        choice["logprobs"] = text_logprobs(tokens, places, offsets, completion.token_texts, completion.token_bytes)
    return choice | _extras(asked, completion, output)


def _chat_choice(index: int, asked: Asked, completion: Completion, output: CompletionOutput) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": index,
        "message": {"role": "assistant", "content": output.text},
        "finish_reason": output.finish_reason,
        "logprobs": chat_logprobs(output.token_ids, output.logprobs, asked.params.logprobs, completion.token_bytes),
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
    """The prompt's text: as it was given, but where offsets go with it and its tokens have another text, theirs."""
    if isinstance(completion.prompt, str) and completion.prompt_offsets is None:
        return completion.prompt
    return completion.prompt_text or ""


def text_logprobs(
    tokens: Sequence[int],
    places: Places,
    offsets: Sequence[int],
    token_texts: Mapping[int, str],
    token_bytes: Mapping[int, bytes],
) -> dict[str, Any]:
    """In the form of the completions API; the first token of a prompt has no logprob. `offsets`: of each token in the
    text. `token_bytes`: of tokens that are not whole characters."""
    texts: list[str] = []
    values: list[float | None] = []
    top: list[dict[str, float] | None] = []
    for token, place in zip(tokens, places, strict=False):
        if place is None:
            texts.append(_name(token, token_texts.get(token, ""), token_bytes))
            values.append(None)
            top.append(None)
            continue
        texts.append(_name(token, place[token].decoded_token, token_bytes))
        values.append(place[token].logprob)
        top.append(_by_name(token, place, token_bytes))
    return {"tokens": texts, "token_logprobs": values, "top_logprobs": top, "text_offset": list(offsets[: len(texts)])}


def _name(token: int, text: str, token_bytes: Mapping[int, bytes]) -> str:
    """A token's text, or what the completions API writes for one that is not whole characters: "bytes:\\xe9\\xbe"."""
    raw = token_bytes.get(token)
    return text if raw is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _by_name(chosen: int, place: Mapping[int, Logprob], token_bytes: Mapping[int, bytes]) -> dict[str, float]:
    """All of a place's tokens, the chosen one first; of several with the same name, all but the first are named by
    their ids."""
    found: dict[str, float] = {}
    others = sorted((token for token in place if token != chosen), key=lambda token: place[token].rank)
    for token in (chosen, *others):
        name = _name(token, place[token].decoded_token, token_bytes)
        found[f"token_id:{token}" if name in found else name] = place[token].logprob
    return found


def chat_logprobs(
    tokens: Sequence[int],
    places: Sequence[Mapping[int, Logprob]] | None,
    num_top: int | None,
    token_bytes: Mapping[int, bytes],
) -> dict[str, Any] | None:
    """In the form of the chat API, with the `num_top` most likely tokens of each place. `token_bytes`: of tokens that
    are not whole characters."""
    if places is None:
        return None
    content = []
    for token, place in zip(tokens, places, strict=False):
        entry = _chat_entry(token, place[token], token_bytes)
        top = sorted(place.items(), key=lambda item: item[1].rank)
        entry["top_logprobs"] = [
            _chat_entry(other, found, token_bytes) for other, found in top if found.rank <= (num_top or 0)
        ]
        content.append(entry)
    return {"content": content}


def _chat_entry(token: int, found: Logprob, token_bytes: Mapping[int, bytes]) -> dict[str, Any]:
    text = found.decoded_token
    return {"token": text, "logprob": found.logprob, "bytes": list(token_bytes.get(token, text.encode()))}
