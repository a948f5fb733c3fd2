"""POST /v1/completions and /v1/chat/completions, whole and as streams of server-sent events."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from flexgen_lite.chat.template import Chat, ChatError, brings_program, has_template
from flexgen_lite.client.client import Client
from flexgen_lite.client.completion import Completion, Delta
from flexgen_lite.client.request import Request
from flexgen_lite.client.streamed_answer import OTHERWISE
from flexgen_lite.http.errors import ApiError
from flexgen_lite.http.job_events import job_events
from flexgen_lite.http.json_body import read_json
from flexgen_lite.http.json_response import JsonResponse
from flexgen_lite.openai.request_body import CHAT, COMPLETIONS, Body, BodyError, parse_body
from flexgen_lite.openai.response_body import ID_PREFIXES, chat_logprobs, response_body, text_logprobs
from flexgen_lite.text.json_text import json_line
from flexgen_lite.text.shown import shown_json

OWN_TEMPLATE = (
    "chat_template is a program, which is not taken over HTTP: leave it out, or name one of the model's own templates"
)
MAX_PROMPTS = 2048  # of one request


class Generation:
    """The two endpoints.

    Args:
        client: of the engine.
        check_model: raises ApiError for a name that is not the model's.
        model: its name in answers.
    """

    def __init__(self, client: Client, check_model: Callable[[str | None], None], model: str) -> None:
        self._client = client
        self._check_model = check_model
        self._model = model

    async def completions(self, caller: HttpRequest) -> Response:
        return await self._answer(COMPLETIONS, caller)

    async def chat(self, caller: HttpRequest) -> Response:
        return await self._answer(CHAT, caller)

    async def _answer(self, url: str, caller: HttpRequest) -> Response:
        body = await read_json(caller)
        stream, with_usage = _stream_options(body)
        bodies = _bodies(url, body)
        self._check_model(bodies[0].model)
        if stream and any(one.params.prompt_logprobs is not None for one in bodies):
            raise ApiError(400, "prompt_logprobs is not supported in a stream: leave stream out", "stream")
        if stream and any(one.echo and not isinstance(one.prompt, str) for one in bodies):
            raise ApiError(400, "echo of token ids is not supported in a stream: leave stream out", "stream")
        template = self._client.welcome.chat_template
        if url == CHAT and not has_template(template):
            raise ApiError(400, f"the model has no chat template: use {COMPLETIONS}", "messages")
        if any(isinstance(one.prompt, Chat) and brings_program(one.prompt, template) for one in bodies):
            raise ApiError(400, OWN_TEMPLATE, "chat_template")
        try:
            requests = [self._client.request_of(b.prompt, b.params, echo=b.echo, stream=stream) for b in bodies]
        except ChatError as error:
            raise ApiError(400, str(error), "messages") from None
        if not stream:
            return JsonResponse(await self._whole(bodies, requests, caller))
        events = job_events(self._client, requests, caller)
        first = await anext(events, None)  # what is refused at once is told by the status
        if isinstance(first, Completion) and first.error is not None:
            raise ApiError(400, first.error)
        sse = _Sse(url, bodies, self._model, with_usage)
        return StreamingResponse(sse.chunks(first, events), media_type="text/event-stream")

    async def _whole(self, bodies: list[Body], requests: list[Request], caller: HttpRequest) -> dict[str, Any]:
        found: dict[int, Completion] = {}
        async for event in job_events(self._client, requests, caller):
            if isinstance(event, Completion):
                if event.error is not None:
                    raise ApiError(503 if event.error == OTHERWISE else 400, event.error)
                found[event.index] = event
        if len(found) < len(requests):
            raise ApiError(499, "the caller is gone")
        answers = [response_body(body, found[index], self._model) for index, body in enumerate(bodies)]
        choices = [choice for answer in answers for choice in answer["choices"]]
        for index, choice in enumerate(choices):
            choice["index"] = index
        total = {name: sum(answer["usage"][name] for answer in answers) for name in answers[0]["usage"]}
        return {"id": _new_id(answers[0]["object"]), **answers[0], "choices": choices, "usage": total}


class _Sse:
    """Chunks of one answer."""

    def __init__(self, url: str, bodies: list[Body], model: str, with_usage: bool) -> None:
        self._is_chat = url == CHAT
        self._bodies = bodies
        self._with_usage = with_usage
        kind = "chat.completion" if self._is_chat else "text_completion"
        self._head = {
            "id": _new_id(kind),
            "object": f"{kind}.chunk" if self._is_chat else kind,
            "created": int(time.time()),
            "model": model,
        }
        self._begun: set[tuple[int, int]] = set()  # prompt and answer, as below
        self._usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}

    async def chunks(
        self, first: Delta | Completion | None, rest: AsyncIterator[Delta | Completion]
    ) -> AsyncIterator[str]:
        try:
            async for event in _chain(first, rest):
                if isinstance(event, Delta):
                    for choice in self._choices(event):
                        yield _line({**self._head, "choices": [choice]})
                elif event.error is not None:
                    raise ApiError(503 if event.error == OTHERWISE else 400, event.error)
                else:
                    generated = sum(len(output.token_ids) for output in event.outputs)
                    self._usage["prompt_tokens"] += event.num_prompt_tokens
                    self._usage["completion_tokens"] += generated
                    self._usage["total_tokens"] += event.num_prompt_tokens + generated
            if self._with_usage:
                yield _line({**self._head, "choices": [], "usage": self._usage})
        except ApiError as error:
            yield _line(error.body())
            return
        yield "data: [DONE]\n\n"

    def _choices(self, delta: Delta) -> list[dict[str, Any]]:
        """Of a chat, the first one names the role; with echo, that of a text is the prompt."""
        body = self._bodies[delta.index]
        base: dict[str, Any] = {"index": delta.index * body.params.n + delta.number, "finish_reason": None}
        base["logprobs"] = None
        choices = []
        if (delta.index, delta.number) not in self._begun:
            self._begun.add((delta.index, delta.number))
            if self._is_chat:
                choices.append({**base, "delta": {"role": "assistant", "content": ""}})
            elif body.echo:
                choices.append({**base, "text": body.prompt})
        choice = {**base, "finish_reason": delta.finish_reason}
        raw = delta.token_bytes
        if self._is_chat:
            choice["logprobs"] = chat_logprobs(delta.token_ids, delta.logprobs, body.params.logprobs, raw)
        elif delta.logprobs is not None:
            choice["logprobs"] = text_logprobs(delta.token_ids, delta.logprobs, delta.text_offsets or (), {}, raw)
        if body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        choice |= {"delta": {"content": delta.text}} if self._is_chat else {"text": delta.text}
        return [*choices, choice]


async def _chain(
    first: Delta | Completion | None, rest: AsyncIterator[Delta | Completion]
) -> AsyncIterator[Delta | Completion]:
    if first is not None:
        yield first
    async for event in rest:
        yield event


def _stream_options(body: dict[str, Any]) -> tuple[bool, bool]:
    """(as a stream, with the usage at its end); takes them out of the body."""
    stream, options = body.pop("stream", None) or False, body.pop("stream_options", None) or {}
    if type(stream) is not bool:
        raise ApiError(400, f"stream is {shown_json(stream)}: give true or false", "stream")
    if not isinstance(options, dict) or not options.keys() <= {"include_usage"}:
        raise ApiError(400, "stream_options: only include_usage is supported", "stream_options")
    if stream and body.get("echo") and body.get("logprobs") is not None:
        raise ApiError(400, "echo with logprobs is not supported in a stream: leave stream out", "stream")
    return stream, bool(options.get("include_usage", False))


def _bodies(url: str, body: dict[str, Any]) -> list[Body]:
    """One for each prompt: the completions API takes several at once."""
    prompts = body.get("prompt")
    try:
        if url == COMPLETIONS and isinstance(prompts, list) and prompts and not isinstance(prompts[0], int):
            if len(prompts) > MAX_PROMPTS:
                raise ApiError(400, f"{len(prompts)} prompts, {MAX_PROMPTS} allowed: use a batch", "prompt")
            return [parse_body(url, {**body, "prompt": prompt}) for prompt in prompts]
        return [parse_body(url, body)]
    except BodyError as error:
        raise ApiError(400, str(error)) from None


def _line(chunk: dict[str, Any]) -> str:
    return f"data: {json_line(chunk)}\n\n"


def _new_id(kind: str) -> str:
    return f"{ID_PREFIXES[kind]}-{os.urandom(12).hex()}"
