"""What a user decides about a processor, under the names of `ray.data.llm`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeGuard

from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.config.problems import ConfigError
from flexgen_lite.text.shown import shown


@dataclass(frozen=True, slots=True, kw_only=True)
class FlexGenLiteProcessorConfig:
    """
    Attributes:
        model_source: model directory or hub id; a directory has to be there on every machine.
        engine_kwargs: any key of EngineConfig but `model`.
        concurrency: actors, each with one engine: a number, or (least, most) for a pool that grows.
        batch_size: rows that come back together, and are given to another actor together.
        max_concurrent_batches: of one actor. All their rows are in its engine's queue at once.
        max_tasks_in_flight_per_actor: batches that Ray sends to one actor; None: as many as it takes at once.
        num_cpus: processors of each actor, for Ray and for its engine; None: see docs/ray.md.
        num_gpus: of each actor; None: 1 where the cluster has GPUs and the engine is not to do without.
        accelerator_type: of the machines, as Ray names it.
        runtime_env: of the actors, as Ray has it.
        apply_chat_template: to rows that have `messages`; otherwise those are left alone.
        chat_template: instead of the model's own, or the name of one of those.
        should_continue_on_error: a row that fails comes back with `__inference_error__`; otherwise the job ends.
        max_restarts: how often an actor that has died is started again; None: as Ray Data does, without limit.
        max_task_retries: how often a batch is given to an actor again, after one has died with it; None: the same.

    Raises:
        ConfigError: a value that cannot be used; of engine_kwargs too, before any actor starts.
    """

    model_source: str | os.PathLike[str]
    engine_kwargs: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int | tuple[int, int] = 1
    batch_size: int = 256
    max_concurrent_batches: int = 16
    max_tasks_in_flight_per_actor: int | None = None
    num_cpus: float | None = None
    num_gpus: float | None = None
    accelerator_type: str | None = None
    runtime_env: Mapping[str, Any] | None = None
    apply_chat_template: bool = True
    chat_template: str | None = None
    should_continue_on_error: bool = True
    max_restarts: int | None = None
    max_task_retries: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.model_source, os.PathLike):
            object.__setattr__(self, "model_source", os.fspath(self.model_source))
        problems = {}
        for name, (is_allowed, wanted) in _ALLOWED.items():
            value = getattr(self, name)
            if not (is_allowed(value) or (value is None and name in _OPTIONAL)):
                problems[name] = f"{name}={shown(value)} is not allowed: give {wanted}"
        if "engine_kwargs" not in problems and "model" in self.engine_kwargs:
            problems["model"] = "engine_kwargs has a model: give it as model_source"
        if problems:
            raise ConfigError(problems)
        self.engine_config()

    def engine_config(self, **more: Any) -> EngineConfig:
        """Of each actor's engine."""
        return EngineConfig(**{**more, **self.engine_kwargs, "model": str(self.model_source)})

    @property
    def least_and_most(self) -> tuple[int, int]:
        """Actors."""
        return self.concurrency if isinstance(self.concurrency, tuple) else (self.concurrency, self.concurrency)


def _is_count(value: object, least: int) -> bool:
    return type(value) is int and value >= least


def _is_pool(value: object) -> bool:
    if isinstance(value, tuple):
        return len(value) == 2 and all(_is_count(number, 1) for number in value) and value[0] <= value[1]
    return _is_count(value, 1)


def _is_amount(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def is_keywords(value: object) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


_Rule = tuple[Callable[[Any], bool], str]  # whether a value is allowed, and what is
_COUNT: _Rule = (lambda value: _is_count(value, 1), "a whole number from 1 up")
_TIMES: _Rule = (lambda value: _is_count(value, -1), "a whole number, or -1 for no limit")
_AMOUNT: _Rule = (_is_amount, "a number from 0 up")
_FLAG: _Rule = (lambda value: isinstance(value, bool), "True or False")
_KEYWORDS: _Rule = (is_keywords, "a dict with names as keys")
_TEXT: _Rule = (lambda value: isinstance(value, str), "a text")
_ALLOWED: dict[str, _Rule] = {
    "model_source": (lambda value: isinstance(value, str) and value != "", "a model directory or a hub id"),
    "engine_kwargs": _KEYWORDS,
    "concurrency": (_is_pool, "a number of actors, or (least, most)"),
    "batch_size": _COUNT,
    "max_concurrent_batches": _COUNT,
    "max_tasks_in_flight_per_actor": _COUNT,
    "num_cpus": _AMOUNT,
    "num_gpus": _AMOUNT,
    "accelerator_type": _TEXT,
    "runtime_env": _KEYWORDS,
    "apply_chat_template": _FLAG,
    "chat_template": _TEXT,
    "should_continue_on_error": _FLAG,
    "max_restarts": _TIMES,
    "max_task_retries": _TIMES,
}
_OPTIONAL = {field.name for field in fields(FlexGenLiteProcessorConfig) if field.default is None}
