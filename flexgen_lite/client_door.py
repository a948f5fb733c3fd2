"""Where clients come in: one socket, bound when the engine is ready."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import zmq

from flexgen_lite import messages
from flexgen_lite.codec import Codec, MessageError
from flexgen_lite.event_loop import EventLoop
from flexgen_lite.plan import PlanError

MAX_MESSAGE_BYTES = 256 << 20


class ClientDoor:
    """Args:
    on_message: is given a client's identity and its message.
    on_garbage: is given what is wrong with what a client sent.
    on_gone: is given the identity of a client that could not be answered.
    """

    def __init__(
        self,
        loop: EventLoop,
        context: zmq.Context[zmq.Socket[bytes]],
        on_message: Callable[[bytes, Any], None],
        on_garbage: Callable[[str], None],
        on_gone: Callable[[bytes], None],
    ) -> None:
        self._loop = loop
        self._context = context
        self._on_message, self._on_garbage, self._on_gone = on_message, on_garbage, on_gone
        self._decode = Codec(messages.ToEngine, max_bytes=MAX_MESSAGE_BYTES).decode
        self._encode = Codec(messages.ToClient).encode
        self._socket: zmq.Socket[bytes] | None = None
        self._path: Path | None = None

    def open(self, endpoint: str) -> None:
        """From here on clients can connect. Raises PlanError where the endpoint cannot be had."""
        path = Path(endpoint.removeprefix("ipc://"))
        _refuse_taken(path)
        clients = self._context.socket(zmq.ROUTER)
        clients.setsockopt(zmq.ROUTER_MANDATORY, 1)
        clients.setsockopt(zmq.SNDHWM, 0)  # bounded by what clients may have open
        clients.linger = 0
        try:
            clients.bind(endpoint)
        except zmq.ZMQError as error:
            clients.close()
            raise PlanError(f"cannot listen on {endpoint}: {error.strerror}: choose another endpoint") from error
        path.chmod(0o600)
        self._socket, self._path = clients, path
        self._loop.watch(clients, self._receive)

    def send(self, client: bytes, message: Any) -> None:
        assert self._socket is not None
        try:
            self._socket.send_multipart([client, self._encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError:
            self._on_gone(client)

    def tell_the_end(self, clients: Iterable[bytes], text: str) -> None:
        """The engine is going down, as far as they can still be told."""
        if self._socket is None:
            return
        for client in clients:
            with contextlib.suppress(zmq.ZMQError):
                self._socket.send_multipart([client, self._encode(messages.EngineFailed(text))], zmq.NOBLOCK)

    def close(self) -> None:
        if self._socket is not None:
            self._loop.forget(self._socket)
            self._socket.close(linger=500)
            self._socket = None
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
            self._on_garbage(str(error))
            return
        self._on_message(frames[0], message)


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
