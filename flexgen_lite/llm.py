"""The engine and its client in one object."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

from flexgen_lite.chat.template import Messages
from flexgen_lite.client.arguments import is_one_chat
from flexgen_lite.client.client import Client
from flexgen_lite.client.completion import Completion, Delta, Prompt
from flexgen_lite.client.job import Job
from flexgen_lite.client.request import is_one_prompt
from flexgen_lite.client.sampling_params import SamplingParams
from flexgen_lite.client.scoring import Score
from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.launcher.supervisor import EngineSupervisor
from flexgen_lite.text.shown import shown_kind
from flexgen_lite.wire.client_messages import Status


class FlexGenLite:
    """Starts an engine for a model; it ends with the `with` block, with `close()`, or when this object goes.

    An engine that dies is started again, and what was open goes on; a warning is logged. See EngineSupervisor.

    Args:
        model: Hugging Face model directory or hub id.
        config: an EngineConfig, or the path of a YAML file.
        options: any key of EngineConfig; they win over `config`.

    Raises:
        TypeError: model or config is of another type.
        ConfigError: the configuration cannot be used.
        EngineError: the engine could not be started.
    """

    def __init__(self, model: str | Path, *, config: EngineConfig | str | Path | None = None, **options: Any) -> None:
        if not isinstance(model, str | Path):
            raise TypeError(f"model is {shown_kind(model)}: give a model directory or a hub id")
        if not isinstance(config, EngineConfig | str | Path | None):
            raise TypeError(f"config is {shown_kind(config)}: give an EngineConfig or the path of a YAML file")
        if isinstance(config, EngineConfig):
            given = config.model_dump(exclude_unset=True)
            self.config = EngineConfig(**{**given, **options, "model": str(model)})
        else:
            self.config = EngineConfig.load(config, {**options, "model": str(model)})
        self._engine = EngineSupervisor(self.config, on_log=_log)
        try:
            self._client = self._engine.connect()
        except BaseException:
            self._engine.stop()
            raise
        self._finalizer = weakref.finalize(self, _close, self._client, self._engine)

    @property
    def endpoint(self) -> str:
        """Where further clients may connect. Their jobs end with the engine; one that is started again is elsewhere,
        unless `endpoint` is configured."""
        return self._engine.endpoint

    @property
    def engine_pid(self) -> int:
        """Of the coordinator's process, whose descendants are the workers."""
        return self._engine.pid

    def connect(self) -> Client:
        """A further client of the engine, which goes on with the next one where it is started again."""
        return self._engine.connect()

    @property
    def engine_restarts(self) -> int:
        """How often the engine, or one of several, was started again."""
        return self._engine.all_restarts

    @property
    def plan(self) -> str:
        """What is placed where, memory per part, worker and thread counts; for people."""
        return self._engine.plan

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompts: str | list[int], params: SamplingParams | None = None, *, progress: bool = False
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompts: Iterable[Prompt],
        params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[Completion]: ...

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> Completion | list[Completion]:
        """Generate for one prompt, or for many.

        Args:
            prompts: a text or a list of token ids for one Completion; several of them for a list of Completions in
                the order of the prompts. A request that fails has its `error` set and no text.
            params: for all prompts, or one for each. None is greedy, 16 tokens.
            progress: show a progress bar.

        Raises:
            EngineError: the engine failed.
        """
        job = self.submit(prompts, params)
        try:
            completions = _with_progress(job) if progress else job.results()
        except BaseException:
            job.cancel(wait=False)
            raise
        return completions[0] if is_one_prompt(prompts) else completions

    def submit(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Iterable[SamplingParams] | None = None,
    ) -> Job:
        """Submit prompts and return at once, as Client.submit does."""
        return self._client.submit(prompts, params)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Generate for one prompt, and tell of its tokens as they come, as Client.stream does."""
        return self._client.stream(prompt, params)

    @overload
    def chat(self, messages: Messages, params: SamplingParams | None = None, **options: Any) -> Completion: ...

    @overload
    def chat(
        self, messages: Iterable[Messages], params: SamplingParams | None = None, **options: Any
    ) -> list[Completion]: ...

    def chat(
        self, messages: Messages | Iterable[Messages], params: SamplingParams | None = None, **options: Any
    ) -> Completion | list[Completion]:
        """The assistant's next message in one conversation, or in several.

        Args:
            messages: a list of messages with "role" and "content" for one Completion; several such lists for a list of
                Completions.
            params: for all of them. None is greedy, 256 tokens.
            options: see Client.chat.

        Raises:
            ChatError: the model has no chat template, or it refuses a conversation.
            EngineError: the engine failed.
        """
        job = self._client.chat(messages, params, **options)
        try:
            completions = job.results()
        except BaseException:
            job.cancel(wait=False)
            raise
        return completions[0] if is_one_chat(messages) else completions

    @overload
    def score(self, contexts: str | list[int], continuations: str | list[int]) -> Score: ...  # type: ignore[overload-overlap]

    @overload
    def score(self, contexts: Iterable[Prompt], continuations: Iterable[Prompt]) -> list[Score]: ...

    def score(
        self, contexts: Prompt | Iterable[Prompt], continuations: Prompt | Iterable[Prompt]
    ) -> Score | list[Score]:
        """How likely each continuation is after its context, as Client.score says."""
        return self._client.score(contexts, continuations)  # type: ignore[arg-type]

    @overload
    def loglikelihood(self, texts: str | list[int]) -> Score: ...  # type: ignore[overload-overlap]

    @overload
    def loglikelihood(self, texts: Iterable[Prompt]) -> list[Score]: ...

    def loglikelihood(self, texts: Prompt | Iterable[Prompt]) -> Score | list[Score]:
        """How likely whole texts are, as Client.loglikelihood says."""
        return self._client.loglikelihood(texts)  # type: ignore[arg-type]

    def status(self) -> Status:
        return self._client.status()

    def close(self) -> None:
        """Stop the engine. Safe to call twice."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _log(message: str) -> None:
    level = logging.WARNING if "warning" in message else logging.INFO
    logging.getLogger("flexgen_lite").log(level, message)


def _close(client: Client, engine: EngineSupervisor) -> None:
    client.close()
    engine.stop()


def _with_progress(job: Job) -> list[Completion]:
    from rich.progress import track

    completions = list(track(job, description="generating", total=len(job)))
    return sorted(completions, key=lambda completion: completion.index)
