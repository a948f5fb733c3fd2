"""One worker process: started, listened to, and gone at the end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import zmq

from flexgen_lite.engine.launch import FreshProcess, Launch
from flexgen_lite.engine.zygote import ForkedProcess
from flexgen_lite.wire import worker_messages
from flexgen_lite.wire.codec import Codec, MessageError
from flexgen_lite.wire.kv_on_disk import PrefixesOpened

LAST_WORDS_BYTES = 4096
STOP_SECONDS = 5.0
KILL_SECONDS = 10.0  # for the system to clear away a process that was killed
UNASKED = worker_messages.ComputeReport | worker_messages.AttentionReport | PrefixesOpened
"""Answers to no order."""
CODECS = {
    "loader": (Codec(worker_messages.ToLoader), Codec(worker_messages.FromLoader)),
    "attention": (Codec(worker_messages.ToAttention), Codec(worker_messages.FromAttention)),
    "compute": (Codec(worker_messages.ToCompute), Codec(worker_messages.FromCompute)),
}


class WorkerDied(Exception):
    """A worker process ended, or failed, or did not answer; the message says which and gives its last words.

    `kind`: the exception that it failed with, "" for another end. `user_error`: the message says it all.
    """

    def __init__(self, message: str, details: str = "", kind: str = "", user_error: bool = False) -> None:
        super().__init__(message)
        self.details = details
        self.kind = kind
        self.user_error = user_error


class WorkerProcess:
    """One worker: its process, its socket, what it prints and a descriptor that tells of its death.

    Args:
        kind: "loader", "attention" or "compute": the module in flexgen_lite.workers.
        name: for people: "attention worker 1".
        number: how many of that name there were before.
        arenas, doorbells: name -> file descriptor, inherited.
        start: makes the process.
    """

    def __init__(
        self,
        kind: str,
        name: str,
        number: int,
        context: zmq.Context[zmq.Socket[bytes]],
        run_dir: Path,
        arenas: Mapping[str, int],
        doorbells: Mapping[str, int],
        start: Callable[[Launch], FreshProcess | ForkedProcess],
    ) -> None:
        self.kind = kind
        self.name = name
        self.number = number
        self.started = time.monotonic()
        self.greeted = False  # it has said Hello
        self.outstanding = 0  # orders without an answer
        self.waiting_since = 0.0
        self._encoder, self._decoder = CODECS[kind]
        self._last_words = b""
        self._before_hello: deque[bytes] = deque()  # a socket without a peer takes nothing
        address = f"ipc://{run_dir}/{name.replace(' ', '-')}-{number}.sock"
        self.socket = context.socket(zmq.PAIR)
        self.socket.linger = 0
        self.socket.sndhwm = self.socket.rcvhwm = 0  # what is on its way is bounded by the orders of a pass
        self.socket.bind(address)
        lifeline, self._lifeline = os.pipe()
        self.output, output = os.pipe()
        os.set_blocking(self.output, False)
        options = (
            ("--lifeline", "", lifeline),
            *(("--arena", f"{arena}=", descriptor) for arena, descriptor in arenas.items()),
            *(("--doorbell", f"{end}=", descriptor) for end, descriptor in doorbells.items()),
        )
        arguments = ("--name", name, "--endpoint", address, "--run-dir", str(run_dir))
        try:
            self.process = start(Launch(kind, arguments, options, output))
        finally:
            os.close(lifeline)
            os.close(output)
        self.pid = self.process.pid
        self.pidfd = self.process.pidfd

    @property
    def index(self) -> int:
        """Of an attention worker, among them."""
        return int(self.name.rpartition(" ")[2])

    def send(self, message: Any, expects_answer: bool = True) -> None:
        if expects_answer:
            if self.outstanding == 0:
                self.waiting_since = time.monotonic()
            self.outstanding += 1
        data = self._encoder.encode(message)
        if self.greeted:
            self._send_now(data)
        else:
            self._before_hello.append(data)

    def _send_now(self, data: bytes) -> None:
        """Never waits. The socket of a worker that is gone takes nothing: its descriptor tells the rest."""
        with contextlib.suppress(zmq.Again):
            self.socket.send(data, zmq.NOBLOCK)

    def receive(self) -> Any:
        """The next message. Raises WorkerDied for a worker's own report of failure."""
        try:
            message = self._decoder.decode(self.socket.recv())
        except MessageError as error:
            raise WorkerDied(f"{self.name} (process {self.pid}) sent what is not a message: {error}") from error
        if isinstance(message, worker_messages.Failed):
            text = message.message if message.user_error else f"{self.name} failed: {message.kind}: {message.message}"
            raise WorkerDied(text, message.details, message.kind, message.user_error)
        if isinstance(message, worker_messages.Hello):
            if message.pid != self.pid:  # a fork that came too late, and ends with this worker's pipe
                raise WorkerDied(f"{self.name} (process {self.pid}) has its place taken by process {message.pid}")
            self.greeted = True
            while self._before_hello:
                self._send_now(self._before_hello.popleft())
        else:
            if not isinstance(message, UNASKED):
                self.outstanding = max(0, self.outstanding - 1)
            self.waiting_since = time.monotonic()
        return message

    def read_output(self) -> bytes | None:
        """What the worker printed since the last call, None where nothing, b"" at its end; the last of it is kept as
        its last words."""
        try:
            data = os.read(self.output, 65536)
        except BlockingIOError:
            return None
        self._last_words = (self._last_words + data)[-LAST_WORDS_BYTES:]
        return data

    def death(self) -> WorkerDied:
        """Why the process, whose pidfd has spoken, ended."""
        code = self.process.wait()
        patience_ms = 500 if code in (1, None) else 0  # 1: it has reported, and the report may still be on its way
        while self.socket.poll(patience_ms):
            try:
                self.receive()
            except WorkerDied as failure:
                return failure
        while self.read_output():
            pass
        how = "ended" if code is None else f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        words = self._last_words.decode(errors="replace").strip()
        ending = f"; its last words: {words.splitlines()[-1]}" if words else ""
        return WorkerDied(f"{self.name} (process {self.pid}) {how}{ending}", words)

    def kill(self) -> None:
        """Afterwards the process is gone, and touches no arena any more."""
        self.process.kill()
        try:
            self.process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            raise WorkerDied(
                f"{self.name} (process {self.pid}) cannot be killed: it waits for the system, mostly for a disk"
            ) from None

    def close(self) -> None:
        """The process must have ended."""
        self.socket.close()
        for descriptor in (self.pidfd, self._lifeline, self.output):
            os.close(descriptor)


def stop_all(workers: Iterable[WorkerProcess], seconds: float = STOP_SECONDS) -> None:
    """Ask every worker to stop, wait, and kill those that do not; afterwards none is left.

    A worker that is still importing its libraries would not hear it, and holds nothing: it is killed at once.
    """
    alive = [worker for worker in workers if worker.process.poll() is None]
    for worker in alive:
        if not worker.greeted:
            worker.process.kill()
        with contextlib.suppress(zmq.ZMQError):
            worker.socket.send(worker._encoder.encode(worker_messages.Stop()), zmq.NOBLOCK)
    deadline = time.monotonic() + seconds
    for worker in alive:
        try:
            worker.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(KILL_SECONDS)
    for worker in workers:
        worker.close()
