"""The coordinator's side of a zygote, the process that has a worker's libraries imported and forks the worker."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexgen_lite.engine.launch import Launch
from flexgen_lite.wire import zygote_messages
from flexgen_lite.wire.codec import MessageError

SHARED = "FLEXGEN_LITE_ZYGOTES"
FORK_SECONDS = 10.0  # forking takes some milliseconds
REAP_SECONDS = 1.0
GONE_SECONDS = 2.0


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
        order = zygote_messages.Fork(launch.arguments, launch.names, dict(environment))
        descriptors = [launch.output, *launch.descriptors]
        try:
            zygote_messages.send(self._connection, zygote_messages.TO_ZYGOTE, order, descriptors)
            return self._next_fork()
        except (OSError, ZygoteLost) as error:
            self._kill()
            raise ZygoteLost from error

    def _next_fork(self) -> ForkedProcess:
        while True:
            message, descriptors = self._receive()
            if isinstance(message, zygote_messages.Forked):
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
            received = zygote_messages.receive(self._connection, zygote_messages.FROM_ZYGOTE)
        except (OSError, MessageError) as error:
            raise ZygoteLost from error
        if received is None:
            raise ZygoteLost
        message, descriptors = received
        tells_of_a_process = isinstance(message, zygote_messages.Born | zygote_messages.Forked)
        if tells_of_a_process and not descriptors:  # there was no room for one here
            raise ZygoteLost
        if isinstance(message, zygote_messages.Forked):
            self._codes.pop(message.pid, None)  # of an earlier process of this number
        elif isinstance(message, zygote_messages.Born):
            self.pid, self._pidfd = message.pid, descriptors[0]
        elif isinstance(message, zygote_messages.Ended):
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
