"""A client's socket and the one thread that uses it."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

import zmq
from zmq.utils.monitor import recv_monitor_message

from flexgen_lite.access import Keys
from flexgen_lite.client_messages import (
    PROTOCOL,
    Cancel,
    Connect,
    EngineFailed,
    GetStatus,
    ReadDeltas,
    RequestDelta,
    RequestDone,
    Status,
    Submit,
    ToClient,
    ToEngine,
    Welcome,
)
from flexgen_lite.codec import Codec, MessageError
from flexgen_lite.errors import EngineError, NoStatus
from flexgen_lite.job import Job
from flexgen_lite.shown import shown, shown_path

_HIGH_WATER = 1000  # messages
_DELTAS_A_REPORT = 256
_FAREWELL_MS = 500  # for the last Cancel messages to go out
_CLOSE_SECONDS = 5.0
_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


class Connection:
    """Connects at once; the IO thread then sends what the jobs have ready and hands out what comes back.

    The IO thread alone touches the socket. Other threads leave orders in `_orders` and wake it through a socket
    pair. At most `Welcome.window` requests are at the engine at any time, shared by the jobs in turns.

    The engine is given up when it says so, when its end of the socket closes, when `epitaph()` returns its last
    words, or when it leaves a GetStatus unanswered for `answer_timeout` seconds. Then every waiting call ends.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        connect_timeout: float,
        heartbeat: float,
        answer_timeout: float,
        epitaph: Callable[[float], str | None] | None = None,
        keys: Keys | None = None,
    ) -> None:
        self.endpoint = endpoint
        self._keys = keys
        self._connect_timeout = connect_timeout
        self._heartbeat = heartbeat
        self._answer_timeout = answer_timeout
        self._epitaph = epitaph
        self._encode, self._decode = Codec(ToEngine).encode, Codec(ToClient).decode
        self._lock = threading.Lock()  # of the next four
        self._orders: deque[Connect | Cancel | GetStatus] = deque([Connect(PROTOCOL)])
        self._status_waiters: deque[Future[Status] | None] = deque()
        self._jobs: dict[str, Job] = {}
        self._error: EngineError | None = None
        self._closing = False
        self._welcomed: Future[Welcome] = Future()
        self._num_in_flight = 0
        self._num_deltas = 0  # read since the engine was told
        self._backlog: deque[bytes] = deque()
        self._asked_at: float | None = None  # when a GetStatus went out that nothing came after
        self._heard_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="flexgen-lite client", daemon=True)

    # ------------------------------------------------------------------ any thread

    def open(self) -> Welcome:
        """Connect and wait for the engine's welcome."""
        _check_endpoint(self.endpoint, self._keys)
        self._ear, self._bell = socket.socketpair()
        self._ear.setblocking(False)
        self._bell.setblocking(False)
        self._thread.start()
        return self._welcomed.result()

    def add(self, job: Job) -> None:
        with self._lock:
            self._check()
            if job.id in self._jobs and not self._jobs[job.id].is_settled:
                raise EngineError(
                    f"a job {job.id!r} is open already on this client: give another job_id", user_error=True
                )
            self._jobs[job.id] = job
        job.start()

    def cancel(self, job_id: str) -> None:
        with self._lock:
            if self._closing or self._error is not None:
                return
            self._orders.append(Cancel(job_id))
        self.wake()

    def status(self, timeout: float) -> Status:
        answer: Future[Status] = Future()
        with self._lock:
            self._check()
            self._orders.append(GetStatus())
            self._status_waiters.append(answer)
        self.wake()
        try:
            return answer.result(timeout)
        except TimeoutError:
            raise NoStatus(f"the engine at {self.endpoint} gave no status within {timeout:g} s") from None

    def wait_for_end(self, timeout: float) -> None:
        self._thread.join(timeout)
        if not self._thread.is_alive():
            self._check()

    def close(self) -> None:
        """End all jobs and the thread. Safe to call twice, and by the garbage collector: it takes no lock."""
        self._closing = True
        self.wake()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(_CLOSE_SECONDS)

    def wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it will wake anyway; closed: nothing to wake
            self._bell.send(b"\0")

    def _check(self) -> None:
        if self._closing:
            raise EngineError("the client is closed")
        if self._error is not None:
            raise EngineError(str(self._error))

    # ------------------------------------------------------------------ the IO thread

    def _run(self) -> None:
        context = zmq.Context()
        dealer = context.socket(zmq.DEALER)
        dealer.set(zmq.LINGER, 0)
        dealer.set(zmq.SNDHWM, _HIGH_WATER)
        dealer.set(zmq.RCVHWM, _HIGH_WATER)
        monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED | _REFUSED)
        if self._keys is not None:
            self._keys.identify(dealer)
        try:
            dealer.connect(self.endpoint)
            self._serve(dealer, monitor)
            error = EngineError("the client was closed")
            self._say_farewell(dealer)
        except EngineError as failure:
            error = failure
        except zmq.ZMQError as failure:
            error = EngineError(f"no connection to the engine at {self.endpoint}: {failure}", user_error=True)
        except Exception as failure:
            error = EngineError(f"the client failed: {type(failure).__name__}: {failure}")
        finally:
            dealer.disable_monitor()
            monitor.close(linger=0)
            dealer.close()
            context.term()
        self._give_up(error)

    def _serve(self, dealer: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        poller.register(monitor, zmq.POLLIN)
        poller.register(self._ear, zmq.POLLIN)
        welcome_by = time.monotonic() + self._connect_timeout
        while not self._closing:
            self._take_orders()
            self._fill_window()
            self._flush(dealer)
            poller.register(dealer, zmq.POLLIN | (zmq.POLLOUT if self._backlog else 0))
            ready = dict(poller.poll(int(1000 * min(1.0, self._heartbeat))))
            if self._ear.fileno() in ready:
                with contextlib.suppress(BlockingIOError):
                    self._ear.recv(4096)
            self._receive(dealer)
            if monitor in ready:
                event = recv_monitor_message(monitor)["event"]
                self._receive(dealer)
                if event & _REFUSED:
                    raise EngineError(
                        f"the engine at {self.endpoint} does not take this key: give the key_file it was started with",
                        user_error=True,
                    )
                raise self._gone("closed the connection", patience=2.0)
            self._check_time(welcome_by)

    def _take_orders(self) -> None:
        with self._lock:
            while self._orders:
                self._backlog.append(self._encode(self._orders.popleft()))

    def _fill_window(self) -> None:
        if not self._welcomed.done():
            return
        with self._lock:
            for job_id in [job_id for job_id, job in self._jobs.items() if job.is_settled]:
                del self._jobs[job_id]
            jobs = list(self._jobs.values())
        window = max(1, self._welcomed.result().window)
        sent = True
        while sent and len(self._backlog) < _HIGH_WATER:
            sent = False
            for job in jobs:
                if part := job.take(window - self._num_in_flight):
                    self._num_in_flight += len(part)
                    self._backlog.append(self._encode(Submit(job.id, part, job.keep, job.priority)))
                    sent = True
                    with self._lock:  # next time it is the others' turn first
                        self._jobs[job.id] = self._jobs.pop(job.id)

    def _flush(self, dealer: zmq.Socket[bytes]) -> None:
        with contextlib.suppress(zmq.Again):
            while self._backlog:
                dealer.send(self._backlog[0], zmq.NOBLOCK)
                self._backlog.popleft()

    def _receive(self, dealer: zmq.Socket[bytes]) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                frames = dealer.recv_multipart(zmq.NOBLOCK)
                self._heard_at, self._asked_at = time.monotonic(), None
                try:
                    message = self._decode(frames[0])
                except MessageError as error:
                    raise EngineError(
                        f"what answers at {self.endpoint} does not speak this protocol: {error}"
                    ) from None
                self._handle(message)

    def _handle(self, message: ToClient) -> None:
        if isinstance(message, RequestDone):
            job = self._jobs.get(message.job_id)
            if job is not None and job.complete(message):
                self._num_in_flight -= 1
        elif isinstance(message, RequestDelta):
            self._num_deltas += 1
            if self._num_deltas == _DELTAS_A_REPORT:
                self._backlog.append(self._encode(ReadDeltas(self._num_deltas)))
                self._num_deltas = 0
            if (job := self._jobs.get(message.job_id)) is not None:
                job.grow(message)
        elif isinstance(message, Status):
            with self._lock:
                waiter = self._status_waiters.popleft() if self._status_waiters else None
            if waiter is not None:
                waiter.set_result(message)
        elif isinstance(message, EngineFailed):
            raise EngineError(message.message)
        elif not self._welcomed.done():
            if message.protocol != PROTOCOL:
                raise EngineError(
                    f"the engine at {self.endpoint} speaks protocol {message.protocol}, this client {PROTOCOL}: "
                    "use the same version of flexgen-lite on both sides",
                    user_error=True,
                )
            self._welcomed.set_result(message)

    def _check_time(self, welcome_by: float) -> None:
        now = time.monotonic()
        if self._epitaph is not None and (words := self._epitaph(0)) is not None:
            raise EngineError(words)
        if not self._welcomed.done():
            if now > welcome_by:
                raise self._gone(f"did not answer within {self._connect_timeout:g} s")
        elif self._asked_at is not None:
            if now - self._asked_at > self._answer_timeout:
                raise self._gone(f"has not answered for {now - self._heard_at:.0f} s")
        elif now - self._heard_at > self._heartbeat:
            with self._lock:
                self._orders.append(GetStatus())
                self._status_waiters.append(None)
            self._asked_at = now

    def _gone(self, what: str, patience: float = 0) -> EngineError:
        words = self._epitaph(patience) if self._epitaph is not None else None
        return EngineError(words or f"the engine at {self.endpoint} {what}")

    def _say_farewell(self, dealer: zmq.Socket[bytes]) -> None:
        """Tell the engine that nobody waits for what is still open."""
        dealer.set(zmq.LINGER, _FAREWELL_MS)
        for job in list(self._jobs.values()):
            if not job.is_settled and not job.keep:
                self._backlog.append(self._encode(Cancel(job.id)))
        self._flush(dealer)

    def _give_up(self, error: EngineError) -> None:
        with self._lock:
            self._error = error
            jobs, self._jobs = list(self._jobs.values()), {}
            waiters, self._status_waiters = list(self._status_waiters), deque()
            self._ear.close()
            self._bell.close()
        for job in jobs:
            job.fail(error)
        for waiter in waiters:
            if waiter is not None:
                waiter.set_exception(EngineError(str(error)))
        if not self._welcomed.done():
            self._welcomed.set_exception(error)


def _check_endpoint(endpoint: str, keys: Keys | None) -> None:
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
