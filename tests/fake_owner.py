"""Stands for the one who starts engines and hands a client the next when one is lost (`client.engine_owner`)."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

from flexgen_lite import Client, EngineError
from flexgen_lite.client.engine_owner import EngineLost
from tests.fake_engine import FakeEngine


class FakeOwner:
    """`start` makes the next engine, when the test wants it to."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._changed = threading.Condition()
        self._endpoint: str | None = None
        self._end: EngineError | None = None
        self._stack = contextlib.ExitStack()
        self._num_engines = 0
        self.losses: list[str] = []
        self.num_in_flight: list[int] = []
        self.num_finished = 0
        self.client: Client | None = None

    def start(self, **options: Any) -> FakeEngine:
        self._num_engines += 1
        engine = self._stack.enter_context(FakeEngine(self._folder / f"e{self._num_engines}", **options))
        self.follow_with(engine.endpoint)
        return engine

    def follow_with(self, endpoint: str) -> None:
        with self._changed:
            self._endpoint = endpoint
            self._changed.notify_all()

    def connect(self, **options: Any) -> Client:
        first = self.endpoint(None)
        assert first is not None
        self.client = self._stack.enter_context(Client(first, owner=self, **options))
        return self.client

    def give_up(self, error: EngineError) -> None:
        with self._changed:
            self._end = error
            self._changed.notify_all()

    def wait_for_loss(self, number: int = 1) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.losses) >= number, 20)

    def close(self) -> None:
        self._stack.close()

    def last_words(self, patience: float) -> str | None:
        return None

    def lost(self, error: EngineLost) -> None:
        with self._changed:
            self.losses.append(str(error))
            self.num_in_flight.append(self.client.num_in_flight if self.client else 0)
            self._changed.notify_all()

    def endpoint(self, patience: float | None) -> str | None:
        with self._changed:
            self._changed.wait_for(lambda: self._endpoint is not None or self._end is not None, patience)
            if self._end is not None:
                raise self._end
            endpoint, self._endpoint = self._endpoint, None
            return endpoint

    @property
    def restarts(self) -> int:
        return self._num_engines - 1

    @property
    def outage(self) -> str | None:
        return None

    def has_finished_one(self) -> None:
        self.num_finished += 1
