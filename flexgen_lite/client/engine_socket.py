"""A client's socket to one engine, for the one thread that uses it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import zmq
from zmq.utils.monitor import recv_monitor_message

from flexgen_lite.errors import EngineError
from flexgen_lite.text.shown import shown, shown_path
from flexgen_lite.wire.access import Keys
from flexgen_lite.wire.client_messages import ToClient, ToEngine
from flexgen_lite.wire.codec import Codec

_HIGH_WATER = 1000  # messages
_FAREWELL_MS = 500  # for the last messages to go out
_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
_CUT_OFF = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL  # it ended in the middle, or could not read what our key had closed
_ENCODE, _DECODE = Codec(ToEngine).encode, Codec(ToClient).decode


class EngineSocket:
    """Connects at once. What is posted goes out in `wait`; what has come is read by `receive`. Who waits for several
    engines waits for their `sources`, and calls `flush` and `look` instead.

    Args:
        context: of ZeroMQ.
        endpoint: of the engine.
        keys: of an engine that asks for them.
        doorbell: another socket that ends a `wait` when there is something to read from it; None: nobody calls it.

    Attributes:
        is_closed: the engine has closed its end.
        is_refused: and that because of the keys, as far as can be told.

    Raises:
        ZMQError: the endpoint is none.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, keys: Keys | None, doorbell: socket.socket | None
    ) -> None:
        self.is_closed = self.is_refused = False
        self._backlog: deque[bytes] = deque()
        self._bell = doorbell
        self._has_keys = keys is not None
        self._dealer = context.socket(zmq.DEALER)
        self._dealer.set(zmq.LINGER, 0)
        self._dealer.set(zmq.SNDHWM, _HIGH_WATER)
        self._dealer.set(zmq.RCVHWM, _HIGH_WATER)
        self._monitor = self._dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED | _REFUSED | _CUT_OFF)
        self._poller = zmq.Poller()
        self._poller.register(self._monitor, zmq.POLLIN)
        if doorbell is not None:
            self._poller.register(doorbell, zmq.POLLIN)
        try:
            if keys is not None:
                keys.identify(self._dealer)
            self._dealer.connect(endpoint)
        except BaseException:
            self.close()
            raise

    @property
    def has_room(self) -> bool:
        """For further messages: the engine is not far behind."""
        return len(self._backlog) < _HIGH_WATER

    def post(self, message: ToEngine) -> None:
        self._backlog.append(_ENCODE(message))

    def wait(self, seconds: float) -> None:
        """Send what can be sent; wait for what comes, for the doorbell, or for so many seconds."""
        self.flush()
        self._poller.register(self._dealer, zmq.POLLIN | (zmq.POLLOUT if self._backlog else 0))
        ready = dict(self._poller.poll(int(1000 * seconds)))
        if self._bell is not None and self._bell.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                self._bell.recv(4096)
        if self._monitor in ready:
            self.look()

    @property
    def sources(self) -> tuple[zmq.Socket[bytes], zmq.Socket[Any]]:
        """What is readable when messages have come, and when something has become of the connection."""
        return self._dealer, self._monitor

    @property
    def is_behind(self) -> bool:
        """Something that was posted has not gone out."""
        return bool(self._backlog)

    def look(self) -> None:
        """Read what has become of the connection, when there is something to read."""
        event = recv_monitor_message(self._monitor)["event"]
        self.is_closed = True
        self.is_refused = bool(event & (_REFUSED | _CUT_OFF if self._has_keys else _REFUSED))

    def receive(self) -> Iterator[ToClient]:
        """What has come, also of an engine that has closed its end.

        Raises:
            MessageError: it is no message of an engine.
        """
        with contextlib.suppress(zmq.Again):
            while True:
                data = self._dealer.recv_multipart(zmq.NOBLOCK)[0]
                yield _DECODE(data)

    def linger(self) -> None:
        """What was posted may take a moment to go out when this is closed."""
        self._dealer.set(zmq.LINGER, _FAREWELL_MS)
        self.flush()

    def close(self) -> None:
        self._dealer.disable_monitor()
        self._monitor.close(linger=0)
        self._dealer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def flush(self) -> None:
        """Send what can be sent now."""
        with contextlib.suppress(zmq.Again):
            while self._backlog:
                self._dealer.send(self._backlog[0], zmq.NOBLOCK)
                self._backlog.popleft()


def check_endpoint(endpoint: str, keys: Keys | None) -> None:
    """
    Raises:
        EngineError: nothing can be there for a client with these keys.
    """
    if endpoint.startswith("tcp://"):
        if keys is None:
            raise EngineError(
                f"the engine at {shown_path(endpoint)} needs the key_file that it was started with", user_error=True
            )
        return
    path = endpoint.removeprefix("ipc://")
    if path == endpoint or not path:
        raise EngineError(
            f"endpoint {shown(endpoint)} is not supported: give ipc:// and a path, or tcp://HOST:PORT", user_error=True
        )
    if not path.startswith("@") and not os.path.exists(path):
        raise EngineError(
            f"no engine at {shown_path(endpoint)}: there is no such socket, start one with `flexgen-lite launch`",
            user_error=True,
        )
