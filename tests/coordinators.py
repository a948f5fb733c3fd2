"""Coordinators that are forked in the tests: to import what one needs takes a third of a second, and a run starts some
two hundred.

A child of the tests' process, `python -m tests.coordinators DESCRIPTOR`, imports it once. What it forks becomes a child
of the tests' process itself, so that it is to an EngineProcess what a fresh process would be. Coordinators are fresh
processes where `FLEXGEN_LITE_ZYGOTES` is not set, or where control group or limits have changed.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexgen_lite.engine.zygote import SHARED
from flexgen_lite.launcher import process
from tests.zygotes import environment_file

PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 15, 36
MAX_ORDER = 64 << 10  # bytes; a socket takes more
COORDINATOR = "coordinator"  # the name of what is forked
FRESH, spawn_fresh = process.COMMAND, process._spawn


class Coordinators:
    """`spawn` stands for `flexgen_lite.launcher.process._spawn`."""

    def __init__(self) -> None:
        self._connection: socket.socket | None = _start()
        self._circumstances = _circumstances()
        self._lock = threading.Lock()

    def spawn(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        inherited: Sequence[int] = (),
        own_session: bool = True,
    ) -> subprocess.Popen[bytes]:
        as_ours = command == FRESH and SHARED in os.environ and not inherited and own_session
        if not as_ours or _circumstances() != self._circumstances:
            return spawn_fresh(command, environment, inherited, own_session)
        order = {
            "environment": {**os.environ, **environment},
            "directory": os.getcwd(),
            "cpus": sorted(os.sched_getaffinity(0)),
        }
        with self._lock:
            pid, pipes = self._fork(json.dumps(order).encode())
        return Forked(pid, *pipes) if pid else spawn_fresh(command, environment)

    def _fork(self, order: bytes) -> tuple[int, tuple[int, int]]:
        """The process, and what leads to its standard input and comes from its standard output; 0 where there is none:
        once the helper has failed, it is not asked again."""
        if self._connection is None or len(order) > MAX_ORDER:
            return 0, (-1, -1)
        (theirs_in, ours_in), (ours_out, theirs_out) = os.pipe(), os.pipe()
        pid = 0
        adopt_orphans(True)
        try:
            socket.send_fds(self._connection, [order], [theirs_in, theirs_out, 2])
            pid = int(self._connection.recv(32) or b"0")
        finally:
            adopt_orphans(False)
            os.close(theirs_in)
            os.close(theirs_out)
            if not pid:
                self._connection.close()
                self._connection = None
                os.close(ours_in)
                os.close(ours_out)
        return pid, (ours_in, ours_out)


class Forked(subprocess.Popen[bytes]):
    """A child that was not started by this class; those of its methods that an EngineProcess calls serve it."""

    def __init__(self, pid: int, stdin: int, stdout: int) -> None:
        more: dict[str, Any] = {"_waitpid_lock": threading.Lock(), "_child_created": True, "_sigint_wait_secs": 0.25}
        self.__dict__.update(more, args=FRESH, pid=pid, returncode=None, stderr=None)
        self.stdin, self.stdout = os.fdopen(stdin, "wb"), os.fdopen(stdout, "rb")


def adopt_orphans(wanted: bool) -> None:
    """Whether those of this process's descendants become its children."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0)


def _circumstances() -> object:
    return [Path(f"/proc/self/{file}").read_text() for file in ("cgroup", "limits")]


def _start() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-m", "tests.coordinators", str(theirs.fileno())]
        subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], cwd=Path(__file__).parents[1])
    return ours


def serve(connection: socket.socket) -> None:
    """Until the tests' process has ended."""
    from flexgen_lite.engine import __main__ as coordinator

    gc.collect()
    gc.freeze()
    while True:
        order, descriptors, _, _ = socket.recv_fds(connection, MAX_ORDER, 3)
        if not order:
            return
        read, write = os.pipe()
        between = os.fork()
        if between == 0:
            code = 1
            try:
                if os.fork() > 0:
                    os._exit(0)
                os.close(connection.detach())
                _become(json.loads(order), descriptors)
                os.write(write, str(os.getpid()).encode())  # all is as it would be for a fresh process
                os.close(read)
                os.close(write)
                code = coordinator.main()
                sys.stdout.flush()
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        os.close(write)
        for descriptor in descriptors:
            os.close(descriptor)
        os.waitpid(between, 0)  # whose child has another parent now
        connection.send(os.read(read, 32) or b"0")
        os.close(read)


def _become(order: dict[str, Any], descriptors: Sequence[int]) -> None:
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_NAME, COORDINATOR.encode(), 0, 0, 0)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["directory"])
    os.sched_setaffinity(0, order["cpus"])
    sys.argv[:] = ["flexgen_lite.engine"]
    environment_file(os.getpid()).write_text(json.dumps(order["environment"]))


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
