"""Engines, workers and actors that are killed in the middle of a job: all rows come back once, with the same tokens."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import ray.data

from flexgen_lite.ray.processor import build_processor
from tests.engine_processes import workers_of
from tests.ray.pipelines import actor_of, by_id, config_of, coordinators, until
from tests.tiny_models import ragged_prompts, reference_tokens

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("no_engines")]
ROWS, TOKENS = 96, 8
PROMPTS = ragged_prompts(ROWS, 30)


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    return reference_tokens(model, PROMPTS, TOKENS)


def dataset_of(params: dict[str, Any]) -> ray.data.Dataset:
    params = {"max_tokens": TOKENS, "ignore_eos": True, **params}
    items = enumerate(PROMPTS)
    return ray.data.from_items(
        [{"id": number, "tokenized_prompt": one, "sampling_params": params} for number, one in items]
    )


def rows_of(model: Path, params: dict[str, Any], on_first: Callable[[], object], **options: Any) -> list[list[int]]:
    """The tokens of all rows; `on_first` is called when the first row has come, and more than half have not."""
    rows = iter(build_processor(config_of(model, **options))(dataset_of(params)).iter_rows())
    found = [next(rows)]
    on_first()
    found += rows
    each = by_id(found)
    assert {row["__inference_error__"] for row in found} == {""}
    return [each[number]["generated_tokens"] for number in range(ROWS)]


def coordinator_killed() -> None:
    coordinators()[0].send_signal(signal.SIGKILL)


def compute_worker_killed() -> None:
    workers_of(coordinators()[0].pid)["compute worker"].send_signal(signal.SIGKILL)


def actor_killed() -> None:
    coordinator = coordinators()[0]
    actor_of(coordinator).send_signal(signal.SIGKILL)
    until(lambda: not psutil.pid_exists(coordinator.pid) or coordinator.status() == psutil.STATUS_ZOMBIE, "end of it")


@pytest.mark.parametrize("loss", [coordinator_killed, compute_worker_killed, actor_killed])
def test_a_loss_costs_no_row_and_changes_no_token(
    loss: Callable[[], None], model: Path, expected: list[list[int]]
) -> None:
    assert rows_of(model, {"temperature": 0.0}, loss, concurrency=2) == expected


def test_what_is_drawn_is_drawn_again_when_an_actor_has_died(model: Path) -> None:
    params = {"temperature": 1.0}
    undisturbed = rows_of(model, params, lambda: None)
    assert rows_of(model, params, actor_killed) == undisturbed
    assert len({tuple(tokens) for tokens in undisturbed}) > ROWS // 2


def test_an_engine_that_is_given_up_takes_its_actor_with_it(model: Path, expected: list[list[int]]) -> None:
    """Killed whenever it is there, until it has been lost too often; then another actor starts, with another engine."""

    def kill_until_given_up() -> None:
        actor = actor_of(coordinators()[0])
        for engine in _engines_of(actor):
            engine.send_signal(signal.SIGSTOP)  # so that it finishes nothing on its way out
            engine.send_signal(signal.SIGKILL)

    assert rows_of(model, {"temperature": 0.0}, kill_until_given_up) == expected


def _engines_of(actor: psutil.Process) -> Iterator[psutil.Process]:
    """One after the other, each as soon as it is there, for as long as the actor is."""
    seen: set[int] = set()

    def next_one() -> psutil.Process | str | None:
        if not actor.is_running() or actor.status() == psutil.STATUS_ZOMBIE:
            return "none"
        of_it = [engine for engine in coordinators() if engine.ppid() == actor.pid and engine.pid not in seen]
        return of_it[0] if of_it else None

    while isinstance(engine := until(next_one, "engine"), psutil.Process):
        seen.add(engine.pid)
        yield engine
