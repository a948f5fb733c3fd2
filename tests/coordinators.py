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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexgen_lite.engine.zygote import SHARED
from flexgen_lite.launcher import process

PR_SET_CHILD_SUBREAPER = 36
MAX_ORDER = 1 << 20
FRESH, spawn_fresh = process.COMMAND, process._spawn


class Coordinators:
    """`spawn` stands for `flexgen_lite.launcher.process._spawn`."""

    def __init__(self) -> None:
        self._connection = _start()
        self._circumstances = _circumstances()
        self._lock = threading.Lock()

    def spawn(self, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        if command != FRESH or SHARED not in os.environ or _circumstances() != self._circumstances:
            return spawn_fresh(command, environment)
        with self._lock:
            (theirs_in, ours_in), (ours_out, theirs_out) = os.pipe(), os.pipe()
            order = {
                "environment": {**os.environ, **environment},
                "directory": os.getcwd(),
                "cpus": sorted(os.sched_getaffinity(0)),
            }
            adopt_orphans(True)
            try:
                socket.send_fds(self._connection, [json.dumps(order).encode()], [theirs_in, theirs_out, 2])
                pid = int(self._connection.recv(32))
            finally:
                adopt_orphans(False)
            os.close(theirs_in)
            os.close(theirs_out)
        return Forked(pid, ours_in, ours_out)


class Forked(subprocess.Popen[bytes]):
    """A child that was not started by this class, whose other methods serve it all the same."""

    def __init__(self, pid: int, stdin: int, stdout: int) -> None:
        more: dict[str, Any] = {"_waitpid_lock": threading.Lock(), "_child_created": True, "_sigint_wait_secs": 0.25}
        self.__dict__.update(more, args=FRESH, pid=pid, returncode=None, stderr=None)
        self.stdin, self.stdout = os.fdopen(stdin, "wb"), os.fdopen(stdout, "rb")


def adopt_orphans(wanted: bool) -> None:
    """Whether those of this process's descendants become its children."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0)


def environment_file(pid: int) -> Path:
    """Where the environment of a forked coordinator is told; what the system knows is that of an earlier process."""
    started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return Path(os.environ[SHARED], f"environment-{pid}-{started}")


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
            pid = os.fork()
            if pid > 0:
                os.write(write, str(pid).encode())
                os._exit(0)
            for descriptor in (read, write, connection.detach()):
                os.close(descriptor)
            _become(json.loads(order), descriptors)
            code = coordinator.main()
            sys.stdout.flush()
            os._exit(code)
        os.waitpid(between, 0)  # whose child has another parent now
        connection.send(os.read(read, 32))
        for descriptor in (read, write, *descriptors):
            os.close(descriptor)


def _become(order: dict[str, Any], descriptors: Sequence[int]) -> None:
    os.setsid()
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
