"""A coordinator's client side without an engine behind it, for tests."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import zmq

from flexgen_lite.wire.client_messages import (
    PROTOCOL,
    Cancel,
    Connect,
    GetStatus,
    RequestDone,
    Status,
    Submit,
    ToClient,
    ToEngine,
    Welcome,
    WireOutput,
    WireRequest,
)
from flexgen_lite.wire.codec import Codec

_TO_CLIENT = Codec(ToClient)


def answer(job_id: str, request: WireRequest, error: str | None = None) -> RequestDone:
    """The prompt in capitals, or the token ids back."""
    prompt = request.prompt
    text = prompt.upper() if isinstance(prompt, str) else ""
    token_ids = tuple(range(len(prompt))) if isinstance(prompt, str) else prompt
    outputs = () if error is not None else (WireOutput(text, token_ids, "length"),)
    return RequestDone(job_id, request.index, len(prompt), outputs, error)


class FakeEngine:
    """Answers in a thread of its own, until `die()` or the end of the `with`.

    `hold` keeps requests until `release()`; `silent` receives and never answers but to Connect.
    """

    def __init__(
        self,
        path: Path,
        *,
        window: int = 8,
        protocol: int = PROTOCOL,
        hold: bool = False,
        silent: bool = False,
        on_submit: Callable[[Submit], list[Any] | None] | None = None,
        model: str = "fake",
        fingerprint: str = "0" * 16,
    ) -> None:
        self.endpoint = f"ipc://{path}"
        self.received: queue.Queue[Any] = queue.Queue()
        self.most_outstanding = 0
        self._outstanding: dict[tuple[str, int], tuple[bytes, WireRequest]] = {}
        self._window, self._protocol, self._model = window, protocol, model
        self._fingerprint = fingerprint
        self._hold, self._silent, self._on_submit = hold, silent, on_submit
        self._done = 0
        self._clients: set[bytes] = set()
        self._orders: queue.Queue[Callable[[], None]] = queue.Queue()
        self._ended, self._bound = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._bound.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.die()

    def die(self) -> None:
        """Close the socket without a word."""
        self._ended.set()
        self._thread.join(10)

    def release(self) -> None:
        """Answer all that is held, in reverse order, and hold no more."""
        self._orders.put(self._release)

    def broadcast(self, *messages: Any) -> None:
        """Send messages, or bytes that are none, to every client."""
        self._orders.put(lambda: [self._send(client, message) for client in self._clients for message in messages])

    def next_of(self, kind: type[Any]) -> Any:
        """Wait for the next received message of a kind."""
        while not isinstance(message := self.received.get(timeout=10), kind):
            pass
        return message

    def _run(self) -> None:
        context = zmq.Context()
        self._router = context.socket(zmq.ROUTER)
        self._router.set(zmq.LINGER, 200)
        self._router.set(zmq.SNDHWM, 0)  # it drops what does not fit
        self._router.bind(self.endpoint)
        self._bound.set()
        codec = Codec(ToEngine)
        while not self._ended.is_set():
            while not self._orders.empty():
                self._orders.get()()
            if self._router.poll(10):
                client, data = self._router.recv_multipart()
                self._handle(client, codec.decode(data))
        self._router.close()
        context.term()

    def _send(self, client: bytes, message: Any) -> None:
        data = message if isinstance(message, bytes) else _TO_CLIENT.encode(message)
        self._router.send_multipart([client, data])

    def _handle(self, client: bytes, message: Any) -> None:
        self._clients.add(client)
        if isinstance(message, Connect):
            self._send(client, Welcome(self._protocol, self._model, self._fingerprint, 100, self._window, "the plan"))
        elif isinstance(message, Submit):
            self._submit(client, message)
        elif isinstance(message, Cancel):
            for (job_id, index), (owner, request) in list(self._outstanding.items()):
                if job_id == message.job_id:
                    del self._outstanding[job_id, index]
                    self._send(
                        owner, RequestDone(job_id, index, len(request.prompt), (WireOutput("", (), "cancelled"),))
                    )
        elif isinstance(message, GetStatus) and not self._silent:
            totals = {"busy_seconds": 0.5 * self._done, "generated_tokens": 8.0 * self._done}
            lanes = {"compute": 0.9, "disk": 0.2}
            memory = {"budget": 4 << 30, "used": 1 << 30, "peak": 2 << 30}
            self._send(client, Status(0, len(self._outstanding), self._done, lanes, totals, memory))
        self.received.put(message)

    def _submit(self, client: bytes, message: Submit) -> None:
        if self._on_submit is not None and (replies := self._on_submit(message)) is not None:
            for reply in replies:
                self._send(client, reply)
            return
        for request in message.requests:
            self._outstanding[message.job_id, request.index] = (client, request)
        self.most_outstanding = max(self.most_outstanding, len(self._outstanding))
        if not self._hold and not self._silent:
            self._release()

    def _release(self) -> None:
        self._hold = False
        for (job_id, _), (client, request) in reversed(self._outstanding.items()):
            self._done += 1
            self._send(client, answer(job_id, request))
        self._outstanding.clear()
