"""An engine that is started again when it is lost, for as long as that gets anywhere."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from flexgen_lite.client.client import Client
from flexgen_lite.client.engine_owner import EngineLost
from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.cost.comparison import Prediction
from flexgen_lite.errors import EngineError, fresh
from flexgen_lite.launcher.process import EngineProcess
from flexgen_lite.model.files import OFFLINE
from flexgen_lite.plan.workload import Workload
from flexgen_lite.wire.engine_share import EngineShare, SharedWeights

MOST_LOSSES = 3  # in a row, with no request finished in between
BUSY_SECONDS = 300.0  # that an engine may take to answer a new client, as it may for one it has
PAUSE_SECONDS = (1.0, 2.0)  # before another start, by the losses in a row
JOIN_SECONDS = 15.0  # for a start that is broken off


class HasRequests(Protocol):
    """A client, as far as it matters to those who start engines."""

    @property
    def num_in_flight(self) -> int:
        """Requests that the engine has and has not answered, or had when it was lost."""


class EngineSupervisor:
    """Starts an engine, and another one in its place when it dies, hangs or fails: the clients made by `connect` send
    that one what was not answered.

    It is given up when it has been lost MOST_LOSSES times in a row with no request finished in between, when it ends
    with an error that would come again, and when the model is another one meanwhile.

    Args:
        config: of the engine. What "auto" came to in the first one holds for all.
        expected: the work to come, where it is known.
        predicted: what is foretold of it, for the trace.
        on_log: is given each log message, and warnings about losses, on other threads.
        on_plan: is given the first engine's plan.
        outer, share: see EngineProcess. An engine that takes the place of another finds the weights that these share.

    Attributes:
        restarts: how often the engine was started again; of several, the process in front of them.

    Raises:
        EngineError: the first one did not become ready.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        expected: Workload | None = None,
        predicted: Prediction | None = None,
        on_log: Callable[[str], None] | None = None,
        on_plan: Callable[[str], None] | None = None,
        outer: Path | None = None,
        share: EngineShare | None = None,
    ) -> None:
        self._expected, self._outer, self._share = expected, outer, share
        self._on_log = on_log or (lambda _: None)
        self._owner = os.getpid()
        self._closing = threading.Event()
        self._changed = threading.Condition()  # guards what follows
        self._clients: weakref.WeakSet[HasRequests] = weakref.WeakSet()
        self.restarts = 0
        self._restarts_behind = 0  # of engines behind those before this one
        self._number = 0  # of the engine: how many were ready before
        self._losses = 0  # in a row
        self._restart: threading.Thread | None = None  # while another one is started
        self._starting: EngineProcess | None = None  # by that thread
        self._failure: EngineError | None = None  # there will be no other one
        self._engine = EngineProcess(
            config,
            expected=expected,
            predicted=predicted,
            on_log=on_log,
            on_plan=on_plan,
            outer=outer,
            share=share,
        )
        self._config = _settled(config, self._engine)
        self._close_first()

    @property
    def endpoint(self) -> str:
        """Where further clients may connect. Those are not the supervisor's: they end with the engine."""
        return self._engine.endpoint

    @property
    def plan(self) -> str:
        return self._engine.plan

    @property
    def decided(self) -> Mapping[str, Any]:
        """As EngineProcess has it."""
        return self._engine.decided

    @property
    def pid(self) -> int:
        return self._engine.pid

    @property
    def outage(self) -> str | None:
        """As EngineProcess has it."""
        return self._engine.outage

    @property
    def all_restarts(self) -> int:
        """With those of several engines, which the process in front of them starts again."""
        with self._changed:
            return self.restarts + self._restarts_behind + self._engine.restarts

    def connect(self) -> Client:
        """A client whose jobs go on with the next engine. Waits for one that is being started.

        Raises:
            EngineError: the engine is gone for good.
        """
        follower = Follower(self)
        endpoint = follower.endpoint(None)
        assert endpoint is not None, "without a limit it is there or fails"
        client = Client(endpoint, connect_timeout=BUSY_SECONDS, key_file=self._config.key_file, owner=follower)
        with self._changed:
            self._clients.add(client)
        return client

    def follow(self, client: HasRequests) -> Follower:
        """For a client of another kind, which connects to the engine, and to those that follow it, by itself."""
        with self._changed:
            self._clients.add(client)
        return Follower(self)

    def stop(self) -> None:
        """Stop the engine in order, or a start of it. Safe to call twice."""
        if os.getpid() != self._owner:  # a fork: its locks may be held by threads that it does not have
            return
        self._closing.set()
        with self._changed:
            self._failure = self._failure or EngineError("the engine was stopped")
            engines, restart = (self._engine, self._starting), self._restart
            self._changed.notify_all()
        for engine in engines:
            if engine is not None:
                engine.stop()
        if restart is not None and restart is not threading.current_thread():
            restart.join(JOIN_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # ------------------------------------------------------------------------------------------------ for clients

    def last_words(self, number: int, patience: float) -> str | None:
        """Of the engine of this number, as EngineProcess has it."""
        with self._changed:
            if number != self._number:
                return "the engine was lost, and has been started again"
            engine = self._engine
        return engine.last_words(patience)

    def lost(self, number: int, error: EngineLost) -> None:
        """The engine of this number is given up: another one is started, once for all who say so."""
        with self._changed:
            is_over = self._failure is not None or self._closing.is_set()
            if number != self._number or self._restart is not None or is_over:
                return
            restart = threading.Thread(
                target=self._start_again, args=(error,), name="flexgen-lite restart", daemon=True
            )
            try:
                restart.start()
            except RuntimeError as no_thread:  # mostly for want of memory
                self._failure = EngineError(f"{error}; it cannot be started again: {no_thread}")
                self._changed.notify_all()
            else:
                self._restart = restart

    def wait_for_another(self, number: int, patience: float | None) -> tuple[int, str] | None:
        """The number and the endpoint of the engine that runs, if it is not the one of this number; None where there is
        none within so many seconds.

        Raises:
            EngineError: there will be none.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or self._has_another(number), patience)
            if self._failure is not None:
                raise fresh(self._failure)
            return (self._number, self._engine.endpoint) if self._has_another(number) else None

    def has_finished_one(self) -> None:
        """The engine has answered a request: losses before that do not count any more."""
        self._losses = 0

    def _close_first(self) -> None:
        """At the end of the interpreter what was made last is finalized first: before the engine that was just started
        is stopped, it is noted that it is not to be started again."""
        weakref.finalize(self, self._closing.set)

    def _has_another(self, number: int) -> bool:
        return self._restart is None and number != self._number

    # ------------------------------------------------------------------------------------------------ the restart

    def _start_again(self, error: EngineLost) -> None:
        engine: EngineProcess | None = None
        failure: EngineError | None = None
        try:
            engine = self._another(error)
        except EngineError as its_own:
            failure = its_own
        except Exception as unforeseen:
            failure = EngineError(f"{error}; it cannot be started again: {type(unforeseen).__name__}: {unforeseen}")
        with self._changed:
            self._restart = self._starting = None
            if engine is not None:
                self._restarts_behind += self._engine.restarts
                self._engine = engine
                self._number += 1
            self._failure = self._failure or failure
            self._changed.notify_all()

    def _another(self, loss: EngineLost) -> EngineProcess:
        """An engine that is ready.

        Raises:
            EngineError: there is none.
        """
        own = self._engine.end(loss.patience)
        error: EngineError = loss if own is None else own
        if error.comes_again:
            raise EngineError(str(error), details=error.details)
        while True:
            self._losses += 1
            if self._losses >= MOST_LOSSES:
                self._warn(f"{error}; {self._losses} times in a row with no request finished: it is not started again")
                raise EngineError(str(error), details=error.details)
            self._warn(f"{error}; {self._what_happens()}")
            if self._closing.wait(PAUSE_SECONDS[min(self._losses, len(PAUSE_SECONDS)) - 1]):
                raise EngineError("the engine was stopped")
            try:
                return self._start()
            except EngineError as failure:
                if failure.comes_again or self._closing.is_set():
                    raise
                error = failure

    def _what_happens(self) -> str:
        with self._changed:
            num_open = sum(client.num_in_flight for client in self._clients)
        return "starting it again" + (f"; {num_open} open requests are submitted again" if num_open else "")

    def _start(self) -> EngineProcess:
        config = self._config
        if config.trace is not None:
            config = config.model_copy(update={"trace": _next_trace(config.trace)})
            self._on_log(f"its trace is {config.trace}")
        self.restarts += 1
        engine = EngineProcess(
            config,
            expected=self._expected,
            on_log=self._on_log,
            environment=OFFLINE,
            wait=False,
            outer=self._outer,
            share=self._share_of_the_next(),
        )
        self._close_first()
        try:
            with self._changed:
                self._starting = engine
            if self._closing.is_set():  # and if it comes later, the engine is stopped from there
                raise EngineError("the engine was stopped")
            engine.wait_until_ready()
            if engine.decided.get("files") != self._engine.decided.get("files"):
                raise EngineError(f"{config.model} changed while it was in use: start anew", user_error=True)
        except BaseException:
            engine.stop()
            raise
        self._on_log(f"the engine (process {engine.pid}) is ready")
        return engine

    def _share_of_the_next(self) -> EngineShare | None:
        """The weights that engines share lie in their arena by now."""
        weights = self._engine.decided.get("weights")
        if self._share is None or weights is None:
            return self._share
        return replace(self._share, weights=SharedWeights.from_dict(weights))

    def _warn(self, text: str) -> None:
        self._on_log(f"warning: {text}")


class Follower:
    """The EngineOwner of one client: which engine it has."""

    def __init__(self, supervisor: EngineSupervisor) -> None:
        self._supervisor = supervisor
        self._number = -1
        self._restarts_before = supervisor.restarts

    def last_words(self, patience: float) -> str | None:
        return self._supervisor.last_words(self._number, patience)

    def lost(self, error: EngineLost) -> None:
        self._supervisor.lost(self._number, error)

    def endpoint(self, patience: float | None) -> str | None:
        found = self._supervisor.wait_for_another(self._number, patience)
        if found is None:
            return None
        self._number, endpoint = found
        return endpoint

    @property
    def restarts(self) -> int:
        return self._supervisor.restarts - self._restarts_before

    @property
    def outage(self) -> str | None:
        return self._supervisor.outage

    def has_finished_one(self) -> None:
        self._supervisor.has_finished_one()


def _settled(config: EngineConfig, engine: EngineProcess) -> EngineConfig:
    """What was left to "auto" and might come to something else the next time is as it was: the plan and the answers are
    the same, whatever else fills the memory."""
    automatic = {key for key in ("ram", "dtype", "device", "engines") if getattr(config, key) in (None, "auto")}
    update: dict[str, Any] = {key: value for key, value in engine.decided.items() if key in automatic}
    return config.model_copy(update=update)


def _next_trace(path: Path) -> Path:
    """A file beside the first engine's trace, which is not overwritten, nor is anything else; a pipe takes all."""
    if path.exists() and not path.is_file():
        return path
    number = 2
    while (beside := path.with_stem(f"{path.stem}-{number}")).exists():
        number += 1
    return beside
