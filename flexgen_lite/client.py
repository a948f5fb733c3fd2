"""The client of a running engine."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count, repeat
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from flexgen_lite import scoring
from flexgen_lite.access import read_key_file
from flexgen_lite.chat_template import Chat, ChatError, Messages, render
from flexgen_lite.client_messages import Status, Welcome
from flexgen_lite.completion import Delta, Prompt
from flexgen_lite.connection import Connection
from flexgen_lite.job import Job
from flexgen_lite.request import Request
from flexgen_lite.revival import Revival
from flexgen_lite.sampling_params import CHAT_PARAMS, GREEDY, SamplingParams
from flexgen_lite.scoring import Score, score_of


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
        revival: for the process that started the engine and starts it again, instead of the epitaph: jobs go on with
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
        revival: Revival | None = None,
    ) -> None:
        self._connection = Connection(
            endpoint,
            connect_timeout=connect_timeout,
            heartbeat=heartbeat,
            answer_timeout=answer_timeout,
            epitaph=epitaph,
            keys=None if key_file is None else read_key_file(Path(key_file)),
            revival=revival,
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
        """Why the engine is not there now, while its owner starts it again; None while it is."""
        return self._connection.outage

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
            prompts: texts or lists of token ids; a single one is a job of one request.
            params: for all prompts, or one for each; None is greedy, 16 tokens.
            job_id: a name for the job; by default one that nobody else has.
            keep: the job goes on when this client goes, and the engine keeps its results until `Job.cancel`. Submit it
                again, with the same id, prompts and params, to get all of them: nothing is computed twice. By default a
                job ends with its client.
            priority: jobs with a lower number come first, whoever submits them; what runs already runs on.

        Raises:
            ValueError: there are not as many params as prompts, or the job_id is not of 1 to 200 characters.
            EngineError: the engine is gone, or the client is closed.
        """
        each: Iterable[Prompt] = [prompts] if is_one_prompt(prompts) else prompts  # type: ignore[assignment,list-item]
        length = len(each) if isinstance(each, list | tuple) else None
        if isinstance(params, list | tuple) and length is not None and len(params) != length:
            raise ValueError(f"{len(params)} params for {length} prompts: give one, or one for each prompt")
        requests = _pair(each, GREEDY if params is None else params)
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
        if job_id is not None and not 1 <= len(job_id) <= 200:
            raise ValueError(f"job_id has {len(job_id)} characters: give 1 to 200")
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
            ValueError: the request failed.
            EngineError: the engine is gone.
        """
        request = Request(prompt, GREEDY if params is None else params, stream=True)
        job = self.submit_requests([request], 1, priority=priority)
        try:
            for event in job.events():
                if isinstance(event, Delta):
                    yield event
                elif event.error is not None:
                    raise ValueError(event.error)
        finally:
            job.cancel()

    def chat(
        self,
        messages: Messages | Iterable[Messages],
        params: SamplingParams | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
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
            continue_final_message: end it with the last message as it is, so that it goes on.
            chat_template: a Jinja template instead of the model's own.
            chat_template_kwargs: further variables of the template.
            tools: JSON schemas of functions, for templates that read them.
            priority: see `submit`.

        Raises:
            ChatError: the model has no chat template; one that refuses a conversation ends the job with it.
        """
        each: Iterable[Messages] = [messages] if is_one_chat(messages) else messages  # type: ignore[list-item,assignment]
        if chat_template is None and self._welcome.chat_template is None:
            raise ChatError("the model has no chat template: give a chat_template, or use generate")
        chats = (
            Chat(own, tools, chat_template_kwargs or {}, chat_template, add_generation_prompt, continue_final_message)
            for own in each
        )
        params = CHAT_PARAMS if params is None else params
        length = len(each) if isinstance(each, list | tuple) else None
        return self.submit_requests((self.request_of(chat, params) for chat in chats), length, priority=priority)

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

    def score(self, contexts: Iterable[Prompt], continuations: Iterable[Prompt], *, priority: int = 0) -> list[Score]:
        """How likely each continuation is after its context; nothing is generated.

        Args:
            contexts: texts, or lists of token ids; a text may be empty.
            continuations: one for each context, of the same kind.
            priority: see `submit`.

        Raises:
            ValueError: a pair cannot be scored.
            EngineError: the engine is gone.
        """
        return _scores(self.submit_requests(scoring.requests(contexts, continuations), priority=priority))

    def loglikelihood(self, texts: Iterable[Prompt], *, priority: int = 0) -> list[Score]:
        """How likely whole texts are, each after the model's beginning of sequence; lists of token ids after their
        first. Raises as `score` does."""
        return _scores(self.submit_requests(scoring.texts_alone(texts), priority=priority))

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


def is_one_prompt(prompts: object) -> bool:
    """Whether this is a text or a list of token ids, rather than several of them."""
    if isinstance(prompts, str):
        return True
    return isinstance(prompts, list | tuple) and len(prompts) > 0 and type(prompts[0]) is int


def is_one_chat(messages: object) -> bool:
    """Whether this is one conversation, rather than several of them."""
    return isinstance(messages, list | tuple) and len(messages) > 0 and isinstance(messages[0], Mapping)


def _scores(job: Job) -> list[Score]:
    try:
        return [score_of(completion) for completion in job.results()]
    except BaseException:
        job.cancel()
        raise


def _pair(prompts: Iterable[Prompt], params: SamplingParams | Iterable[SamplingParams]) -> Iterator[Request]:
    if isinstance(params, SamplingParams):
        yield from map(Request, prompts, repeat(params))
    else:
        for prompt, own in zip(prompts, params, strict=True):
            yield Request(prompt, own)
