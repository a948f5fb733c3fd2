"""A batch's answers, awaited by a coroutine; the engine is a fake one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from flexgen_lite.client.client import Client
from flexgen_lite.client.completion import Completion
from flexgen_lite.client.request import Request
from flexgen_lite.client.sampling_params import GREEDY
from flexgen_lite.errors import EngineError
from flexgen_lite.ray.answers import answers
from flexgen_lite.wire.client_messages import Cancel
from tests.fake_engine import FakeEngine

pytestmark = pytest.mark.timeout(60)


def requests_of(*texts: str) -> list[Request]:
    return [Request(text, GREEDY) for text in texts]


def test_batches_are_at_the_engine_together_and_come_back_in_order(tmp_path: Path) -> None:
    batches = [[f"{batch}-{row}" for row in range(5)] for batch in "abcd"]

    async def all_at_once(client: Client, engine: FakeEngine) -> list[list[Completion]]:
        tasks = [asyncio.create_task(answers(client, requests_of(*batch))) for batch in batches]
        jobs: set[str] = set()
        while len(jobs) < len(batches):  # each is there before any is answered
            submit = await asyncio.to_thread(engine.received.get, timeout=10)
            jobs |= {submit.job_id} if hasattr(submit, "requests") else set()
        engine.release()
        return await asyncio.gather(*tasks)

    with FakeEngine(tmp_path / "s", window=64, hold=True) as engine, Client(engine.endpoint) as client:
        found = asyncio.run(all_at_once(client, engine))
    assert [[completion.text for completion in batch] for batch in found] == [
        [text.upper() for text in batch] for batch in batches
    ]


def test_the_engine_hears_that_nobody_waits(tmp_path: Path) -> None:
    async def given_up(client: Client, engine: FakeEngine) -> None:
        task = asyncio.create_task(answers(client, requests_of("a")))
        await asyncio.to_thread(lambda: _until_submitted(engine))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    with FakeEngine(tmp_path / "s", hold=True) as engine, Client(engine.endpoint) as client:
        asyncio.run(given_up(client, engine))
        assert engine.next_of(Cancel)


def test_a_lost_engine_is_told_to_all(tmp_path: Path) -> None:
    async def lost(client: Client, engine: FakeEngine) -> list[object]:
        tasks = [asyncio.create_task(answers(client, requests_of(text))) for text in "ab"]
        await asyncio.to_thread(lambda: _until_submitted(engine))
        await asyncio.to_thread(engine.die)
        return await asyncio.gather(*tasks, return_exceptions=True)

    with FakeEngine(tmp_path / "s", hold=True) as engine, Client(engine.endpoint) as client:
        found = asyncio.run(lost(client, engine))
    assert [type(error) for error in found] == [EngineError, EngineError]


def _until_submitted(engine: FakeEngine) -> None:
    while not hasattr(engine.received.get(timeout=10), "requests"):
        pass
