"""A zygote: a process that has imported a worker's libraries, and forks that worker in milliseconds.

A fresh worker leaves one behind as soon as its libraries are there, and before anything else is: one thread, no CUDA
context, no socket. The zygote waits for the coordinator's orders, and ends when the coordinator does.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

from flexgen_lite.wire import zygote_messages

PR_SET_NAME = 15


def leave_behind(connection: socket.socket, inherited: Iterable[int]) -> list[str] | None:
    """Forks the zygote. Returns None in this process, and its arguments in each worker that the zygote forks later.
    Nothing is left behind where the process has several threads, of which a fork would have but one.

    `inherited`: this worker's descriptors, which are not the zygote's.
    """
    with connection:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if len(os.listdir("/proc/self/task")) > 1 or os.fork() > 0:
            return None
        try:
            _let_go(inherited)
            name_process("zygote")
            return serve(connection)
        except BaseException:
            traceback.print_exc()
            os._exit(1)


def serve(connection: socket.socket) -> list[str]:
    """Forks workers until the coordinator is gone, and ends the process then. Returns in each of the workers."""
    itself = os.pidfd_open(os.getpid())
    _tell(connection, zygote_messages.Born(os.getpid()), itself)
    os.close(itself)
    poller = select.poll()
    poller.register(connection, select.POLLIN)
    children: dict[int, int] = {}  # by the descriptors of their processes
    while True:
        for ready, _ in poller.poll():
            if ready in children:
                poller.unregister(ready)
                pid = children.pop(ready)
                os.close(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                _tell(connection, zygote_messages.Ended(pid, code))
                continue
            order, (output, *descriptors) = _hear(connection)
            pid = os.fork()
            if pid == 0:
                for other in (connection.detach(), *children):
                    os.close(other)
                _become(order, output)
                return zygote_messages.with_descriptors(order.arguments, order.options, descriptors)
            handle = os.pidfd_open(pid)
            _tell(connection, zygote_messages.Forked(pid), handle)
            children[handle] = pid
            poller.register(handle, select.POLLIN)
            for descriptor in (output, *descriptors):
                os.close(descriptor)


def _hear(connection: socket.socket) -> tuple[zygote_messages.Fork, list[int]]:
    try:
        received = zygote_messages.receive(connection, zygote_messages.TO_ZYGOTE)
    except OSError:
        received = None
    if received is None:  # the coordinator is gone
        os._exit(0)
    return received


def _tell(connection: socket.socket, message: Any, *descriptors: int) -> None:
    try:
        zygote_messages.send(connection, zygote_messages.FROM_ZYGOTE, message, descriptors)
    except OSError:
        os._exit(0)


def _become(order: zygote_messages.Fork, output: int) -> None:
    for standard in (1, 2):
        os.dup2(output, standard)
    os.close(output)
    adopt(order.environment)


def adopt(environment: Mapping[str, str]) -> None:
    """Also what a library has read already."""
    os.environ.update(environment)
    if "HF_HUB_OFFLINE" in environment and "huggingface_hub" in sys.modules:
        sys.modules["huggingface_hub"].constants.HF_HUB_OFFLINE = True


def _let_go(inherited: Iterable[int]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the coordinator's business
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    for descriptor in (null, *inherited):
        os.close(descriptor)


def name_process(text: str) -> None:
    """As `ps -o comm` and `top` show it."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, text.encode(), 0, 0, 0)
