"""Processes of workers: fresh interpreters, and forks of a zygote, which has all libraries imported."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen_lite.wire.codec import MessageError
from flexgen_lite.wire.zygote_messages import (
    FROM_ZYGOTE,
    TO_ZYGOTE,
    Born,
    Ended,
    Fork,
    Forked,
    receive,
    send,
    with_descriptors,
)

SHARED = "FLEXGEN_LITE_ZYGOTES"
FORK_SECONDS = 10.0  # forking takes some milliseconds
REAP_SECONDS = 1.0
GONE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Launch:
    """`options` with their descriptors, which the process inherits: (option, what stands before the number, number).
    `output` becomes its standard output and error."""

    kind: str
    arguments: tuple[str, ...]
    options: tuple[tuple[str, str, int], ...]
    output: int


class FreshProcess(subprocess.Popen[bytes]):
    """`zygote`: where one that the process leaves behind takes orders."""

    def __init__(self, launch: Launch, environment: Mapping[str, str], zygote: int | None = None) -> None:
        options = launch.options if zygote is None else (*launch.options, ("--zygote", "", zygote))
        descriptors = [descriptor for *_, descriptor in options]
        names = [(option, name) for option, name, _ in options]
        super().__init__(
            [
                *(sys.executable, "-m", "flexgen_lite.workers", launch.kind),
                *with_descriptors(launch.arguments, names, descriptors),
            ],
            stdin=subprocess.DEVNULL,
            stdout=launch.output,
            stderr=launch.output,
            pass_fds=descriptors,
            env={**os.environ, **environment},
        )
        self.pidfd = os.pidfd_open(self.pid)


class ForkedProcess:
    """As much of a `subprocess.Popen` as is needed, for a child of the zygote."""

    def __init__(self, zygote: Zygote, pid: int, pidfd: int) -> None:
        self._zygote = zygote
        self.pid = pid
        self.pidfd = pidfd
        self._code: int | None = None

    def poll(self) -> int | None:
        """None while it lives."""
        return self.wait() if _is_readable(self.pidfd, 0) else None

    def wait(self, timeout: float | None = None) -> int | None:
        """Its exit code, negative for a signal; None where the zygote cannot tell any more.

        Raises:
            TimeoutExpired: it lives.
        """
        if not _is_readable(self.pidfd, timeout):
            raise subprocess.TimeoutExpired("worker", timeout or 0.0)
        if self._code is None:
            self._code = self._zygote.code_of(self.pid)
        if self._code is None:  # without the zygote it is this process's child
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def kill(self) -> None:
        _kill(self.pidfd)


Process = FreshProcess | ForkedProcess


class ZygoteLost(Exception):
    """It is gone, or does not answer."""


class Zygote:
    """Forks workers. `connection` leads to it, or to where it will be when a fresh worker leaves it behind."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._connection.settimeout(FORK_SECONDS)
        self._codes: dict[int, int] = {}
        self.pid = 0  # until it has told it
        self._pidfd = -1

    def fileno(self) -> int:
        return self._connection.fileno()

    def fork(self, launch: Launch, environment: Mapping[str, str]) -> ForkedProcess:
        """Raises ZygoteLost."""
        order = Fork(launch.arguments, tuple((option, name) for option, name, _ in launch.options), dict(environment))
        try:
            send(self._connection, TO_ZYGOTE, order, [launch.output, *(number for *_, number in launch.options)])
            return self._next_fork()
        except (OSError, ZygoteLost) as error:
            self._kill()
            raise ZygoteLost from error

    def _next_fork(self) -> ForkedProcess:
        while True:
            message, descriptors = self._receive()
            if isinstance(message, Forked):
                return ForkedProcess(self, message.pid, descriptors[0])

    def _kill(self) -> None:
        """With what it may have forked, and not told in time: another process will have that one's place."""
        if self._pidfd >= 0:
            _kill(self._pidfd)
            _is_readable(self._pidfd, GONE_SECONDS)
            self._connection.setblocking(False)
            with contextlib.suppress(ZygoteLost):
                late = self._next_fork()
                _kill(late.pidfd)
                _is_readable(late.pidfd, GONE_SECONDS)
                os.close(late.pidfd)

    def hear(self) -> None:
        """Takes in one message. Raises ZygoteLost."""
        self._receive()

    def code_of(self, pid: int) -> int | None:
        """Of a process that has ended."""
        with contextlib.suppress(ZygoteLost):
            while pid not in self._codes and self._is_open and _is_readable(self.fileno(), REAP_SECONDS):
                self._receive()
        return self._codes.get(pid)

    def close(self) -> None:
        """It ends. Workers that it has forked go on."""
        self._connection.close()
        if self._pidfd >= 0:
            if not _is_readable(self._pidfd, GONE_SECONDS):
                _kill(self._pidfd)
            with contextlib.suppress(ChildProcessError):  # it is another's child while its first worker lives
                os.waitpid(self.pid, os.WNOHANG)
            os.close(self._pidfd)
            self._pidfd = -1

    @property
    def _is_open(self) -> bool:
        return self.fileno() >= 0

    def _receive(self) -> tuple[Any, list[int]]:
        try:
            received = receive(self._connection, FROM_ZYGOTE)
        except (OSError, MessageError) as error:
            raise ZygoteLost from error
        if received is None:
            raise ZygoteLost
        message, descriptors = received
        if isinstance(message, Born | Forked) and not descriptors:  # there was no room for one here
            raise ZygoteLost
        if isinstance(message, Forked):
            self._codes.pop(message.pid, None)  # of an earlier process of this number
        elif isinstance(message, Born):
            self.pid, self._pidfd = message.pid, descriptors[0]
        elif isinstance(message, Ended):
            self._codes[message.pid] = message.code
        return message, descriptors


def shared_zygotes() -> dict[str, Zygote]:
    """By the kind of worker: those that listen at the sockets KIND.sock of the directory that SHARED names, where there
    is one. Whoever starts engines by the dozen keeps them, and each engine has forks of them."""
    found = {}
    for path in sorted(Path(os.environ.get(SHARED, "/nonexistent")).glob("*.sock")):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(str(path))
        except OSError:
            connection.close()
        else:
            found[path.stem] = Zygote(connection)
    return found


def _kill(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def _is_readable(descriptor: int, seconds: float | None) -> bool:
    """Within so many seconds; a process's descriptor is, once it has ended."""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(None if seconds is None else max(0.0, seconds) * 1000))
