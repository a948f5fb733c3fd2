"""The line to one engine: a client's, which goes on with the engine that follows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Protocol

import zmq

from flexgen_lite.client.engine_owner import EngineLost, EngineOwner
from flexgen_lite.client.engine_socket import EngineSocket
from flexgen_lite.client.status_sum import StatusSum
from flexgen_lite.dispatch.status_of_all import without_work
from flexgen_lite.engine.event_loop import EventLoop
from flexgen_lite.errors import EngineError
from flexgen_lite.wire.client_messages import (
    PROTOCOL,
    Connect,
    EngineFailed,
    GetStatus,
    ReadDeltas,
    RequestDelta,
    RequestDone,
    Status,
    ToClient,
    ToEngine,
    Welcome,
)
from flexgen_lite.wire.codec import MessageError

ANSWER_SECONDS = 300.0  # without an answer to a question, the engine is given up
ENDING_SECONDS = 15.0  # for an engine that said that it fails to stop its workers and end
CLOSED_SECONDS = 2.0  # for one that has closed its end to have died


class LinkOwner(Protocol):
    """Who has the line."""

    def welcomed(self, link: EngineLink, welcome: Welcome) -> None:
        """An engine is there."""

    def answered(self, link: EngineLink, message: RequestDone | RequestDelta) -> None: ...

    def told_status(self, link: EngineLink) -> None:
        """`link.status` is new."""

    def lost(self, link: EngineLink, why: str) -> None:
        """The engine is gone; another one may follow."""

    def gone(self, link: EngineLink, error: EngineError) -> None:
        """None follows."""


class EngineLink:
    """Nothing happens before `follow` is called.

    Args:
        number: of the engine.
        owner: is told of what happens, in `look` and from the loop.
        num_sent: how many requests the engine has.

    Attributes:
        status: what the engine said of itself last, with what those before it did.
        is_current: and that was after all that it was sent.
        is_open: an engine is there, and has said who it is.
        is_gone: and none will follow.
    """

    def __init__(
        self,
        number: int,
        owner: LinkOwner,
        loop: EventLoop,
        context: zmq.Context[zmq.Socket[bytes]],
        num_sent: Callable[[], int],
    ) -> None:
        self.number = number
        self.status: Status | None = None
        self.is_current = self.is_open = self.is_gone = False
        self._owner, self._loop, self._context = owner, loop, context
        self._num_sent = num_sent
        self._num_lost = 0  # requests that the engine had when it was lost
        self._socket: EngineSocket | None = None
        self._sum = StatusSum()
        self._asked_at: float | None = None  # of a question that was not answered
        self._is_fresh = False  # nothing was sent after it
        self._engine: EngineOwner | None = None

    def follow(self, engine: EngineOwner) -> None:
        """Connect to this one, and to those that take its place."""
        self._engine = engine
        self.look()

    @property
    def _follower(self) -> EngineOwner:
        assert self._engine is not None, "follow comes first"
        return self._engine

    @property
    def restarts(self) -> int:
        """How often the engine was started again, whatever became of that."""
        return self._follower.restarts

    @property
    def num_in_flight(self) -> int:
        return self._num_sent() if self.is_open else self._num_lost

    @property
    def is_out(self) -> bool:
        """No engine is there, but one may follow."""
        return self._socket is None and not self.is_gone

    @property
    def is_asked(self) -> bool:
        return self._asked_at is not None

    @property
    def is_behind(self) -> bool:
        return self._socket is not None and self._socket.is_behind

    def look(self) -> None:
        """Whether another engine is there, where there is none, and whether the one that there is lives."""
        if self.is_gone:
            return
        try:
            if self._socket is None:
                endpoint = self._follower.endpoint(0)
                if endpoint is not None:
                    self._open(endpoint)
            elif (words := self._follower.last_words(0)) is not None:
                self._lose(words, ENDING_SECONDS)
            elif self._asked_at is not None and time.monotonic() - self._asked_at > ANSWER_SECONDS:
                self._lose(f"engine {self.number} has not answered for {ANSWER_SECONDS:.0f} s", 0)
        except EngineError as error:
            self.is_gone = True
            self._owner.gone(self, error)

    def post(self, messages: Iterable[ToEngine]) -> None:
        assert self._socket is not None
        for message in messages:
            self._socket.post(message)
            self.is_current = self._is_fresh = False
        self._socket.flush()

    def flush(self) -> None:
        """Send what could not be sent before."""
        if self._socket is not None:
            self._socket.flush()

    def ask_status(self) -> None:
        """Unless that is asked already."""
        if self.is_open and self._asked_at is None:
            self.post([GetStatus()])
            self._asked_at, self._is_fresh = time.monotonic(), True

    def close(self) -> None:
        if self._socket is not None:
            for source in self._socket.sources:
                self._loop.forget(source)
            self._socket.close()
            self._socket = None

    def _open(self, endpoint: str) -> None:
        self._socket = EngineSocket(self._context, endpoint, None, None)
        messages, events = self._socket.sources
        self._loop.watch(messages, self._receive)
        self._loop.watch(events, self._see_the_end)
        self._socket.post(Connect(PROTOCOL))
        self._socket.flush()
        self._asked_at = time.monotonic()

    def _receive(self) -> None:
        assert self._socket is not None
        num_deltas = 0
        try:
            for message in self._socket.receive():
                num_deltas += isinstance(message, RequestDelta)
                self._handle(message)
                if self._socket is None:
                    return
        except MessageError as error:
            self._lose(f"engine {self.number} does not speak this protocol: {error}", 0)
            return
        if num_deltas:
            self._socket.post(ReadDeltas(num_deltas))
            self._socket.flush()

    def _handle(self, message: ToClient) -> None:
        match message:
            case Welcome():
                self._asked_at, self.is_open = None, True
                self._owner.welcomed(self, message)
            case Status():
                self.status = self._sum.of(message, self._follower.restarts)
                self._asked_at, self.is_current = None, self._is_fresh
                self._owner.told_status(self)
            case RequestDone():
                if message.error is None and all(one.finish_reason != "cancelled" for one in message.outputs):
                    self._follower.has_finished_one()
                self._owner.answered(self, message)
            case RequestDelta():
                self._owner.answered(self, message)
            case EngineFailed():
                self._lose(message.message, ENDING_SECONDS)

    def _see_the_end(self) -> None:
        assert self._socket is not None
        self._socket.look()
        self._receive()  # what it said before
        if self._socket is not None:
            words = self._follower.last_words(0)
            self._lose(words or f"engine {self.number} closed the connection", CLOSED_SECONDS)

    def _lose(self, why: str, patience: float) -> None:
        self._num_lost = self._num_sent()
        self.close()
        self._sum.engine_lost()
        self.status = None if self.status is None else without_work(self.status)
        self.is_open = self.is_current = False
        self._asked_at = None
        self._owner.lost(self, why)
        self._follower.lost(EngineLost(why, patience))
