"""Where clients come in: one socket, bound when the engine is ready."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import zmq

from flexgen_lite.engine.event_loop import EventLoop
from flexgen_lite.plan.plan import PlanError
from flexgen_lite.queue.client_jobs import MAX_OPEN, MAX_UNREAD_DELTAS
from flexgen_lite.wire import client_messages
from flexgen_lite.wire.access import ZAP_ENDPOINT, Keys
from flexgen_lite.wire.codec import Codec, MessageError

MAX_MESSAGE_BYTES = 64 << 20
MAX_DROPPED = 1000  # clients that are remembered for it
GARBAGE_LINES, GARBAGE_SECONDS = 5, 60.0  # so many lines of the log in so many seconds are about garbage


class Frontend:
    """Args:
    on_message: is given a client's identity and its message.
    on_garbage: is given what is wrong with what a client sent.
    on_gone: is given the identity of a client that could not be answered.
    window: requests that a client may have open.
    """

    def __init__(
        self,
        loop: EventLoop,
        context: zmq.Context[zmq.Socket[bytes]],
        on_message: Callable[[bytes, Any], None],
        on_garbage: Callable[[str], None],
        on_gone: Callable[[bytes], None],
        window: int = MAX_OPEN,
    ) -> None:
        # Messages for a client that does not read them; beyond that it counts as gone.
        self._most_unread = 3 * window + MAX_UNREAD_DELTAS
        self._loop = loop
        self._context = context
        self._on_message, self._on_garbage, self._on_gone = on_message, on_garbage, on_gone
        self._decode = Codec(client_messages.ToEngine, max_bytes=MAX_MESSAGE_BYTES).decode
        self._encode = Codec(client_messages.ToClient).encode
        self._socket: zmq.Socket[bytes] | None = None
        self._judge: zmq.Socket[bytes] | None = None
        self._path: Path | None = None
        self._dropped: dict[bytes, None] = {}  # clients that did not read, and may not know yet
        self._complaining_since = 0.0
        self._num_complaints = 0

    def open(self, endpoint: str, keys: Keys | None) -> str:
        """From here on clients can connect; with `keys`, those that hold them. Returns the endpoint, with a port where
        "*" was given. Raises PlanError where it cannot be had."""
        path = Path(endpoint.removeprefix("ipc://")) if endpoint.startswith("ipc://") else None
        if path is not None:
            _refuse_taken(path)
        clients = self._context.socket(zmq.ROUTER)
        clients.setsockopt(zmq.ROUTER_MANDATORY, 1)
        clients.setsockopt(zmq.SNDHWM, self._most_unread)
        clients.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)  # who sends more is disconnected
        clients.linger = 0
        if keys is not None:
            self._ask_for(keys)
            keys.guard(clients)
        try:
            clients.bind(endpoint)
        except zmq.ZMQError as error:
            clients.close()
            raise PlanError(f"cannot listen on {endpoint}: {error.strerror}: choose another endpoint") from error
        if path is not None:
            path.chmod(0o600)
        self._socket, self._path = clients, path
        self._loop.watch(clients, self._receive)
        return clients.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0") if path is None else endpoint

    def _ask_for(self, keys: Keys) -> None:
        """ZeroMQ asks here whether somebody who knocks may come in."""
        judge = self._context.socket(zmq.REP)
        judge.linger = 0
        judge.bind(ZAP_ENDPOINT)

        def answer() -> None:
            judge.send_multipart(keys.answer(judge.recv_multipart()))

        self._judge = judge
        self._loop.watch(judge, answer)

    def send(self, client: bytes, message: Any) -> None:
        assert self._socket is not None
        try:
            self._socket.send_multipart([client, self._encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno == zmq.EAGAIN:
                self._dropped[client] = None
                if len(self._dropped) > MAX_DROPPED:
                    del self._dropped[next(iter(self._dropped))]
            self._on_gone(client)

    def tell_the_end(self, clients: Iterable[bytes], text: str) -> None:
        """The engine does nothing more for these clients, as far as they can still be told."""
        if self._socket is None:
            return
        for client in clients:
            with contextlib.suppress(zmq.ZMQError):
                self._socket.send_multipart([client, self._encode(client_messages.EngineFailed(text))], zmq.NOBLOCK)

    def close(self) -> None:
        if self._socket is not None:
            self._loop.forget(self._socket)
            self._socket.close(linger=500)
            self._socket = None
        if self._judge is not None:
            self._loop.forget(self._judge)
            self._judge.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _receive(self) -> None:
        assert self._socket is not None
        frames = self._socket.recv_multipart()  # one a time: the workers' messages come in between
        if len(frames) != 2:
            return
        try:
            message = self._decode(frames[1])
        except MessageError as error:
            self._complain(str(error))
            return
        if frames[0] in self._dropped:
            self.tell_the_end(frames[:1], f"{self._most_unread} answers were waiting for this client: it was given up")
        else:
            self._on_message(frames[0], message)

    def _complain(self, text: str) -> None:
        now = time.monotonic()
        if now - self._complaining_since > GARBAGE_SECONDS:
            self._complaining_since, self._num_complaints = now, 0
        self._num_complaints += 1
        if self._num_complaints <= GARBAGE_LINES:
            self._on_garbage(text)


def _refuse_taken(path: Path) -> None:
    """Binding would replace whatever is at the path; only a socket that nobody listens to may go.

    Raises:
        PlanError: something else is there.
    """
    if not path.exists():
        if not path.parent.is_dir():
            raise PlanError(f"endpoint ipc://{path}: {path.parent} is not a directory: make it first")
        return
    if not path.is_socket():
        raise PlanError(f"endpoint ipc://{path}: there is a file of that name: choose another endpoint")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        else:
            raise PlanError(f"endpoint ipc://{path} is in use by another engine: choose another endpoint")
