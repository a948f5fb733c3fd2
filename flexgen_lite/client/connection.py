"""A client's connection to its engine, and to the next one where that is lost, with the one thread that serves it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import zmq

from flexgen_lite.client.engine_owner import EngineLost, EngineOwner
from flexgen_lite.client.engine_socket import EngineSocket, check_endpoint
from flexgen_lite.client.job import Job
from flexgen_lite.client.orders import ClientOrders
from flexgen_lite.client.status_sum import StatusSum
from flexgen_lite.errors import EngineError, NoStatus, fresh
from flexgen_lite.wire.access import Keys
from flexgen_lite.wire.client_messages import (
    PROTOCOL,
    Cancel,
    Connect,
    EngineFailed,
    ReadDeltas,
    RequestDelta,
    RequestDone,
    Status,
    Submit,
    ToClient,
    Welcome,
)
from flexgen_lite.wire.codec import MessageError

_DELTAS_A_REPORT = 256
_LAST_WORDS_SECONDS = 2.0  # for an engine that has closed its end to be known to be dead
_ENDING_SECONDS = 15.0  # for an engine that said that it fails to stop its workers and end
_NEXT_ENGINE_SECONDS = 0.2  # between two looks at whether this is to end, while another engine starts
_COUNT_SECONDS = 1.0  # what an engine counted since is not known when it is lost
_FAREWELL_SECONDS = 5.0  # for an engine to hear the last that it is told
_CLOSE_SECONDS = 2 * _FAREWELL_SECONDS + 1.0


class Connection:
    """Connects at once; the IO thread then sends what the jobs have ready and hands out what comes back.

    The IO thread alone touches the socket. Other threads leave orders and wake it through a socket pair. At most
    `Welcome.window` requests are at the engine at any time, shared by the jobs in turns.

    The engine is given up when it says so, when its end of the socket closes, when `epitaph()` returns its last
    words, or when it leaves a GetStatus unanswered for `answer_timeout` seconds. Then every waiting call ends; with
    an `owner` only if no other engine follows. One that follows is sent what was not answered, and nobody is told
    anything twice.
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
        owner: EngineOwner | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.outage: str | None = None  # why the engine is not there now, while another one is started
        self.num_in_flight = 0  # requests that the engine has, or had when it was lost, and did not answer
        self._keys = keys
        self._connect_timeout = connect_timeout
        self._heartbeat = heartbeat
        self._answer_timeout = answer_timeout
        self._owner = owner
        self._epitaph = epitaph if owner is None else owner.last_words
        self._orders = ClientOrders()
        self._lock = threading.Lock()  # of the next two
        self._jobs: dict[str, Job] = {}
        self._error: EngineError | None = None
        self._closing = False
        self._end_by = 0.0  # with the closing
        self._welcomed: Future[Welcome] = Future()  # by the first engine
        self._sum = StatusSum()
        self._begin()
        self._thread = threading.Thread(target=self._run, name="flexgen-lite client", daemon=True)

    # ------------------------------------------------------------------ any thread

    def open(self) -> Welcome:
        """Connect and wait for the engine's welcome."""
        if self._owner is None:
            check_endpoint(self.endpoint, self._keys)
        self._ear, self._bell = socket.socketpair()
        self._ear.setblocking(False)
        self._bell.setblocking(False)
        self._thread.start()
        try:
            return self._welcomed.result()
        except BaseException:
            self.close()
            raise

    @property
    def outage_behind(self) -> str | None:
        """As EngineOwner has it."""
        return None if self._owner is None else self._owner.outage

    def add(self, job: Job) -> None:
        with self._lock:
            self._check()
            if job.id in self._jobs and not self._jobs[job.id].is_settled:
                raise EngineError(
                    f"a job {job.id!r} is open already on this client: give another job_id", user_error=True
                )
            self._jobs[job.id] = job
        job.start()

    def cancel(self, job_id: str, wait: bool) -> None:
        """With `wait`: returns when the engine has heard it, or is gone."""
        with self._lock:
            if self._closing or self._error is not None:
                return
            wait = wait and self.outage is None and threading.current_thread() is not self._thread
            heard = self._orders.cancel(job_id, heard=wait)
        self.wake()
        if heard is not None:
            heard.result()

    def status(self, timeout: float) -> Status:
        answer: Future[Status] = Future()
        with self._lock:
            self._check()
            self._orders.ask_status(answer)
        self.wake()
        try:
            return answer.result(timeout)
        except TimeoutError:
            why = "" if self.outage is None else f": {self.outage}"
            raise NoStatus(f"the engine at {self.endpoint} gave no status within {timeout:g} s{why}") from None

    def wait_for_end(self, timeout: float) -> None:
        self._thread.join(timeout)
        if not self._thread.is_alive():
            self._check()

    def close(self) -> None:
        """End all jobs and the thread, when the engine has heard what it was told, or in some seconds. Safe to call
        twice, and by the garbage collector: it takes no lock."""
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
            raise fresh(self._error)

    # ------------------------------------------------------------------ the IO thread

    def _run(self) -> None:
        context = zmq.Context()
        try:
            while not self._closing:
                try:
                    with EngineSocket(context, self.endpoint, self._keys, self._ear) as engine:
                        self._serve(engine)
                except EngineLost as loss:
                    if self._owner is None:
                        raise EngineError(str(loss)) from None
                    self._wait_for_another(loss, self._owner)
            error = EngineError("the client was closed")
        except EngineError as failure:
            error = failure
        except zmq.ZMQError as failure:
            error = EngineError(f"no connection to the engine at {self.endpoint}: {failure}", user_error=True)
        except Exception as failure:
            error = EngineError(f"the client failed: {type(failure).__name__}: {failure}")
        finally:
            context.term()
        self._give_up(error)

    def _begin(self) -> None:
        """Nothing is known of the engine yet, nor has it been sent anything."""
        self.num_in_flight = 0
        self._greeted = False
        self._num_deltas = 0  # read since the engine was told
        self._asked_at: float | None = None  # when a GetStatus went out that nothing came after
        self._heard_at = self._counted_at = time.monotonic()

    def _serve(self, engine: EngineSocket) -> None:
        self._begin()
        engine.post(Connect(PROTOCOL))
        welcome_by = time.monotonic() + self._connect_timeout
        while not self._closing or self._has_to_be_sent():
            self._fill(engine)
            engine.wait(min(1.0, self._heartbeat))
            try:
                for message in engine.receive():
                    self._heard_at, self._asked_at = time.monotonic(), None
                    self._handle(engine, message)
            except MessageError as error:
                raise EngineLost(f"what answers at {self.endpoint} does not speak this protocol: {error}", 0) from None
            if engine.is_refused and self._owner is None:  # who starts the engine gives it the keys
                raise EngineError(
                    f"the engine at {self.endpoint} does not take this key, or has just ended: give the key_file that "
                    "it was started with",
                    user_error=True,
                )
            if engine.is_closed:
                raise self._lost("closed the connection", patience=_LAST_WORDS_SECONDS)
            self._check_time(welcome_by)
        self._say_farewell(engine)

    def _fill(self, engine: EngineSocket) -> None:
        """Post what other threads have asked for, and what jobs have ready, as far as there is room."""
        if not self._greeted:
            return
        for order in self._orders.take():
            engine.post(order)
        with self._lock:
            for job_id in [job_id for job_id, job in self._jobs.items() if job.is_settled]:
                del self._jobs[job_id]
            jobs = list(self._jobs.values())
        window = max(1, self._welcomed.result().window)
        sent = True
        while sent and engine.has_room:
            sent = False
            for job in jobs:
                if part := job.take(window - self.num_in_flight):
                    self.num_in_flight += len(part)
                    engine.post(Submit(job.id, part, job.keep, job.priority))
                    sent = True
                    with self._lock:  # next time it is the others' turn first
                        self._jobs[job.id] = self._jobs.pop(job.id)

    def _handle(self, engine: EngineSocket, message: ToClient) -> None:
        match message:
            case RequestDone():
                job = self._jobs.get(message.job_id)
                if job is not None and job.complete(message):
                    self.num_in_flight -= 1
                    if self._owner is not None and _is_finished(message):
                        self._owner.has_finished_one()
            case RequestDelta():
                self._num_deltas += 1
                if self._num_deltas == _DELTAS_A_REPORT:
                    engine.post(ReadDeltas(self._num_deltas))
                    self._num_deltas = 0
                if (job := self._jobs.get(message.job_id)) is not None:
                    job.grow(message)
            case Status():
                owner = self._owner
                self._orders.answer(message if owner is None else self._sum.of(message, owner.restarts))
            case EngineFailed():
                raise EngineLost(message.message, _ENDING_SECONDS)
            case Welcome() if not self._greeted:
                self._take_welcome(message)

    def _take_welcome(self, message: Welcome) -> None:
        if message.protocol != PROTOCOL:
            raise EngineError(
                f"the engine at {self.endpoint} speaks protocol {message.protocol}, this client {PROTOCOL}: "
                "use the same version of flexgen-lite on both sides",
                user_error=True,
            )
        if not self._welcomed.done():
            self._welcomed.set_result(message)
        elif message.fingerprint != self._welcomed.result().fingerprint:
            raise EngineError(
                f"{message.model} is another model than before the engine was started again: start anew, and leave the "
                "model's files alone meanwhile",
                user_error=True,
            )
        self._greeted, self.outage = True, None

    def _check_time(self, welcome_by: float) -> None:
        now = time.monotonic()
        if self._epitaph is not None and (words := self._epitaph(0)) is not None:
            raise EngineLost(words, _ENDING_SECONDS)
        if not self._greeted:
            if now > welcome_by:
                raise self._lost(f"did not answer within {self._connect_timeout:g} s")
        elif self._asked_at is not None:
            if now - self._asked_at > self._answer_timeout:
                raise self._lost(f"has not answered for {now - self._heard_at:.0f} s")
        elif now - self._heard_at > self._heartbeat or self._counts_are_old(now):
            self._orders.ask_status()
            self._asked_at = self._counted_at = now

    def _counts_are_old(self, now: float) -> bool:
        return self._owner is not None and self.num_in_flight > 0 and now - self._counted_at > _COUNT_SECONDS

    def _lost(self, what: str, patience: float = 0) -> EngineLost:
        """`patience`: for it to have died, so that its own words tell why."""
        words = self._epitaph(patience) if self._epitaph is not None else None
        return EngineLost(words or f"the engine at {self.endpoint} {what}", _ENDING_SECONDS if words else 0)

    def _wait_for_another(self, loss: EngineLost, owner: EngineOwner) -> None:
        """What was not answered is sent to the engine that follows.

        Raises:
            EngineError: none follows.
        """
        with self._lock:  # from here on no cancel waits
            self.outage = f"{loss}; it is being started again"
        self._sum.engine_lost()
        self._orders.engine_lost()
        with self._lock:
            jobs = list(self._jobs.values())
        self.num_in_flight = sum(job.requeue() for job in jobs)
        owner.lost(loss)
        while not self._closing:
            if (endpoint := owner.endpoint(_NEXT_ENGINE_SECONDS)) is not None:
                self.endpoint = endpoint
                return

    def _has_to_be_sent(self) -> bool:
        """Whether the client is to be closed, but not before the engine has more of the jobs that it is to keep."""
        now = time.monotonic()
        self._end_by = self._end_by or now + _FAREWELL_SECONDS
        room = self._greeted and self.num_in_flight < self._welcomed.result().window
        return room and now < self._end_by and any(job.keep and job.has_more for job in list(self._jobs.values()))

    def _say_farewell(self, engine: EngineSocket) -> None:
        """Tell the engine what it was still to be told, and that nobody waits for what is open; have that confirmed."""
        if not self._greeted:
            return
        for job in list(self._jobs.values()):
            if not job.is_settled and not job.keep:
                engine.post(Cancel(job.id))
        heard = self._orders.ask_whether_heard()
        for order in self._orders.take():
            engine.post(order)
        end_by = time.monotonic() + _FAREWELL_SECONDS
        while not heard.done() and not engine.is_closed and (left := end_by - time.monotonic()) > 0:
            engine.wait(min(_NEXT_ENGINE_SECONDS, left))
            with contextlib.suppress(MessageError):
                for message in engine.receive():
                    if isinstance(message, Status):
                        self._orders.answer(message)
            if self._epitaph is not None and self._epitaph(0) is not None:
                return
        engine.linger()

    def _give_up(self, error: EngineError) -> None:
        with self._lock:
            self._error = error
            jobs, self._jobs = list(self._jobs.values()), {}
            self._ear.close()
            self._bell.close()
        self._orders.fail(error)
        for job in jobs:
            job.fail(error)
        if not self._welcomed.done():
            self._welcomed.set_exception(error)


def _is_finished(message: RequestDone) -> bool:
    """Whether the engine has done the request's work."""
    return message.error is None and all(output.finish_reason != "cancelled" for output in message.outputs)
