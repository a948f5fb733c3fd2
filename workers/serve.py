"""The shell around a worker: one socket, one crash boundary, and an end that follows the coordinator's.

A worker object never sees the socket: `serve` decodes what arrives, calls `handle(message)`, and sends what the worker
posts. Notes of other workers (doorbells.py) go to `heard(doorbell, note)`; what became possible is done by `work()`, a
piece at a time. `post` may be called from any thread; nothing here polls or sleeps.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import fcntl
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import zmq

from flexgen_lite.model.files import CheckpointError
from flexgen_lite.text.shown import shown_path
from flexgen_lite.wire import worker_messages
from flexgen_lite.wire.codec import Codec
from flexgen_lite.wire.doorbells import Note, heard
from flexgen_lite.workers import zygote


class UserError(Exception):
    """Something the user can act on: the message says it all."""


def first_line(error: Exception) -> str:
    """What an error says, in one line that is not long; the next one as well where the first but introduces it."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return shown_path(" ".join(line.strip() for line in lines[: 1 + lines[0].endswith(":")]))


class Worker:
    """What the shell asks of a worker; one that hears no doorbells only handles messages."""

    def handle(self, message: Any) -> None:
        raise NotImplementedError

    def heard(self, doorbell: str, note: Note) -> None:
        """Another worker rang."""
        raise NotImplementedError

    def work(self) -> bool:
        """Do one piece of what can be done now; False if there is nothing."""
        return False

    def report(self, items: tuple[Any, ...]) -> Any:
        """The message that tells of `items`, which were given to `Context.tell`."""
        raise NotImplementedError


class Context:
    """What a worker is given: name, file descriptors of the arenas, doorbells, private directory, and `post`."""

    def __init__(self, name: str, arenas: dict[str, int], doorbells: dict[str, socket.socket], run_dir: str) -> None:
        self.name = name
        self.arenas = arenas
        self.doorbells = doorbells
        self.run_dir = run_dir
        self._thread = threading.get_ident()
        self._items: list[Any] = []
        self._tell_at = 0.0
        self._outbox: collections.deque[Any] = collections.deque()
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def post(self, message: Any) -> None:
        """Send a message to the coordinator; from any thread."""
        self._outbox.append(message)
        self.wake()

    def wake(self) -> None:
        """Have `work` called; from any thread."""
        if threading.get_ident() != self._thread:
            os.eventfd_write(self.wake_fd, 1)

    def tell(self, item: Any, at_once: bool) -> None:
        """Have `item` reported to the coordinator, with others, within REPORT_SECONDS; in the worker's own thread."""
        if not self._items:
            self._tell_at = time.monotonic() + worker_messages.REPORT_SECONDS
        self._items.append(item)
        if at_once:
            self._tell_at = 0.0

    def forget_items(self) -> None:
        """What was to be reported matters no more."""
        self._items = []

    def due(self) -> tuple[Any, ...]:
        """What has to be reported now."""
        if not self._items or time.monotonic() < self._tell_at:
            return ()
        items, self._items = tuple(self._items), []
        return items

    def patience_ms(self) -> int | None:
        """How long the worker may sleep; None for as long as it likes."""
        return None if not self._items else max(0, int((self._tell_at - time.monotonic()) * 1000)) + 1

    def drain(self) -> list[Any]:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.wake_fd)
        messages = []
        while self._outbox:
            messages.append(self._outbox.popleft())
        return messages


def run(receives: Any, sends: Any, make_worker: Callable[[Context], Worker]) -> NoReturn:
    """Runs one worker process until Stop, the coordinator's end, or an error, and ends the process."""
    code = _serve(_arguments(), receives, sends, make_worker)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at once: taking torch down in order takes a second, and there is nothing left to save


def _serve(args: argparse.Namespace, receives: Any, sends: Any, make_worker: Callable[[Context], Worker]) -> int:
    zygote.name_process(args.name)
    faulthandler.enable()
    threading.excepthook = _die_of_thread
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the coordinator's business
    _die_with_coordinator(args.lifeline)
    doorbells = {name: socket.socket(fileno=fd) for name, fd in args.doorbell}
    inbound, outbound = Codec(receives), Codec(sends)
    with zmq.Context(io_threads=1) as zmq_context, zmq_context.socket(zmq.PAIR) as channel:
        channel.linger = 1000  # the last words have to arrive
        channel.connect(args.endpoint)
        channel.send(outbound.encode(worker_messages.Hello(args.name, os.getpid())))
        try:
            context = Context(args.name, dict(args.arena), doorbells, args.run_dir)
            _loop(channel, args.lifeline, context, make_worker(context), inbound, outbound)
        except Exception as error:  # the one crash boundary: report, then die
            channel.send(outbound.encode(_failure(error)))
            return 1
    return 0


def _loop(
    channel: zmq.Socket[bytes], lifeline: int, context: Context, worker: Worker, inbound: Codec, outbound: Codec
) -> None:
    poller = zmq.Poller()
    doorbells = {doorbell.fileno(): name for name, doorbell in context.doorbells.items()}
    for source in (channel, lifeline, context.wake_fd, *doorbells):
        poller.register(source, zmq.POLLIN)
    busy = False
    while True:
        if items := context.due():
            context.post(worker.report(items))
        for message in context.drain():
            channel.send(outbound.encode(message))
        ready = dict(poller.poll(0 if busy else context.patience_ms()))
        if lifeline in ready:
            return  # the coordinator is gone
        for source in ready:
            if source in doorbells:
                name = doorbells[source]
                for note in heard(context.doorbells[name]):
                    worker.heard(name, note)
        if channel in ready:
            message = inbound.decode(channel.recv())
            if isinstance(message, worker_messages.Stop):
                return
            worker.handle(message)
        busy = worker.work()


def _die_of_thread(args: threading.ExceptHookArgs) -> None:
    """An exception in any thread ends the process: a worker that lacks a thread would hang."""
    traceback.print_exception(args.exc_type, args.exc_value, args.exc_traceback)
    sys.stderr.flush()
    os._exit(1)


def _failure(error: Exception) -> worker_messages.Failed:
    """A sentence where that says it all, which all is that can be wrong with the model's files; else a traceback for
    the log as well."""
    user_error = isinstance(error, UserError | CheckpointError)
    details = "".join(traceback.format_exception(error))
    if not user_error:
        sys.stderr.write(details)
    return worker_messages.Failed(type(error).__name__, str(error), details, user_error)


def _arguments() -> argparse.Namespace:
    """This worker's; in one that a zygote has forked those that it was given."""
    args = _parse_arguments(sys.argv[1:])
    if args.zygote is None:
        return args
    inherited = (args.lifeline, *(descriptor for _, descriptor in (*args.arena, *args.doorbell)))
    forked = zygote.leave_behind(socket.socket(fileno=args.zygote), inherited)
    return args if forked is None else _parse_arguments(forked)


def _parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--run-dir", required=True)
    parser.add_argument(
        "--lifeline", type=int, required=True, help="read end of a pipe that the coordinator holds open"
    )
    parser.add_argument("--arena", type=_named, action="append", default=[], metavar="NAME=DESCRIPTOR")
    parser.add_argument("--doorbell", type=_named, action="append", default=[], metavar="NAME=DESCRIPTOR")
    parser.add_argument("--zygote", type=int, help="where one that is left behind takes orders")
    return parser.parse_args(arguments)


def _named(text: str) -> tuple[str, int]:
    name, _, descriptor = text.partition("=")
    return name, int(descriptor)


def _die_with_coordinator(lifeline: int) -> None:
    """SIGKILL for this process as soon as the other end of the pipe is closed, whatever it is busy with."""
    if hasattr(fcntl, "F_SETSIG"):  # Linux
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:
        sys.exit("the coordinator was gone before this worker started")


def set_affinity(cpus: tuple[int, ...]) -> None:
    """Bind this process, threads started later included, to `cpus`; nothing where the tuple is empty."""
    if cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)
