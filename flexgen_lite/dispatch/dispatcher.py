"""The process in front of several engines: serves clients as a coordinator does, and gives their requests to engines as
these have room."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq

from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.dispatch.engine_config import own_ram
from flexgen_lite.dispatch.engine_link import EngineLink
from flexgen_lite.dispatch.engines import Engines
from flexgen_lite.dispatch.open_requests import OpenRequests, Order
from flexgen_lite.dispatch.status_round import StatusRound
from flexgen_lite.engine.event_loop import EventLoop
from flexgen_lite.engine.events import emit, log
from flexgen_lite.engine.frontend import Frontend
from flexgen_lite.errors import EngineError
from flexgen_lite.plan.engine_parts import cpus_text, engine_parts
from flexgen_lite.plan.machine import inspect_machine
from flexgen_lite.plan.shared import IN_FRONT_BYTES
from flexgen_lite.plan.topology import inspect_topology
from flexgen_lite.plan.workload import Workload
from flexgen_lite.queue.client_jobs import MAX_OPEN, Answer
from flexgen_lite.wire import client_messages
from flexgen_lite.wire.access import read_key_file
from flexgen_lite.wire.client_messages import PROTOCOL, RequestDelta, RequestDone, Welcome

LOOK_SECONDS = 0.2  # between two looks at whether an engine that was lost is there again
BACKLOG_SECONDS = 0.05  # before what could not be sent is tried again
PLACES = 256  # of an engine that does not say


class Stopping(Exception):
    """The dispatcher was told to stop."""


class Dispatcher:
    """`with Dispatcher(config, run_dir, expected) as dispatcher: dispatcher.run()`; no process is left behind."""

    def __init__(self, config: EngineConfig, run_dir: Path, expected: Workload | None) -> None:
        self._config, self._run_dir = config, run_dir
        count = int(config.engines)
        self._ram = own_ram(config, inspect_machine()) + IN_FRONT_BYTES
        self._loop = EventLoop()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._requests = OpenRequests(MAX_OPEN * count)
        self._frontend = Frontend(
            self._loop,
            self._context,
            self._handle_client,
            lambda text: log(f"a client sent what is not a message: {text}"),
            lambda client: self._post(self._requests.forget(client)),
            MAX_OPEN * count,
        )
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._bell_read, self._bell_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._parts = engine_parts(config, inspect_topology(), count)
        self._engines = Engines(config, self._parts, self._ram - IN_FRONT_BYTES, run_dir, expected, log, self._ring)
        self._links: list[EngineLink] = []
        self._welcomes: dict[int, Welcome] = {}
        self._status = StatusRound(self._requests, count, self._ram, IN_FRONT_BYTES, self._answer_status)
        self._given_up: list[tuple[EngineLink, EngineError]] = []  # and nobody was told
        self._outage: str | None = None  # why no engine is open
        self._told: tuple[str | None, int] = (None, 0)  # of them to who started this process

    # ------------------------------------------------------------------------------------------------ life

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._wake_write)
        self._loop.watch(self._wake_read, self._stop)
        self._loop.watch(sys.stdin.fileno(), self._stop)
        self._loop.watch(self._bell_read, self._hear)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        text = "the engine was stopped" if error is None or isinstance(error, Stopping) else str(error)
        self._frontend.tell_the_end(self._requests.clients(), text)
        for link in self._links:
            link.close()
        self._engines.stop()
        self._frontend.close()
        self._context.destroy(linger=500)

    def run(self) -> None:
        """Start everything and serve until told to stop. Raises EngineError, PlanError or Stopping."""
        self._engines.start()
        while not self._engines.supervisors:
            if self._engines.failure is not None:
                raise self._engines.failure
            self._loop.step(None)
        for number, supervisor in enumerate(self._engines.supervisors):
            link = EngineLink(number, self, self._loop, self._context, partial(self._requests.num_at, number))
            self._links.append(link)
            link.follow(supervisor.follow(link))
        emit("plan", text=self._plan, decided=self._decided)
        while len(self._welcomes) < len(self._links):
            self._step()
        endpoint = self._config.endpoint or f"ipc://{self._run_dir}/engine.sock"
        key = read_key_file(self._config.key_file) if self._config.key_file else None
        emit("ready", endpoint=self._frontend.open(endpoint, key))
        while True:
            self._step()

    def _step(self) -> None:
        """One round of the event loop."""
        now = time.monotonic()
        moments = [self._status.next_at(now, self._links)]
        if any(link.is_out for link in self._links):
            moments.append(now + LOOK_SECONDS)
        if any(link.is_behind for link in self._links):
            moments.append(now + BACKLOG_SECONDS)
        nearest = min((moment for moment in moments if moment is not None), default=None)
        self._loop.step(None if nearest is None else max(0, int((nearest - now) * 1000) + 1))
        self._status.go_on(time.monotonic(), self._links)
        for link in self._links:
            link.look()
            link.flush()
        self._give_up()
        self._tell_of_engines()
        self._post(self._requests.share_out())

    def _stop(self) -> None:
        raise Stopping

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._bell_write, b"\0")

    def _hear(self) -> None:
        os.read(self._bell_read, 4096)

    # ------------------------------------------------------------------------------------------------ of all engines

    @property
    def _plan(self) -> str:
        cpus = ", ".join(f"engine {part.number} on CPUs {cpus_text(part.cpus)}" for part in self._parts)
        lines = [f"engines   {len(self._parts)} behind one queue: {cpus}"]
        of_each: dict[str, list[str]] = {}
        for number, supervisor in enumerate(self._engines.supervisors):
            of_each.setdefault(supervisor.plan, []).append(str(number))
        for plan, numbers in of_each.items():
            lines += [f"each of   engine {', '.join(numbers)}", plan]
        return "\n".join(lines)

    @property
    def _decided(self) -> dict[str, Any]:
        decided = dict(self._engines.supervisors[0].decided)
        return {**decided, "ram": self._ram, "engines": len(self._engines.supervisors)}

    def _welcome(self) -> Welcome:
        first, *_ = welcomes = list(self._welcomes.values())
        length = min(welcome.max_length for welcome in welcomes)
        window = MAX_OPEN * len(welcomes)
        return Welcome(PROTOCOL, self._config.model, first.fingerprint, length, window, self._plan, first.chat_template)

    # ------------------------------------------------------------------------------------------------ clients

    def _handle_client(self, client: bytes, message: Any) -> None:
        requests = self._requests
        match message:
            case client_messages.Connect():
                self._frontend.send(client, self._welcome())
            case client_messages.Submit():
                self._answer(requests.submit(client, message))
            case client_messages.Cancel():
                answers, orders = requests.cancel(client, message.job_id)
                self._answer(answers)
                self._post(orders)
            case client_messages.ReadDeltas():
                requests.deltas_read(client, message.count)
            case client_messages.GetStatus():
                self._status.ask(client)

    def _answer(self, answers: Iterable[Answer]) -> None:
        for client, message in answers:
            self._frontend.send(client, message)

    def _answer_status(self, client: bytes, status: client_messages.Status) -> None:
        self._frontend.send(client, status)

    # ------------------------------------------------------------------------------------------------ engines

    def _post(self, orders: Iterable[Order]) -> None:
        of_each: dict[int, list[Any]] = {}
        for number, message in orders:
            of_each.setdefault(number, []).append(message)
        for number, messages in of_each.items():
            self._links[number].post(messages)

    def welcomed(self, link: EngineLink, welcome: Welcome) -> None:
        first = next(iter(self._welcomes.values()), welcome)
        same = [(one.fingerprint, one.chat_template) for one in (first, welcome)]
        if same[0] != same[1]:
            raise EngineError(
                f"engine {link.number} has another model than the others: leave the model's files alone while they "
                "start",
                user_error=True,
            )
        self._outage = None
        self._welcomes[link.number] = welcome
        decided = self._engines.supervisors[link.number].decided
        self._requests.engine_ready(link.number, int(decided.get("max_sequences", PLACES)))
        link.ask_status()

    def answered(self, link: EngineLink, message: RequestDone | RequestDelta) -> None:
        if isinstance(message, RequestDone):
            self._answer(self._requests.done(link.number, message))
        else:
            self._answer(self._requests.delta(link.number, message))

    def told_status(self, link: EngineLink) -> None:
        """Once all that have work have told theirs, it is known who has too much of it."""
        told = [one for one in self._links if one.is_open and one.is_current and one.status is not None]
        waiting = {one.number: one.status.waiting for one in told if one.status is not None}
        if len(waiting) > 1:
            self._post(self._requests.even_out(waiting))

    def lost(self, link: EngineLink, why: str) -> None:
        self._note_outage(why)
        self._answer(self._requests.engine_lost(link.number, why))

    def gone(self, link: EngineLink, error: EngineError) -> None:
        self._note_outage(str(error))
        self._given_up.append((link, error))

    def _give_up(self) -> None:
        """Once all were looked at: the others go on. Without any, nothing does, and it would be so again."""
        is_end = all(one.is_gone for one in self._links)
        while self._given_up:
            link, error = self._given_up.pop(0)
            if is_end and not self._given_up:
                raise EngineError(str(error), user_error=error.user_error, details=error.details, comes_again=True)
            log(f"warning: engine {link.number} is given up: {error}" + ("" if is_end else "; the others go on"))

    def _note_outage(self, why: str) -> None:
        if not any(link.is_open for link in self._links):
            self._outage = f"{why}; no other engine is open, and one is being started again"

    def _tell_of_engines(self) -> None:
        news = (self._outage, sum(link.restarts for link in self._links))
        if news != self._told:
            self._told = news
            emit("engines", outage=news[0], restarts=news[1])
