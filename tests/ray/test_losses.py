"""Engines, workers and actors that are killed in the middle of a job: all rows come back once, with the same tokens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import ray.data

from flexgen_lite.ray.processor import build_processor
from tests.engine_processes import workers_of
from tests.fault_injection import Fault, inject, struck
from tests.fault_places import FAULTS
from tests.ray.pipelines import actor_of, by_id, config_of, coordinator_of, coordinators, until
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


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Frozen:
    """The first compute worker that has come far enough stops there, in the middle of a pass."""
    inject(monkeypatch, tmp_path / "faults", Fault("advance", call=100, action="SIGSTOP", worker="compute worker"))
    return Frozen(tmp_path / "faults", {name: os.environ[name] for name in (FAULTS, "PYTHONPATH")})


@dataclass(frozen=True)
class Frozen:
    """Attributes:
    folder: of the mark that it leaves.
    environment: of the actors.
    """

    folder: Path
    environment: dict[str, str]

    def worker(self) -> psutil.Process:
        """The one that has stopped, once it has."""
        until(lambda: struck(self.folder), "fault")
        return until(self._stopped, "worker that has stopped")

    def _stopped(self) -> psutil.Process | None:
        for engine in coordinators():
            worker = workers_of(engine.pid).get("compute worker")
            if worker is not None and worker.status() == psutil.STATUS_STOPPED:
                return worker
        return None


def tokens_of(model: Path, params: dict[str, Any], **options: Any) -> list[list[int]]:
    found = by_id(build_processor(config_of(model, **options))(dataset_of(params)).take_all())
    assert {row["__inference_error__"] for row in found.values()} == {""}
    return [found[number]["generated_tokens"] for number in range(ROWS)]


def tokens_after(
    loss: Callable[[psutil.Process], None], frozen: Frozen, model: Path, params: dict[str, Any], **options: Any
) -> list[list[int]]:
    """`loss` is called with the worker that has stopped in the middle."""
    with ThreadPoolExecutor(1) as pool:
        environment = {"env_vars": frozen.environment}
        job = pool.submit(tokens_of, model, params, runtime_env=environment, **options)
        try:
            loss(frozen.worker())
        except BaseException:
            for engine in coordinators():
                engine.kill()
            raise
        return job.result()


def worker_killed(worker: psutil.Process) -> None:
    worker.kill()


def coordinator_killed(worker: psutil.Process) -> None:
    coordinator_of(worker).kill()


def actor_killed(worker: psutil.Process) -> None:
    coordinator = coordinator_of(worker)
    actor_of(coordinator).kill()
    worker.kill()  # one that has stopped does not see that it is to end
    until(lambda: not psutil.pid_exists(coordinator.pid) or coordinator.status() == psutil.STATUS_ZOMBIE, "end of it")


def given_up(worker: psutil.Process) -> None:
    """Engines of this actor are killed as they come, until it has gone."""
    actor = actor_of(coordinator_of(worker))
    for engine in _engines_of(actor):
        engine.kill()


@pytest.mark.parametrize(
    ("loss", "actors"), [(worker_killed, 2), (coordinator_killed, 2), (actor_killed, 2), (given_up, 1)]
)
def test_a_loss_costs_no_row_and_changes_no_token(
    loss: Callable[[psutil.Process], None], actors: int, frozen: Frozen, model: Path, expected: list[list[int]]
) -> None:
    assert tokens_after(loss, frozen, model, {"temperature": 0.0}, concurrency=actors) == expected


def test_an_engine_that_is_killed_as_it_starts(model: Path, expected: list[list[int]]) -> None:
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(tokens_of, model, {"temperature": 0.0})
        first = until(coordinators, "engine")[0]
        first.kill()
        assert job.result() == expected


def test_what_is_drawn_is_drawn_again_when_an_actor_has_died(frozen: Frozen, model: Path) -> None:
    params = {"temperature": 1.0}
    drawn = tokens_after(actor_killed, frozen, model, params)
    assert drawn == tokens_of(model, params)
    assert len({tuple(tokens) for tokens in drawn}) > ROWS // 2


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
