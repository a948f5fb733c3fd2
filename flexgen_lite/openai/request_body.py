"""The bodies of completion and chat requests, as the OpenAI API has them, with vLLM's further parameters."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from flexgen_lite.chat.data import medium_of
from flexgen_lite.chat.template import Chat
from flexgen_lite.client.completion import Prompt
from flexgen_lite.client.request import MAX_PROMPT_UNITS
from flexgen_lite.client.sampling_params import MAX_TOKEN_ID, SamplingParams, whole_number
from flexgen_lite.text.shown import shown_json, shown_names
from flexgen_lite.wire.sampling import MAX_INT, MAX_LOGPROBS

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
URLS = (COMPLETIONS, CHAT)
CHAT_MAX_TOKENS = 256  # where a chat request does not say

_PARAMS = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "stop",
    "include_stop_str_in_output",
    "logprobs",
    "n",
    "prompt_logprobs",
)
_ANY = ("model", "return_token_ids", "user", *_PARAMS)
_KNOWN = {
    COMPLETIONS: frozenset({"prompt", "echo", *_ANY}),
    CHAT: frozenset(
        {
            "messages",
            "max_completion_tokens",
            "top_logprobs",
            "tools",
            "chat_template",
            "chat_template_kwargs",
            "add_generation_prompt",
            "continue_final_message",
            *_ANY,
        }
    ),
}


class BodyError(ValueError):
    """A body that is no request; the message says why."""


@dataclass(frozen=True, slots=True)
class Body:
    """What a body asks for. `model` is what it names, if it does."""

    prompt: Prompt | Chat
    params: SamplingParams
    return_token_ids: bool
    model: str | None
    echo: bool


def parse_body(url: str, body: dict[str, Any], where: str = "") -> Body:
    """
    Args:
        url: one of URLS.
        body: of the request.
        where: what to put in front of names in messages.

    Raises:
        BodyError: it cannot be served; the message names the field, its value and what would be allowed.
    """
    refuse_unknown(where, body, _KNOWN[url])
    body = {key: value for key, value in body.items() if value is not None}
    for name in ("model", "user"):
        if not isinstance(body.get(name, ""), str):
            raise BodyError(f"{where}{name} is not a string")
    for name in ("return_token_ids", "echo", "add_generation_prompt"):
        if type(body.get(name, False)) is not bool:
            raise BodyError(f"{where}{name} is {shown_json(body[name])}: give true or false")
    if not isinstance(goes_on := body.get("continue_final_message", False), bool | str):
        given = shown_json(goes_on)
        raise BodyError(f"{where}continue_final_message is {given}: give true, false, or the key of a text")
    if url == CHAT:
        _from_chat_names(where, body)
    if body.get("echo") and "logprobs" in body:
        body.setdefault("prompt_logprobs", body["logprobs"])
    if "logit_bias" in body:
        body["logit_bias"] = _logit_bias(where, body["logit_bias"])
    try:
        params = SamplingParams(**{key: body[key] for key in _PARAMS if key in body})
    except ValueError as error:
        raise BodyError(f"{where}{error}") from None
    prompt = _chat(where, body) if url == CHAT else parse_prompt(where, body.get("prompt"))
    return Body(prompt, params, body.get("return_token_ids", False), body.get("model"), body.get("echo", False))


def refuse_unknown(where: str, given: dict[str, Any], known: frozenset[str]) -> None:
    unknown = sorted(given.keys() - known)
    if unknown:
        names = shown_names(where + name for name in unknown)
        raise BodyError(f"{names}: not supported; supported are {', '.join(sorted(known))}")


def parse_prompt(where: str, prompt: object) -> Prompt:
    """A text or a list of token ids."""
    if isinstance(prompt, str | list) and len(prompt) > MAX_PROMPT_UNITS:
        unit = "characters" if isinstance(prompt, str) else "tokens"
        raise BodyError(f"{where}prompt has {len(prompt)} {unit}, {MAX_PROMPT_UNITS} allowed")
    if isinstance(prompt, str):
        _check_text(f"{where}prompt", prompt)
        return prompt
    if not isinstance(prompt, list):
        raise BodyError(f"{where}prompt is missing or neither a string nor a list of token ids")
    for token_id in prompt:
        if type(token_id) is not int or not 0 <= token_id <= MAX_TOKEN_ID:
            raise BodyError(
                f"{where}prompt has {shown_json(token_id)} among its token ids: give whole numbers from 0 to "
                f"{MAX_TOKEN_ID}"
            )
    return prompt


def _from_chat_names(where: str, body: dict[str, Any]) -> None:
    """The chat API's names for what the completions API calls otherwise."""
    if "max_completion_tokens" in body:
        if "max_tokens" in body:
            raise BodyError(f"{where}max_tokens and {where}max_completion_tokens are the same: give one of them")
        least, given = 0 if "prompt_logprobs" in body else 1, body.pop("max_completion_tokens")
        body["max_tokens"] = _whole(where, "max_completion_tokens", given, least, MAX_INT)
    body.setdefault("max_tokens", CHAT_MAX_TOKENS)
    wanted, top = body.pop("logprobs", False), body.pop("top_logprobs", None)
    if type(wanted) is not bool:
        raise BodyError(f"{where}logprobs is {shown_json(wanted)}: give true or false, and top_logprobs")
    if top is not None and not wanted:
        raise BodyError(f"{where}top_logprobs needs {where}logprobs to be true")
    if wanted:
        body["logprobs"] = 0 if top is None else _whole(where, "top_logprobs", top, 0, MAX_LOGPROBS)


def _whole(where: str, name: str, value: object, low: int, high: int) -> int:
    """A number that is refused by the name that it was given."""
    try:
        return whole_number(name, value, low, high)
    except ValueError as error:
        raise BodyError(f"{where}{error}") from None


def _chat(where: str, body: dict[str, Any]) -> Chat:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BodyError(f"{where}messages is missing or not a list of messages")
    for index, message in enumerate(messages):
        name = f"{where}messages[{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BodyError(f"{name} is not an object with a role")
        _check_text(name, json.dumps(message, ensure_ascii=False))
        _check_parts(name, message.get("content"))
    tools, variables = body.get("tools"), body.get("chat_template_kwargs", {})
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BodyError(f"{where}tools is {shown_json(tools)}: give a list of objects")
    if not isinstance(variables, dict):
        raise BodyError(f"{where}chat_template_kwargs is {shown_json(variables)}: give an object")
    if not isinstance(body.get("chat_template", ""), str):
        raise BodyError(f"{where}chat_template is not a string")
    return Chat(
        messages,
        tools,
        variables,
        body.get("chat_template"),
        body.get("add_generation_prompt", True),
        body.get("continue_final_message", False),
        join_parts=True,
    )


def _check_parts(name: str, parts: object) -> None:
    """Of content that comes in parts."""
    if not isinstance(parts, list):
        return
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if any(not isinstance(text, str) for text in texts):
        kind = medium_of(parts)
        what = "another type than text" if kind is None else f"the type {kind!r}"
        raise BodyError(f"{name} has content of {what}: only text can be given")


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BodyError(f"{name} has characters that are not Unicode text") from None


def _logit_bias(where: str, value: object) -> object:
    """JSON has no numbers as keys."""
    if not isinstance(value, dict):
        return value
    try:
        return {int(token_id): bias for token_id, bias in value.items()}
    except ValueError:
        raise BodyError(
            f"{where}logit_bias is {shown_json(value)}: its keys must be token ids, from 0 to {MAX_TOKEN_ID}"
        ) from None
