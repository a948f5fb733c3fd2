"""The client of a running engine."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

from flexgen_lite.chat.template import Chat, Messages, render, template_text
from flexgen_lite.client import scoring
from flexgen_lite.client.arguments import (
    check_chat,
    check_job,
    check_params,
    requests_of,
    several_chats,
    several_prompts,
)
from flexgen_lite.client.completion import Delta, Prompt
from flexgen_lite.client.connection import Connection
from flexgen_lite.client.engine_owner import EngineOwner
from flexgen_lite.client.job import Job
from flexgen_lite.client.request import Request, is_one_prompt
from flexgen_lite.client.sampling_params import CHAT_PARAMS, GREEDY, SamplingParams
from flexgen_lite.client.scoring import Score, score_of
from flexgen_lite.text.shown import shown_kind
from flexgen_lite.wire.access import read_key_file
from flexgen_lite.wire.client_messages import Status, Welcome


class Client:
    """Submits requests to the engine at an endpoint. May be used by several threads, for several jobs at once.

    Args:
        endpoint: as `flexgen-lite launch` prints it, "ipc:///..." or "tcp://HOST:PORT".
        connect_timeout: seconds within which the engine must answer.
        heartbeat: after so many seconds of silence the engine is asked whether it is there.
        answer_timeout: after so many seconds without an answer to that the engine is given up.
        epitaph: for the process that started the engine: waits up to so many seconds for it to end and returns its
            last words, or None while it lives.
        key_file: of an engine that was started with one.
        owner: for the process that started the engine and starts it again, instead of the epitaph: jobs go on with
            the engine that follows.

    Raises:
        KeyFileError: the key file cannot be used.
        EngineError: no engine answers there, or it speaks another protocol.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        connect_timeout: float = 30.0,
        heartbeat: float = 15.0,
        answer_timeout: float = 300.0,
        epitaph: Callable[[float], str | None] | None = None,
        key_file: str | Path | None = None,
        owner: EngineOwner | None = None,
    ) -> None:
        if not isinstance(endpoint, str):
            raise TypeError(f"endpoint is {shown_kind(endpoint)}: give ipc:// and a path, or tcp://HOST:PORT")
        self._connection = Connection(
            endpoint,
            connect_timeout=connect_timeout,
            heartbeat=heartbeat,
            answer_timeout=answer_timeout,
            epitaph=epitaph,
            keys=None if key_file is None else read_key_file(Path(key_file)),
            owner=owner,
        )
        self._welcome = self._connection.open()
        self._job_prefix = f"{os.getpid()}-{os.urandom(6).hex()}"
        self._job_numbers = count()
        self._finalizer = weakref.finalize(self, self._connection.close)

    @property
    def welcome(self) -> Welcome:
        """What the engine said of itself: model, longest sequence, window, plan."""
        return self._welcome

    @property
    def outage(self) -> str | None:
        """Why the engine, or any of several, is not there now, while its owner starts it again; None while it is."""
        return self._connection.outage or self._connection.outage_behind

    @property
    def num_in_flight(self) -> int:
        """Requests of all jobs that the engine has and has not answered."""
        return self._connection.num_in_flight

    def submit(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        job_id: str | None = None,
        keep: bool = False,
        priority: int = 0,
    ) -> Job:
        """Submit prompts and return at once.

        The prompts may come from a generator of any length: it is read as the engine takes them, in a thread of its
        own, and no further than `welcome.window` requests ahead of what was read from the job.

        Args:
            prompts: texts, or lists of token ids, which may be arrays; a single one is a job of one request.
            params: for all prompts, or one for each; None is greedy, 16 tokens.
            job_id: a name for the job; by default one that nobody else has.
            keep: the job goes on when this client goes, and the engine keeps its results until `Job.cancel`. Submit it
                again, with the same id, prompts and params, to get all of them: nothing is computed twice. By default a
                job ends with its client.
            priority: jobs with a lower number come first, whoever submits them; what runs already runs on.

        Raises:
            TypeError, ValueError: a prompt or a parameter is none, there are not as many params as prompts, or the
                job_id is not of 1 to 200 characters. What comes out of a generator ends the job with it.
            EngineError: the engine is gone, or the client is closed.
        """
        each, length = several_prompts("prompts", "prompt", prompts)
        requests = requests_of(each, length, GREEDY if params is None else params)
        return self.submit_requests(requests, length, job_id=job_id, keep=keep, priority=priority)

    def submit_requests(
        self,
        requests: Iterable[Request],
        length: int | None = None,
        *,
        job_id: str | None = None,
        keep: bool = False,
        priority: int = 0,
        on_change: Callable[[], None] = lambda: None,
    ) -> Job:
        """Submit requests; `length` is how many, if that is known. See `submit` for the rest.

        `on_change` is called on some thread when there is news of the job; it must not wait.
        """
        priority = check_job(job_id, keep, priority)
        job = Job(
            job_id or f"{self._job_prefix}-{next(self._job_numbers)}",
            requests,
            length,
            max(1, self._welcome.window),
            self._connection.wake,
            self._connection.cancel,
            keep,
            priority,
            on_change,
        )
        self._connection.add(job)
        return job

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0) -> Iterator[Delta]:
        """Generate for one prompt, and tell of its tokens as they come: at the end of each pass through the model.

        Raises:
            TypeError, ValueError: an argument is none; or the request failed.
            EngineError: the engine is gone.
        """
        if not is_one_prompt(prompt):
            raise TypeError(f"prompt is {shown_kind(prompt)}: give one text or one list of token ids")
        request = Request(prompt, GREEDY if params is None else params, stream=True)
        request.to_wire(0)
        return self._stream(request, check_job(None, False, priority))

    def _stream(self, request: Request, priority: int) -> Iterator[Delta]:
        job = self.submit_requests([request], 1, priority=priority)
        try:
            for event in job.events():
                if isinstance(event, Delta):
                    yield event
                elif event.error is not None:
                    raise ValueError(event.error)
        finally:
            job.cancel(wait=False)

    def chat(
        self,
        messages: Messages | Iterable[Messages],
        params: SamplingParams | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        priority: int = 0,
    ) -> Job:
        """Submit conversations, each a list of messages with "role" and "content", and return at once.

        Args:
            messages: one conversation, or several.
            params: for all of them. None is greedy, 256 tokens.
            add_generation_prompt: end each prompt with the beginning of the assistant's answer.
            continue_final_message: end it with the last message as it is, so that it goes on; a string is the key of
                what goes on, such as "reasoning_content", instead of "content".
            chat_template: a Jinja template instead of the model's own, or the name of one of the model's own.
            chat_template_kwargs: further variables of the template, such as documents.
            tools: JSON schemas of functions, for templates that read them. A model that has a template of the name
                "tool_use" uses that with them.
            priority: see `submit`.

        Raises:
            TypeError, ValueError: messages or params are none. What comes out of a generator ends the job with it.
            ChatError: the model has no chat template, or none that can be read; one that is broken, fails, or refuses
                a conversation ends the job with it.
        """
        each, length = several_chats(messages)
        params = CHAT_PARAMS if params is None else params
        check_params("params", params)
        options = (tools, chat_template_kwargs or {}, chat_template, add_generation_prompt, continue_final_message)
        template_text(Chat([], *options), self._welcome.chat_template)

        def requests() -> Iterator[Request]:
            for index, own in enumerate(each):
                check_chat(index, own)
                yield self.request_of(Chat(own, *options), params)

        return self.submit_requests(requests(), length, priority=priority)

    def request_of(
        self, prompt: Prompt | Chat, params: SamplingParams, *, echo: bool = False, stream: bool = False
    ) -> Request:
        """A request for a prompt, or for a conversation by the model's chat template.

        Raises:
            ChatError: there is no template, or it refuses the messages.
        """
        if isinstance(prompt, Chat):
            text = render(prompt, self._welcome.chat_template)
            return Request(text, params, echo, add_special_tokens=False, stream=stream)
        return Request(prompt, params, echo, stream=stream)

    @overload
    def score(  # type: ignore[overload-overlap]
        self, contexts: str | list[int], continuations: str | list[int], *, priority: int = 0
    ) -> Score: ...

    @overload
    def score(
        self, contexts: Iterable[Prompt], continuations: Iterable[Prompt], *, priority: int = 0
    ) -> list[Score]: ...

    def score(
        self, contexts: Prompt | Iterable[Prompt], continuations: Prompt | Iterable[Prompt], *, priority: int = 0
    ) -> Score | list[Score]:
        """How likely each continuation is after its context; nothing is generated.

        Args:
            contexts: texts, or lists of token ids; a text may be empty. A single one for one Score.
            continuations: one for each context, of the same kind.
            priority: see `submit`.

        Raises:
            TypeError, ValueError: there are not as many of the one as of the other, or a pair cannot be scored.
            EngineError: the engine is gone.
        """
        is_one = is_one_prompt(contexts)
        scores = _scores(self.submit_requests(scoring.requests(contexts, continuations), priority=priority))
        return scores[0] if is_one else scores

    @overload
    def loglikelihood(self, texts: str | list[int], *, priority: int = 0) -> Score: ...  # type: ignore[overload-overlap]

    @overload
    def loglikelihood(self, texts: Iterable[Prompt], *, priority: int = 0) -> list[Score]: ...

    def loglikelihood(self, texts: Prompt | Iterable[Prompt], *, priority: int = 0) -> Score | list[Score]:
        """How likely whole texts are, each after the model's beginning of sequence; lists of token ids after their
        first. A single one for one Score. Raises as `score` does."""
        scores = _scores(self.submit_requests(scoring.texts_alone(texts), priority=priority))
        return scores[0] if is_one_prompt(texts) else scores

    def status(self, timeout: float = 60.0) -> Status:
        """What the engine is doing.

        Raises:
            EngineError: the engine is gone, or does not answer within `timeout` seconds.
        """
        return self._connection.status(timeout)

    def wait_for_end(self, timeout: float) -> None:
        """Wait up to `timeout` seconds.

        Raises:
            EngineError: the engine failed meanwhile.
        """
        self._connection.wait_for_end(timeout)

    def close(self) -> None:
        """Cancel what is open and disconnect; the engine goes on for others."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _scores(job: Job) -> list[Score]:
    try:
        return [score_of(completion) for completion in job.results()]
    except BaseException:
        job.cancel(wait=False)
        raise
